# Sourced by the other scripts. Defines make_environment EXTRA, which creates a virtual environment in .venv (or $VENV)
# and installs the project with this extra and the tested versions of its dependencies.

make_environment() {
  local python candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "${python:-}" ]; then
    echo "error: Python 3.10 or newer with its venv module is required, but was not found (on Debian: apt-get install python3-venv)." >&2
    echo "If it is installed under another name, pass its path: PYTHON=/path/to/python bash $0" >&2
    exit 1
  fi
  VENV=${VENV:-.venv}
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "Creating the virtual environment $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
  fi
  echo "Installing hf_importance[$1] and its dependencies; the first time, this takes a few minutes"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".[$1]"
}
