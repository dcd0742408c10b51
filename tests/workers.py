"""Runs test scripts in separate processes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run(script, *arguments, launcher=(), timeout=300, **environment):
    """Run a script and return its output.

    Args:
        script: path relative to `tests`.
        *arguments: arguments of the script.
        launcher: flags of Python, such as `-m torchrun`.
        timeout: seconds.
        **environment: additional environment variables.
    """
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *launcher, str(TESTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout
