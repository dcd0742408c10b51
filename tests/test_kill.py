"""Training that is killed at random moments, also while saving, resumes exactly from a complete checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "importance",
    [{"prune_mass": 0.05}, {"budget": 1.0, "sampling": "replacement", "prune_mass": 0.05}],
    ids=["auto", "fixed, replacement"],
)
def test_killed_and_restarted(tmp_path, importance):
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE / "kill_worker.py"), str(tmp_path / "runs"), "20", json.dumps(importance)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert len(found["outcomes"]) == 20
    assert found["differences"]
    assert set(found["differences"]) == {0.0}, "as in the run that was not killed: model, importances, progress"
    assert any(outcome["resumed"] for outcome in found["outcomes"]), "control: kills came late enough to resume"
