"""Training that is killed at random times, also while saving, resumes exactly from a complete checkpoint."""

import json

import pytest
import workers


@pytest.mark.parametrize(
    "importance",
    [{"prune_mass": 0.05}, {"budget": 1.0, "sampling": "replacement", "prune_mass": 0.05}],
    ids=["auto", "fixed budget, replacement"],
)
def test_killed_and_resumed_training_is_identical(tmp_path, importance):
    output = workers.run("checkpoints/kill_worker.py", tmp_path / "runs", 20, json.dumps(importance), timeout=600)
    result = json.loads(output.splitlines()[-1])
    print(json.dumps(result, indent=1))
    assert len(result["kills"]) == 20
    assert result["differences"]
    assert set(result["differences"]) == {0.0}, "differences of parameters, importances and effective steps"
    assert any(kill["resumed"] for kill in result["kills"]), "control: kills are late enough to resume"
