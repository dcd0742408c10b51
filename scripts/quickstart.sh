#!/usr/bin/env bash
# Makes a virtual environment, installs the project, trains a text and an image classifier on embedded real data with
# uniform and with importance sampling at the same budget, and compares them in a table and a plot.
#   bash scripts/quickstart.sh            some minutes
#   bash scripts/quickstart.sh --quick    a minute or two: shows that everything runs, trains too little to tell more
#   SEEDS="1 2 3" bash scripts/quickstart.sh    several seeds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

folder=outputs/quickstart
few_text=() few_image=()
case "${1:-}" in
  "") ;;
  --quick)
    folder=outputs/quickstart_quick
    few_text=(--num_train_epochs 2 --max_train_samples 800 --max_eval_samples 400)
    few_image=(--num_train_epochs 3)
    ;;
  *) echo "error: unknown argument $1; the only one is --quick." >&2; exit 1 ;;
esac

make_environment scripts
rm -rf "$folder"
for seed in ${SEEDS:-1}; do
  for trainer in uniform importance; do
    run=(--trainer "$trainer" --seed "$seed" --disable_tqdm "${QUIET:-false}")
    echo; echo "== digits, $trainer, seed $seed"
    "$VENV/bin/python" scripts/run_image_classification.py "${run[@]}" \
      --output_dir "$folder/digits/$trainer-$seed" "${few_image[@]}"
    echo; echo "== docstrings, $trainer, seed $seed"
    "$VENV/bin/python" scripts/run_text_classification.py "${run[@]}" \
      --output_dir "$folder/docstrings/$trainer-$seed" "${few_text[@]}"
  done
done
"$VENV/bin/python" scripts/compare_runs.py "$folder"
