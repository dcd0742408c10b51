"""The benchmarks: their arithmetic by hand, the rivals against their descriptions, grids of a few seconds."""

import json
import math
from concurrent.futures import Future
from dataclasses import replace

import benchmark
import pytest
import torch
from benchmarks import accuracy, draws, effective, label_errors, overhead, results, tasks
from benchmarks.methods import LOW, METHODS, InfoBatch, Method, Presampling, Rival, RivalTrainer, SeTa
from scipy.optimize import minimize


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Instead of the tasks one of a second: four clusters; and one with numbers to predict."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    columns = {
        "values": torch.randn(4, 8, generator=g)[labels] + 0.3 * torch.randn(96, 8, generator=g),
        "labels": labels,
    }
    numbers = {**columns, "labels": columns["values"].sum(1)}
    found = {
        "digits": tasks.Task(columns, columns, lambda: tasks.Perceptron(8, 16, 4), 4, 16, 1e-2),
        "image": tasks.Task(numbers, numbers, lambda: tasks.Perceptron(8, 16, 1), 4, 16, 1e-2),
    }
    for module in (accuracy, label_errors):
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
        assert found["steps"] == 24 * budget / cost
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
    """Of logits that are right up to a factor it is the cross-entropy of the right ones, whatever the factor."""
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


# ---- rivals ----------------------------------------------------------------------------------------------------------


def epochs(rival, number):
    return [rival.choose() for _ in range(number)]


def test_rival_is_uniform_reshuffling(small, tmp_path):
    index, weight = Rival(10, 4, 5).choose()
    assert sorted(index.tolist()) == list(range(10))
    assert set(weight.tolist()) == {1.0}


def test_infobatch_leaves_out_half_of_the_easy_and_weighs_the_rest():
    torch.manual_seed(0)
    rival = InfoBatch(100, 10, 80)
    assert len(rival.choose()[0]) == 100, "nothing is known"
    rival.observe(torch.arange(100), torch.cat([torch.zeros(60), torch.ones(40)]))
    total, visits = torch.zeros(100), 400
    for index, weight in epochs(rival, visits):
        assert len(index.unique()) == len(index)
        assert set(weight[index < 60].tolist()) == {2.0}
        assert set(weight[index >= 60].tolist()) == {1.0}
        assert (index >= 60).sum() == 40
        total.index_add_(0, index, weight)
    torch.testing.assert_close(total / visits, torch.ones(100), atol=0.2, rtol=0)  # 4 σ of a fair coin
    rival.step = 70
    assert len(rival.choose()[0]) == 100, "the last eighth has all"


def test_seta_slides_from_easy_to_hard():
    rival = SeTa(1000, 10, 800)
    assert len(rival.choose()[0]) == 1000
    rival.observe(torch.arange(1000), torch.arange(1000) // 100 + 0.0)
    rival.step = 1
    lowest = []
    for index, weight in epochs(rival, 7):
        assert 400 < len(index) < 500
        assert set(weight.tolist()) == {1.0}
        groups = (index // 100).unique().tolist()
        assert groups == list(range(groups[0], groups[0] + 5))
        lowest.append(groups[0])
    assert lowest == [0, 1, 2, 3, 4, 5, 0]


def test_low_solves_its_problem():
    g = torch.Generator().manual_seed(1)
    importance = torch.rand(8, generator=g) * 1.4
    weight = LOW(8, 8, 1).reweigh(torch.ones(8), importance).double()
    gain = importance.double() ** 2

    def lost(w):
        w = torch.from_numpy(w)
        return (0.1 * (w - 1).square().sum() - (w * gain).sum()).item()

    bounds, total = [(0, None)] * 8, {"type": "eq", "fun": lambda w: w.sum() - 8}
    best = minimize(lost, [1.0] * 8, bounds=bounds, constraints=[total], method="SLSQP", options={"ftol": 1e-12})
    torch.testing.assert_close(weight, torch.from_numpy(best.x), atol=1e-3, rtol=0)
    assert (weight == 0).any(), "control: the bound is reached"
    assert lost(weight.numpy()) < lost(torch.ones(8).double().numpy())


def test_presampling_is_unbiased():
    torch.manual_seed(0)
    rival = Presampling(12, 4, 100)
    importance = torch.tensor([0.1, 0.2, 0.3, 0.5, 1.0, 2.0])
    total, draws = torch.zeros(6), 4000
    for _ in range(draws):
        chosen, weight = rival.select(importance, importance)
        assert len(chosen) == 4
        total.index_add_(0, chosen, weight / 4)
    torch.testing.assert_close(total / draws * 6, torch.ones(6), atol=0.25, rtol=0)


def test_weights_reach_the_loss(small, tmp_path):
    """A rival that weighs all examples with nothing trains nothing; one that weighs them with 1 trains."""

    class Weighing(Rival):
        value = 0.0

        def reweigh(self, weight, importance):
            return weight * self.value

    for value, same in ((0.0, True), (1.0, False)):
        torch.manual_seed(0)
        task, rival = small["digits"], Weighing(96, 16, 6)
        rival.value = value
        model = task.model()
        before = [p.clone() for p in model.parameters()]
        arguments = task.arguments(str(tmp_path), 6, 1)
        arguments.weight_decay = 0.0
        rows = tasks.Rows(task.train)
        RivalTrainer(model, arguments, rival=rival, train_dataset=rows, data_collator=tasks.collate).train()
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)) == same
        assert rival.step == 6


# ---- tables ----------------------------------------------------------------------------------------------------------


def found_runs(gain=0.1):
    """Two methods, budgets and seeds, with figures that are easy to see through."""
    runs = []
    for method, more in (("uniform", 0.0), ("ours, all steps", gain)):
        for budget in (0.5, 1.0):
            for seed in (1, 2):
                value = budget / 2 + more + seed / 100
                run = {"task": "digits", "method": method, "budget": budget, "seed": seed, "steps": 1, "seconds": 1.0}
                runs.append(run | {"accuracy": value, "cross_entropy": 1 - budget / 2, "score": value})
    return runs


def test_budget_to_reach():
    curve = {0.5: 0.2, 1.0: 0.4, 1.5: 0.4}
    assert accuracy.budget_to_reach(curve, 0.3) == pytest.approx(0.75)
    assert accuracy.budget_to_reach(curve, 0.1) == 0.5, "as low as the grid tells"
    assert accuracy.budget_to_reach(curve, 0.41) == math.inf


def test_compute_to_match():
    """Uniform has 0.5 + seed at 1; ours has 0.35 + seed at 0.5 and 0.6 + seed at 1."""
    assert accuracy.compute_to_match(found_runs(), "digits", "uniform") == pytest.approx((1.0, 1.0, 1.0))
    assert accuracy.compute_to_match(found_runs(), "digits", "ours, all steps") == pytest.approx((0.8, 0.8, 0.8))
    assert accuracy.compute_to_match(found_runs(-0.1), "digits", "ours, all steps")[0] == math.inf
    assert accuracy.compute_to_match(found_runs(), "digits", "LOW") is None
    noisy = found_runs()
    for run in noisy:
        run["score"] += (run["seed"] - 1.5) * 0.1 * (run["method"] == "ours, all steps")
    value, low, high = accuracy.compute_to_match(noisy, "digits", "ours, all steps")
    assert low < value < high, "seeds that differ make an interval"


def test_tables(tmp_path, capsys):
    path = tmp_path / "accuracy.json"
    results.save(path, results.load(path) | {"runs": found_runs()}, accuracy.KEYS)
    benchmark.main(["accuracy", "--show", "--output", str(path)])
    printed = capsys.readouterr().out
    assert "| digits | uniform | 26.50 ± 0.50 (0.750) | 51.50 ± 0.50 (0.500) |" in printed
    assert "| digits | ours, all steps | 36.50 ± 0.50 (0.750) | 61.50 ± 0.50 (0.500) |" in printed
    assert "| ours, all steps | 0.80 (0.80–0.80) |" in printed
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "| uniform | 2.0 | 2.0 |\n| ours, all steps | 1.0 | 1.0 |" in printed
    details = path.with_suffix(".md").read_text()
    assert "| digits | ours, all steps | 36.50" in details
    assert "| seconds, budget 1 | digits |\n|---|---|\n| uniform | 1.0 |" in details


def ended_runs():
    """Of what ends by itself, two seeds: on the digits as good as uniform, on the image worse."""
    figures = {
        "uniform": (100, {"accuracy": 0.8, "cross_entropy": 0.5}, 0.01),
        "ours": (60, {"accuracy": 0.81, "cross_entropy": 0.49}, 0.012),
        "uniform, as many steps": (60, {"accuracy": 0.7, "cross_entropy": 0.6}, 0.02),
        "uniform, as many, raised": (60, {"accuracy": 0.75, "cross_entropy": 0.6}, 0.02),
    }
    runs = []
    for method, (steps, reached, error) in figures.items():
        for seed in (1, 2):
            head = {"method": method, "budget": 1.0, "seed": seed, "seconds": steps / 10}
            more = {"scaled_cross_entropy": 0.4, "score": reached["accuracy"]}
            accurate = reached | {"accuracy": reached["accuracy"] + 0.01 * seed}
            runs.append({"task": "digits", "steps": steps, **head, **accurate, **more})
            runs.append({"task": "image", "steps": 2 * steps + 20 * seed, **head, "error": error, "score": -error})
    return runs


def test_tables_of_what_ends_when_enough_was_learnt():
    runs = ended_runs() + found_runs()[:2]  # which are of another budget
    table = effective.tables(runs)
    assert "| digits | uniform | 1.00 | 81.50 ± 0.50 | 0.500 ± 0.000 | 0.400 ± 0.000 | 10.0 |" in table
    assert "| digits | ours | 0.60 | 82.50 ± 0.50 | 0.490 ± 0.000 | 0.400 ± 0.000 | 6.0 |" in table
    assert "| digits | uniform, as many steps | 0.60 | 71.50" in table
    assert "| image | ours | 0.65 | error 1.20e-02 ± 0.00e+00 |  |  | 6.0 |" in table
    claims = effective.claims(runs)
    assert "took 63 % of the steps in the mean over 2 tasks, from 60 % (digits) to 65 % (image)" in claims
    assert "On 1 of them" in claims
    assert "it was: image (error by 20.0 ± 0.0 %)." in claims
    assert claims.endswith("was behind it on 2 of the 2.")
    better = [run | ({"score": 0.9} if run["method"].endswith("raised") else {}) for run in runs]
    assert effective.claims(better).endswith("was behind it on 0 of the 2."), "control"
    for run in runs:
        if run.get("error") == 0.012:
            run["error"] = 0.01
    assert "On none" in effective.claims(runs), "control"
    assert effective.short_of_uniform(runs, "digits") == []
    runs = [run | {"accuracy": 0.8} if run["task"] == "digits" and run["method"] == "ours" else run for run in runs]
    assert effective.short_of_uniform(runs, "digits") == ["accuracy by 1.50 ± 0.50 points"]
    assert effective.tables([run for run in runs if run["method"] != "ours"]).count("\n") == 1, "nothing to compare"
    one = [run for run in runs if run["seed"] == 1 or (run["method"] == "uniform" and run["task"] == "digits")]
    assert effective.tables(one).count("\n") == 1, "of one seed there is no error"


# ---- grids -----------------------------------------------------------------------------------------------------------


class SameProcess:
    """Runs at once what a pool of processes would: those would not see the small tasks."""

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
    grid = ["--tasks", "digits", "--methods", "uniform", "LOW", "--budgets", "0.5", "1.0", "--output", str(path)]
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


def test_wrong_labels_are_wrong(small):
    task = small["digits"]
    train, wrong = tasks.with_wrong_labels(task, 0.25, seed=3)
    assert wrong.sum() == 24
    assert torch.equal(train["labels"] != task.train["labels"], wrong)
    assert 0 <= train["labels"].min() <= train["labels"].max() < 4
    assert not torch.equal(wrong, tasks.with_wrong_labels(task, 0.25, seed=4)[1])


def test_a_task_without_its_data_says_so(monkeypatch):
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    with pytest.raises(SystemExit, match="need FASHION_MNIST=PATH"):
        tasks.fashion_mnist_task()


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
