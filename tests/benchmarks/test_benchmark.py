"""The benchmarks: arithmetic by hand, rival methods by their descriptions, and small grids."""

import json
import math
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmarks import (
    accuracy,
    comparison,
    draws,
    from_scratch,
    label_errors,
    overhead,
    pretrained,
    results,
    seconds,
    suspects,
    tables,
)
from benchmarks.from_scratch import Perceptron, with_wrong_labels
from benchmarks.methods import METHODS, Method
from benchmarks.task import Task
from benchmarks.tasks import TASKS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replaces the tasks by two that take a second: four clusters, and a regression."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    columns = {
        "values": torch.randn(4, 8, generator=g)[labels] + 0.3 * torch.randn(96, 8, generator=g),
        "labels": labels,
    }
    numbers = {**columns, "labels": columns["values"].sum(1)}
    found = {
        "digits": Task(columns, columns, lambda: Perceptron(8, 16, 4), 4, 16, 1e-2),
        "image": Task(numbers, numbers, lambda: Perceptron(8, 16, 1), 4, 16, 1e-2),
    }
    for module in (accuracy, label_errors, seconds, suspects):
        monkeypatch.setattr(module, "task_of", found.__getitem__)
    return found


# ---- runs ------------------------------------------------------------------------------------------------------------


EQUAL = [name for name, method in METHODS.items() if not method.whole]
"""Those that are compared at equal budgets."""


@pytest.mark.parametrize("method", EQUAL)
@pytest.mark.parametrize("task", ["digits", "image"])
def test_a_run_has_the_steps_of_its_budget(method, task):
    cost = METHODS[method].cost
    for budget in (1.0, 0.5):
        found = accuracy.run(task, method, budget, seed=1)
        assert found["steps"] == round(24 * budget / cost)
        assert found["score"] == (found["accuracy"] if task == "digits" else -found["error"])
        assert ("pruned" in found) == (METHODS[method].settings is not None)


@pytest.fixture
def quick(small):
    """A task that ends early."""
    labels = small["digits"].train["labels"]
    values = torch.nn.functional.one_hot(labels, 8).float()
    columns = {"values": values, "labels": torch.where(torch.arange(96) < 12, (labels + 1) % 4, labels)}
    small["digits"] = replace(small["digits"], train=columns, epochs=12, learning_rate=3e-2)
    return small


def test_runs_that_end_when_enough_was_learnt(quick, tmp_path):
    key = ("digits", "ours", 1.0, 1)
    assert accuracy.run("digits", "uniform", 1.0, 1)["steps"] == 72
    assert accuracy.run(*key)["steps"] < 72
    for steps in (11, 72):
        found = accuracy.run("digits", "uniform, as many steps", 1.0, 1, steps_taken={key: steps})
        assert found["steps"] == steps
    uniform = accuracy.run("digits", "uniform", 1.0, 1)
    assert found["cross_entropy"] == uniform["cross_entropy"]
    rates = {}
    for method in ("uniform, as many steps", "uniform, as many, raised"):
        trainer = METHODS[method].trainer(quick["digits"], 18, 1, str(tmp_path))
        assert trainer.args.max_steps == 18
        rates[method] = trainer.args.learning_rate
    assert rates == pytest.approx({"uniform, as many steps": 0.03, "uniform, as many, raised": 0.06})
    with pytest.raises(KeyError):
        accuracy.run("digits", "uniform, as many steps", 1.0, 2, steps_taken={key: 24})


def test_scaled_cross_entropy():
    """For logits that are correct up to a factor, it is the cross-entropy of the correct ones."""
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    right = torch.nn.functional.cross_entropy(logits, labels).item()
    for factor in (0.2, 1.0, 5.0):
        assert accuracy.scaled_cross_entropy(factor * logits, labels) == pytest.approx(right, rel=1e-3)
        plain = torch.nn.functional.cross_entropy(factor * logits, labels).item()
        assert (plain > 1.05 * right) == (factor != 1.0), "control"


def test_runs_are_repeatable():
    for method in EQUAL:
        first, second, other = (accuracy.run("digits", method, 1.0, seed)["cross_entropy"] for seed in (3, 3, 4))
        assert first == second
        assert first != other, "control"


def test_all_methods_learn():
    for method in EQUAL:
        assert accuracy.run("digits", method, 1.0, seed=1)["accuracy"] > 0.6, "chance is 0.25"


# ---- tables ----------------------------------------------------------------------------------------------------------


def found_runs():
    """Runs of two seeds with simple figures.

    On the digits uniform has .80 and .82, ours .005 more with 60 % of the steps; InfoBatch has .04 less with half the
    budget and .04 more with all of it. On the image ours is worse.
    """
    runs = []
    for seed in (1, 2):
        uniform = 0.78 + 0.02 * seed

        def add(method, budget, steps, change, worse, seed=seed, uniform=uniform):
            head = {"method": method, "budget": budget, "seed": seed, "steps": steps}
            reached = {"accuracy": uniform + change, "cross_entropy": 0.5 - change, "scaled_cross_entropy": 0.4}
            runs.append({"task": "digits", **head, "score": reached["accuracy"], **reached, "tokens": 10 * steps})
            runs.append({"task": "image", **head, "score": 0.0, "error": 0.01 * (1 + worse)})

        add("uniform", 0.5, 50, -0.1, 1.0)
        add("uniform", 1.0, 100, 0.0, 0.0)
        add("ours", 1.0, 60, 0.005, 0.2 + 0.1 * seed)
        add("uniform, as many steps", 1.0, 60, -0.05, 0.1)
        add("InfoBatch", 0.5, 50, -0.04, 0.5)
        add("InfoBatch", 1.0, 100, 0.04, -0.5)
    return runs


def test_what_is_as_good():
    runs = found_runs()
    assert comparison.tasks(runs) == ["digits", "image"]
    accuracy, cross_entropy = comparison.figures(runs, "digits")
    (error,) = comparison.figures(runs, "image")
    assert comparison.is_as_good(runs, "digits")
    assert comparison.is_worse(runs, "image", error)
    assert not comparison.is_as_good(runs, "image")
    worse = [run | ({"cross_entropy": 0.501} if run["method"] == "ours" else {}) for run in runs]
    assert comparison.is_worse(worse, "digits", cross_entropy)
    assert not comparison.is_worse(worse, "digits", accuracy)
    assert not comparison.is_as_good(worse, "digits")
    unsure = [run | ({"cross_entropy": 0.485 + 0.012 * run["seed"]} if run["method"] == "ours" else {}) for run in runs]
    assert comparison.is_as_good(unsure, "digits"), "control: within a standard error"
    one = [run for run in runs if run["seed"] == 1 or run["method"] == "uniform"]
    assert comparison.tasks(one) == [], "of one seed there is no error"


def test_share_to_match():
    """InfoBatch crosses uniform's accuracy half way between .5 and 1, its error at three quarters."""
    runs = found_runs()
    assert comparison.share_to_match(runs, "digits", "uniform") == 1.0
    assert comparison.share_to_match(runs, "digits", "InfoBatch") == pytest.approx(0.75)
    assert comparison.share_to_match(runs, "image", "InfoBatch") == pytest.approx(0.75)
    assert comparison.share_to_match(runs, "digits", "KAKURENBO") == math.inf
    assert comparison.best_rival(runs, "digits") == ("InfoBatch", pytest.approx(0.75))
    late = [
        run | ({"cross_entropy": 0.48 + 0.02 * run["budget"]} if run["method"] == "InfoBatch" else {}) for run in runs
    ]
    assert comparison.share_to_match(late, "digits", "InfoBatch") == pytest.approx(0.75), "both figures count"
    never = [run | ({"cross_entropy": 0.6} if run["method"] == "InfoBatch" else {}) for run in runs]
    assert comparison.share_to_match(never, "digits", "InfoBatch") == math.inf


def test_tables(tmp_path, capsys):
    path, runs = tmp_path / "accuracy.json", found_runs()
    results.save(path, results.load(path) | {"runs": runs}, accuracy.KEYS)
    benchmark.main(["accuracy", "--show", "--output", str(path)])
    printed = capsys.readouterr().out
    what = TASKS["digits"].what
    ours = "+0.5 ± 0.0 points | 0.500 | −0.005 ± 0.000"
    assert f"| **digits**: {what} | 2 | 81.00 | {ours} | 60 % | 60 % |  | 75 % (InfoBatch) |" in printed
    assert "| 2 | 0.01 | +35.0 ± 5.0 % error, worse |  |  | 60 % |  |  | 75 % (InfoBatch) |" in printed
    assert (
        "| digits | uniform, as many steps | 2 | 60 % | 60 % | 76.00 ± 1.00 | 0.550 ± 0.000 | 0.400 ± 0.000 |"
        in printed
    )
    assert "| digits | 0.60 | 1.00 | 0.75 |\n| image | never | 1.00 | 0.75 |\n" in printed
    assert "| mean of the 2 with all | 0.80 | 1.00 | 0.75 |" in printed
    assert "| digits | InfoBatch | 77.00 ± 1.00 (0.540) | 85.00 ± 1.00 (0.460) |" in printed
    assert path.with_suffix(".png").stat().st_size > 1000
    pairs = [{"task": "digits", "uniform": 10.0, "ours": ours} for ours in (6.0, 7.0, 9.0)]
    assert "| 60 % | 60 % | 70 % | 75 % (InfoBatch) |" in tables.decision_table(runs, pairs)


def test_claims():
    runs = found_runs()
    claims = tables.claims(runs)
    assert "- **Training from scratch** took 60 % of the steps in the mean over 2 tasks, from 60 % to 60 %." in claims
    assert "on 1 of 2 tasks every metric was at least as good" in claims
    assert "with these counted as no saving, the mean share is 80 %" in claims
    assert "was worse in every metric on 1 of the 2 tasks where steps were saved.\n" in claims
    assert claims.endswith("all had a worse accuracy or error on 1 of the 2 tasks where they were run.")
    assert "Fine-tuning" not in claims
    tuned = [run | ({"task": "clothes"} if run["task"] == "digits" else {}) for run in runs]
    assert "- **Fine-tuning** took 60 % of the steps in the mean over 1 task, from" in tables.claims(tuned)
    fewer = [run for run in runs if run["method"] != "uniform, as many steps"]
    assert "Control" not in tables.claims(fewer)
    long = [run | ({"steps": 100} if run["task"] == "image" else {}) for run in runs]
    assert "on 1 of the 1 task where steps were saved." in tables.claims(long), "where none is, it is no control"


def test_the_control_is_compared_over_common_seeds():
    """On the first seed ours is ahead of it, on both in the mean as well; with one of the control only that counts."""
    runs = found_runs()
    one = [run for run in runs if run["method"] != "uniform, as many steps" or run["seed"] == 1]
    assert comparison.is_ahead_of(one, "digits", "uniform, as many steps")
    behind = [run | ({"accuracy": 0.1} if (run["method"], run["seed"]) == ("ours", 1) else {}) for run in one]
    assert not comparison.is_ahead_of(behind, "digits", "uniform, as many steps")
    unpaired = [run | ({"accuracy": 0.1} if (run["method"], run["seed"]) == ("ours", 2) else {}) for run in one]
    assert comparison.is_ahead_of(unpaired, "digits", "uniform, as many steps"), "control: a seed that it lacks"


def test_at_the_same_steps():
    """InfoBatch goes from .04 less to .04 more between .5 and 1, its error from 1.5 to .5: at .6, −.024 and 1.3."""
    runs = found_runs()
    assert comparison.at_same_steps(runs, "digits") == pytest.approx({"ours": 0.5, "uniform": -8.0, "InfoBatch": -2.4})
    assert comparison.best_at_same_steps(runs, "digits") == "ours"
    assert comparison.at_same_steps(runs, "image")["InfoBatch"] == pytest.approx(0.003)
    assert comparison.best_at_same_steps(runs, "image") == "InfoBatch"
    assert "| digits | 60 % | **+0.5** | −8.0 | −2.4 |" in tables.same_table(runs)
    assert "| image | 60 % | +35.0 | +80.0 | **+30.0** |" in tables.same_table(runs)
    without = [run for run in runs if run["method"] != "InfoBatch"]
    assert "digits" not in tables.same_table(without)
    assert "Competing" not in tables.claims(without)


def test_the_short_table():
    lines = tables.short_table(found_runs(), rows=1).splitlines()
    assert len(lines) == 4, "two tasks: the one that saves the most, and the one that saves the fewest"
    assert lines[2] == f"| {TASKS['digits'].what} | 60 % | +0.5 ± 0.0 points | −5.0 ± 0.0 points, worse |"
    assert lines[3] == f"| {TASKS['image'].what} | 60 % | +35.0 ± 5.0 % error, worse | +10.0 ± 0.0 % error, worse |"


# ---- grids -----------------------------------------------------------------------------------------------------------


class SameProcess:
    """Runs jobs directly instead of in a pool of processes, which would not have the small tasks."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, run, *point):
        job = Future()
        job.set_result(run(*point))
        return job


def test_what_is_there_is_not_run_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
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


def test_what_has_as_many_steps_comes_last(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
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
    assert len(steps) == 4, "what ends by itself has the full budget only"


def test_runs_with_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
    path = tmp_path / "accuracy.json"
    grid = ["--tasks", "digits", "--methods", "ours, all steps", "--budgets", "0.5", "--output", str(path)]
    benchmark.main(["accuracy", *grid, "--seeds", "1"])
    kept = json.loads(path.read_text())["settings"]
    assert kept["task"]["digits"]["batch"] == 16
    assert kept["method"]["ours, all steps"]["uniform_fraction"] == 0.3
    benchmark.main(["accuracy", *grid, "--seeds", "2"])
    assert len(json.loads(path.read_text())["runs"]) == 2, "control: the same settings go on"
    monkeypatch.setitem(METHODS, "ours, all steps", Method({"uniform_fraction": 0.5}))
    with pytest.raises(SystemExit, match="has runs of the method 'ours, all steps' with other settings"):
        benchmark.main(["accuracy", *grid, "--seeds", "3"])


def test_label_errors(tmp_path, capsys, monkeypatch):
    pytest.importorskip("cleanlab")
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
    path = tmp_path / "label_errors.json"
    benchmark.main(["label_errors", "--tasks", "digits", "--shares", "0.1", "--seeds", "2", "--output", str(path)])
    (first, _) = json.loads(path.read_text())["runs"]
    assert first["wrong"] == 10
    for ranking in label_errors.RANKINGS:
        assert 0.9 < first[f"auroc_{ranking}"] <= 1
    assert first["flagged_right_ours"] <= first["flagged_ours"]
    printed = capsys.readouterr().out
    assert "| digits | mean loss of the visits (ours) | " in printed
    assert "| digits | cleanlab | " in printed


def test_suspects(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(suspects, "CASES", (("digits", 0.1),))
    path = tmp_path / "suspects.json"
    benchmark.main(["suspects", "--seeds", "2", "--output", str(path)])
    runs = {(run["method"], run["seed"]): run for run in json.loads(path.read_text())["runs"]}
    assert len(runs) == 2 * len(suspects.METHODS)
    assert runs["uniform", 1]["flagged"] == runs["ours", 1]["flagged"] == 0
    assert runs["uniform, without the flagged", 1]["flagged"] > 0
    assert runs["uniform", 1]["accuracy"] != runs["uniform, generalised cross-entropy", 1]["accuracy"] or (
        runs["uniform", 1]["cross_entropy"] != runs["uniform, generalised cross-entropy", 1]["cross_entropy"]
    )
    assert "| digits, 10% wrong | ours, left out | " in capsys.readouterr().out


def test_generalised_cross_entropy_is_between_two_losses():
    """Cross-entropy for q → 0, and 1 − p for q = 1 (Zhang & Sabuncu 2018)."""
    outputs = SimpleNamespace(logits=torch.randn(6, 4, dtype=torch.float64))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = outputs.logits.softmax(1)[torch.arange(6), labels]
    wanted = {1e-6: -p.log().mean(), 1.0: (1 - p).mean()}
    for q, loss in wanted.items():
        torch.testing.assert_close(suspects._generalised(outputs, labels, q=q), loss, rtol=1e-4, atol=1e-6)


def test_wrong_labels_are_wrong(small):
    task = small["digits"]
    train, wrong = with_wrong_labels(task, 0.25, seed=3)
    assert wrong.sum() == 24
    assert torch.equal(train["labels"] != task.train["labels"], wrong)
    assert 0 <= train["labels"].min() <= train["labels"].max() < 4
    assert not torch.equal(wrong, with_wrong_labels(task, 0.25, seed=4)[1])


def test_seconds_are_of_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
    path = tmp_path / "seconds.json"
    benchmark.main(["seconds", "--tasks", "digits", "--seeds", "2", "--output", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert [(run["task"], run["seed"]) for run in runs] == [("digits", 1), ("digits", 2)]
    assert all(run["ours"] > 0 < run["uniform"] for run in runs)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("digits: ")


def test_texts_are_grouped_where_there_are_texts():
    assert METHODS["uniform, grouped"].runs_at(1.0, of_texts=True)
    assert not METHODS["uniform, grouped"].runs_at(1.0, of_texts=False)
    assert not METHODS["ours"].runs_at(0.5, of_texts=True)
    assert METHODS["InfoBatch"].runs_at(0.5, of_texts=False)


def test_a_task_without_its_data_says_so(monkeypatch):
    monkeypatch.delenv("BENCHMARK_DATA", raising=False)
    for make in (from_scratch.fashion_mnist_task, pretrained.tweets_task):
        with pytest.raises(SystemExit, match="needs BENCHMARK_DATA=FOLDER, a folder with"):
            make()


# ---- what a step and a draw cost -------------------------------------------------------------------------------------


def test_overhead(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(overhead, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(overhead, "_EXAMPLES", 96)
    monkeypatch.setattr(overhead, "_WORDS", 50)
    monkeypatch.setattr(overhead.run, "__defaults__", (2, 0.01))  # pairs, seconds
    path = tmp_path / "overhead.json"
    models = ["BERT tiny", "ViT tiny", "GPT-2 tiny"]
    monkeypatch.setitem(overhead.MODELS, "GPT-2 tiny", (lambda: overhead._gpt2(8, 1, 8), 8))
    benchmark.main(["overhead", "--models", *models, "--workers", "0", "--output", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert {run["model"] for run in runs} == set(models)
    for run in runs:
        assert run["pairs"] == 2
        assert run["milliseconds"] > 0
        assert run["quartiles"][0] <= run["ratio"] <= run["quartiles"][1]
        assert set(run["peak_memory"]) == {"uniform", "ours"}
    assert "| GPT-2 tiny | " in capsys.readouterr().out


def test_ratios_are_taken_in_pairs(monkeypatch):
    """The second pair is on a machine that is twice as slow; its ratio is that of the first."""
    monkeypatch.setattr(overhead, "_peak_memory", lambda *_: 1)
    speed, calls = iter([1, 1, 1, 1, 2, 2, 3, 3]), []

    def train(model, name, which, workers, steps, folder):
        calls.append(which)
        return next(speed) * {"uniform": 0.010, "ours": 0.011}[which]

    monkeypatch.setattr(overhead, "_train", train)
    found = overhead.run("BERT tiny", 0, "CPU", pairs=3)
    assert calls[2:] == ["ours", "uniform", "uniform", "ours", "ours", "uniform"], "the order alternates"
    assert found["ratio"] == pytest.approx(1.1)
    assert found["quartiles"] == pytest.approx([1.1, 1.1])
    assert found["milliseconds"] == pytest.approx(20)
    assert found["extra_milliseconds"] == pytest.approx(2)


@pytest.mark.parametrize("sampler", draws.SAMPLERS)
def test_draws(sampler):
    found = draws.run(sampler, 1000)
    assert found["batch"] > 0
    assert ("bytes" in found) == sampler.startswith("ours")
    if "bytes" in found:
        assert found["bytes"] == pytest.approx(4 if "replacement" in sampler else 9, rel=0.1), "as the README says"
        assert found["plan"] > 0


def test_what_does_not_fit_is_left_out(monkeypatch, tmp_path, capsys):
    assert "16,777,216" in draws.run("torch.multinomial", 10**8)["left_out"]
    monkeypatch.setattr(draws.os, "sysconf", lambda name: 1000)
    assert "GB" in draws.run("RandomSampler", 10**6)["left_out"]
    monkeypatch.undo()
    monkeypatch.setattr(results, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(draws, "EXAMPLES", (1000,))
    monkeypatch.setattr(draws, "_BATCHES", 2)
    benchmark.main(["draws", "--output", str(tmp_path / "draws.json")])
    printed = capsys.readouterr().out
    for head in ("a batch of 32", "the first batch", "to plan a segment", "bytes per example"):
        assert head in printed
    assert "| ours, at the start | " in printed
