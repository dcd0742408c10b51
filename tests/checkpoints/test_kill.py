"""Training that is killed at random times, also while saving, resumes exactly from a complete checkpoint."""

import json

import pytest
import workers

CASES = {
    "effective epochs": {"prune_mass": 0.05},
    "all steps, replacement": {"effective_epochs": False, "sampling": "replacement", "prune_mass": 0.05},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of all cases, from one process."""
    folder = tmp_path_factory.mktemp("kill") / "runs"
    output = workers.run("checkpoints/kill_worker.py", folder, 20, *map(json.dumps, CASES.values()), timeout=600)
    return dict(zip(CASES, json.loads(output.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_training_is_identical(results, case):
    result = results[case]
    print(json.dumps(result, indent=1))
    assert len(result["kills"]) == 20
    assert result["differences"]
    assert set(result["differences"]) == {0.0}, "differences of parameters, importances and effective epochs"
    assert any(kill["resumed"] for kill in result["kills"]), "control: kills are late enough to resume"
