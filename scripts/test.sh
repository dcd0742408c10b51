#!/usr/bin/env bash
# Create a virtual environment, install the project with the tested versions, and run the test suite on all cores.
# Arguments are passed to pytest: bash scripts/test.sh -k sampler
# Tests with DDP, FSDP2, DeepSpeed and Ray Train: EXTRA=dev,engines bash scripts/test.sh -m engines
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment "${EXTRA:-dev}"
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile "$@"
