#!/usr/bin/env bash
# Create a virtual environment, install the project, train a text and an image classifier on embedded real data with
# uniform and with importance sampling at otherwise equal settings, and compare them in a table and a plot.
#   bash scripts/quickstart.sh            takes a few minutes
#   bash scripts/quickstart.sh --quick    takes a minute or two; only checks that everything runs
#   SEEDS="1 2 3" bash scripts/quickstart.sh    trains with several seeds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

folder=outputs/quickstart
quick_text=() quick_image=()
case "${1:-}" in
  "") ;;
  --quick)
    folder=outputs/quickstart_quick
    quick_text=(--num_train_epochs 2 --max_train_samples 800 --max_eval_samples 400)
    quick_image=(--num_train_epochs 3)
    ;;
  *) echo "error: the argument must be --quick or none, but is $1." >&2; exit 1 ;;
esac

make_environment scripts
rm -rf "$folder"
for seed in ${SEEDS:-1}; do
  for trainer in uniform importance; do
    run=(--trainer "$trainer" --seed "$seed" --disable_tqdm "${QUIET:-false}")
    echo; echo "== digits, $trainer, seed $seed"
    "$VENV/bin/python" scripts/run_image_classification.py "${run[@]}" \
      --output_dir "$folder/digits/$trainer-$seed" "${quick_image[@]}"
    echo; echo "== docstrings, $trainer, seed $seed"
    "$VENV/bin/python" scripts/run_text_classification.py "${run[@]}" \
      --output_dir "$folder/docstrings/$trainer-$seed" "${quick_text[@]}"
  done
done
"$VENV/bin/python" scripts/compare_runs.py "$folder"
