"""Training that is killed at random moments, also while saving, resumes exactly from a complete checkpoint."""

import json

import pytest
import workers


@pytest.mark.parametrize(
    "importance",
    [{"prune_mass": 0.05}, {"budget": 1.0, "sampling": "replacement", "prune_mass": 0.05}],
    ids=["auto", "fixed, replacement"],
)
def test_killed_and_restarted(tmp_path, importance):
    output = workers.run("checkpoints/kill_worker.py", tmp_path / "runs", 20, json.dumps(importance), timeout=600)
    found = json.loads(output.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert len(found["outcomes"]) == 20
    assert found["differences"]
    assert set(found["differences"]) == {0.0}, "as in the run that was not killed: model, importances, progress"
    assert any(outcome["resumed"] for outcome in found["outcomes"]), "control: kills came late enough to resume"
