#!/usr/bin/env bash
# What only a machine with a GPU can tell: the tests that need one, step time and memory of
# selective backward for BERT-base and ViT-base in bf16, with 128 and 512 tokens, and the overhead per step.
# The figures are added to scripts/results/backward.json and overhead.json, or to these files in the folder that is
# passed: bash scripts/gpu_check.sh outputs. Then `python scripts/benchmark.py pages` adds them to the tables.
set -euo pipefail
results=$(realpath "${1:-$(dirname "${BASH_SOURCE[0]}")/results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment dev
if ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: PyTorch sees no CUDA device. Check nvidia-smi, and that PyTorch was installed with CUDA." >&2
  exit 1
fi
"$VENV/bin/python" -m pytest -m gpu
"$VENV/bin/python" scripts/benchmark.py backward --models "BERT base" "ViT base" --output "$results/backward.json"
"$VENV/bin/python" scripts/benchmark.py overhead --output "$results/overhead.json"
