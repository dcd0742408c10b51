"""Runs of the accuracy benchmark: steps, figures, reproducibility, and files of results."""

import json

import benchmark
import pytest
import torch
from benchmarks import accuracy, results
from benchmarks.methods import METHODS, Method
from small_tasks import early_end_task, use_same_process, use_small_tasks

from hf_importance import ImportanceConfig

pytestmark = pytest.mark.usefixtures("small_tasks")

WITH_BUDGETS = [name for name, method in METHODS.items() if not method.whole]
"""Methods that run with every budget."""


@pytest.fixture
def small_tasks(monkeypatch):
    return use_small_tasks(monkeypatch)


@pytest.fixture
def task_with_early_end(small_tasks):
    """The task `digits`, replaced by one on which training ends early."""
    small_tasks["digits"] = early_end_task()
    return small_tasks["digits"]


@pytest.fixture
def same_process(monkeypatch):
    use_same_process(monkeypatch)


@pytest.mark.parametrize("method", WITH_BUDGETS)
@pytest.mark.parametrize("task", ["digits", "image"])
def test_run_has_the_steps_of_its_budget(method, task):
    cost = METHODS[method].cost
    for budget in (1.0, 0.5):
        run = accuracy.run(task, method, budget, seed=1)
        assert run["steps"] == round(24 * budget / cost)
        assert run["score"] == (run["accuracy"] if task == "digits" else -run["error"])
        assert ("pruned" in run) == (METHODS[method].settings is not None)


def test_methods_with_as_many_steps_take_those_of_ours(task_with_early_end, tmp_path):
    ours = ("digits", "ours", 1.0, 1)
    assert accuracy.run("digits", "uniform", 1.0, 1)["steps"] == 72
    assert accuracy.run(*ours)["steps"] < 72
    for steps in (11, 72):
        run = accuracy.run("digits", "uniform, as many steps", 1.0, 1, steps_taken={ours: steps})
        assert run["steps"] == steps
    uniform = accuracy.run("digits", "uniform", 1.0, 1)
    assert run["cross_entropy"] == uniform["cross_entropy"]
    learning_rates = {}
    for method in ("uniform, as many steps", "uniform, as many, raised"):
        trainer = METHODS[method].trainer(task_with_early_end, 18, 1, str(tmp_path))
        assert trainer.args.max_steps == 18
        learning_rates[method] = trainer.args.learning_rate
    expected = {"uniform, as many steps": 0.03, "uniform, as many, raised": 0.06}
    assert learning_rates == pytest.approx(expected)
    with pytest.raises(KeyError):
        accuracy.run("digits", "uniform, as many steps", 1.0, 2, steps_taken={ours: 24})


def test_grouped_methods_only_run_on_texts():
    assert METHODS["uniform, grouped"].runs_at(1.0, of_texts=True)
    assert not METHODS["uniform, grouped"].runs_at(1.0, of_texts=False)
    assert not METHODS["ours"].runs_at(0.5, of_texts=True)
    assert METHODS["InfoBatch"].runs_at(0.5, of_texts=False)


def test_scaled_cross_entropy_does_not_depend_on_the_scale_of_logits():
    """For calibrated logits times any factor, it is the cross-entropy of the calibrated ones."""
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    calibrated = torch.nn.functional.cross_entropy(logits, labels).item()
    for factor in (0.2, 1.0, 5.0):
        assert accuracy.scaled_cross_entropy(factor * logits, labels) == pytest.approx(calibrated, rel=1e-3)
        unscaled = torch.nn.functional.cross_entropy(factor * logits, labels).item()
        assert (unscaled > 1.05 * calibrated) == (factor != 1.0), "control: the plain cross-entropy depends on it"


def test_runs_are_reproducible():
    for method in WITH_BUDGETS:
        first, second, other = (accuracy.run("digits", method, 1.0, seed)["cross_entropy"] for seed in (3, 3, 4))
        assert first == second
        assert first != other, "control: another seed"


def test_all_methods_learn():
    for method in WITH_BUDGETS:
        assert accuracy.run("digits", method, 1.0, seed=1)["accuracy"] > 0.6, "chance is 0.25"


# ---- files of results ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("same_process")
def test_existing_runs_are_not_repeated(tmp_path, capsys):
    path = tmp_path / "accuracy.json"
    grid = ["--tasks", "digits", "--methods", "uniform", "InfoBatch", "--budgets", "0.5", "1.0", "--output", str(path)]
    benchmark.main(["accuracy", *grid, "--seeds", "1"])
    assert "0 of 4 runs are in" in capsys.readouterr().out
    before = json.loads(path.read_text())
    assert before["format"] == results.FORMAT
    benchmark.main(["accuracy", *grid, "--seeds", "2"])
    assert "4 of 8 runs are in" in capsys.readouterr().out
    after = json.loads(path.read_text())["runs"]
    assert len(after) == 8
    assert all(run in after for run in before["runs"])
    assert after == sorted(after, key=lambda run: [run[name] for name in accuracy.KEYS])


@pytest.mark.usefixtures("same_process", "task_with_early_end")
def test_methods_with_as_many_steps_run_after_ours(tmp_path):
    path = tmp_path / "accuracy.json"
    methods = ["uniform, as many steps", "ours", "uniform"]
    grid = ["--tasks", "digits", "--methods", *methods, "--budgets", "0.5", "1.0", "--output", str(path)]
    benchmark.main(["accuracy", *grid, "--seeds", "2"])
    steps = {}
    for run in json.loads(path.read_text())["runs"]:
        steps.setdefault((run["method"], run["budget"]), []).append(run["steps"])
    assert steps["uniform", 1.0] == [72, 72]
    assert steps["uniform", 0.5] == [36, 36]
    assert max(steps["ours", 1.0]) < 72
    assert steps["ours", 1.0] == steps["uniform, as many steps", 1.0]
    assert len(steps) == 4, "methods that end early only run with the full budget"


@pytest.mark.usefixtures("same_process")
def test_runs_with_other_settings_are_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "accuracy.json"
    grid = ["--tasks", "digits", "--methods", "ours, all steps", "--budgets", "0.5", "--output", str(path)]
    benchmark.main(["accuracy", *grid, "--seeds", "1"])
    settings = json.loads(path.read_text())["settings"]
    assert settings["task"]["digits"]["batch"] == 16
    assert settings["method"]["ours, all steps"]["uniform_fraction"] == 0.3
    benchmark.main(["accuracy", *grid, "--seeds", "2"])
    assert len(json.loads(path.read_text())["runs"]) == 2, "control: the same settings"
    monkeypatch.setitem(METHODS, "ours, all steps", Method(ImportanceConfig(uniform_fraction=0.5)))
    with pytest.raises(SystemExit, match="has runs of the method 'ours, all steps' with other settings"):
        benchmark.main(["accuracy", *grid, "--seeds", "3"])
