#!/usr/bin/env bash
# Makes a virtual environment, installs the project with the tested versions, runs the whole test suite on all cores.
# Arguments go to pytest: bash scripts/test.sh -k sampler
# DDP, FSDP2, DeepSpeed and Ray Train: EXTRA=dev,engines bash scripts/test.sh -m engines
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment "${EXTRA:-dev}"
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile "$@"
