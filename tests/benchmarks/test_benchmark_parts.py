"""The benchmarks of label errors, suspects, reuse, seconds, overhead and draws, on small grids."""

import json
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmarks import draws, label_errors, overhead, reuse, suspects
from small_tasks import use_same_process, use_small_tasks


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    use_small_tasks(monkeypatch)
    use_same_process(monkeypatch)
    reuse._kept.cache_clear()


def test_label_errors_benchmark_ranks_wrong_labels_first(tmp_path, capsys):
    pytest.importorskip("cleanlab")
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


def test_suspects_benchmark_runs_all_methods(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suspects, "CASES", (("digits", 0.1),))
    path = tmp_path / "suspects.json"
    benchmark.main(["suspects", "--seeds", "2", "--output", str(path)])
    runs = {(run["method"], run["seed"]): run for run in json.loads(path.read_text())["runs"]}
    assert len(runs) == 2 * len(suspects.METHODS)
    assert runs["uniform", 1]["flagged"] == runs["ours", 1]["flagged"] == 0
    assert runs["uniform, without the flagged", 1]["flagged"] > 0
    uniform, generalised = runs["uniform", 1], runs["uniform, generalised cross-entropy", 1]
    assert uniform["accuracy"] != generalised["accuracy"] or (uniform["cross_entropy"] != generalised["cross_entropy"])
    assert "| digits, 10% wrong | ours, left out | " in capsys.readouterr().out


def test_reuse_benchmark_starts_from_a_training_with_another_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reuse, "CASES", (("digits", 64, 5),))
    starts, trained = {}, reuse._trained

    def recorded(task, seed, method, start=None):
        starts[seed, method, task.learning_rate] = start
        return trained(task, seed, method, start)

    monkeypatch.setattr(reuse, "_trained", recorded)
    path = tmp_path / "reuse.json"
    benchmark.main(["reuse", "--seeds", "2", "--output", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 2 * sum(len(methods) for methods in reuse.RATES.values())
    assert all(run["of_steps"] == 20 for run in runs), "64 examples in batches of 16"
    assert {key for key, start in starts.items() if start is None} == {
        *((seed, method, 1e-2) for seed in (1, 2) for method in (reuse.UNIFORM, reuse.OURS)),
        *((seed, reuse.OURS, 5e-3) for seed in (1, 2)),
        *((seed, reuse.OURS, 1e-2) for seed in (1001, 1002)),
    }
    kept = [starts[1, method, 1e-2] for method in reuse.KEPT]
    assert all(importance.isfinite().all() and len(importance) == 64 for importance in kept)
    assert torch.equal(starts[1, "mean", 5e-3], kept[1])
    assert len({importance.sum().item() for importance in kept}) == 3, "control: they differ"
    printed = capsys.readouterr().out
    assert "| digits | 64, 5 | 1 | (`Trainer`) | 1.000 | " in printed
    assert "| digits | 64, 5 | 0.5 | the mean of its first three passes | " in printed


def test_generalised_cross_entropy_has_the_limits_of_the_paper():
    """Cross-entropy for q → 0, and 1 − p for q = 1 (Zhang & Sabuncu 2018)."""
    outputs = SimpleNamespace(logits=torch.randn(6, 4, dtype=torch.float64))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = outputs.logits.softmax(1)[torch.arange(6), labels]
    for q, expected in {1e-6: -p.log().mean(), 1.0: (1 - p).mean()}.items():
        torch.testing.assert_close(suspects._generalised(outputs, labels, q=q), expected, rtol=1e-4, atol=1e-6)


def test_seconds_of_both_trainers_are_measured(tmp_path, capsys):
    path = tmp_path / "seconds.json"
    benchmark.main(["seconds", "--tasks", "digits", "--seeds", "2", "--output", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert [(run["task"], run["seed"]) for run in runs] == [("digits", 1), ("digits", 2)]
    assert all(run["ours"] > 0 < run["uniform"] for run in runs)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("digits: ")


# ---- overhead of a step ----------------------------------------------------------------------------------------------


def test_overhead_benchmark_measures_time_and_memory(tmp_path, capsys, monkeypatch):
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


def test_overhead_is_the_median_ratio_of_alternating_pairs(monkeypatch):
    """The machine is twice as slow during the second pair, and three times during the third."""
    monkeypatch.setattr(overhead, "_peak_memory", lambda *_: 1)
    slowness, calls = iter([1, 1, 1, 1, 2, 2, 3, 3]), []

    def train(model, name, which, workers, steps, folder):
        calls.append(which)
        return next(slowness) * {"uniform": 0.010, "ours": 0.011}[which]

    monkeypatch.setattr(overhead, "_train", train)
    run = overhead.run("BERT tiny", 0, "CPU", pairs=3)
    assert calls[2:] == ["ours", "uniform", "uniform", "ours", "ours", "uniform"], "the order alternates"
    assert run["ratio"] == pytest.approx(1.1)
    assert run["quartiles"] == pytest.approx([1.1, 1.1])
    assert run["milliseconds"] == pytest.approx(20)
    assert run["extra_milliseconds"] == pytest.approx(2)


# ---- cost of a draw --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", draws.SAMPLERS)
def test_draws_benchmark_measures_time_and_memory(sampler):
    run = draws.run(sampler, 1000)
    assert run["batch"] > 0
    assert ("bytes" in run) == sampler.startswith("ours")
    if "bytes" in run:
        expected = 4 if "replacement" in sampler else 18
        assert run["bytes"] == pytest.approx(expected, rel=0.1), "hf_importance/README.md has the same number"
        assert run["plan"] > 0


def test_draws_omit_what_exceeds_memory_or_limits(monkeypatch, tmp_path, capsys):
    assert "16,777,216" in draws.run("torch.multinomial", 10**8)["left_out"]
    with monkeypatch.context() as patch:
        patch.setattr(draws.os, "sysconf", lambda name: 1000)
        assert "GB" in draws.run("RandomSampler", 10**6)["left_out"]
    monkeypatch.setattr(draws, "EXAMPLES", (1000,))
    monkeypatch.setattr(draws, "_BATCHES", 2)
    benchmark.main(["draws", "--output", str(tmp_path / "draws.json")])
    printed = capsys.readouterr().out
    for heading in ("a batch of 32", "the first batch", "to plan a segment", "bytes per example"):
        assert heading in printed
    assert "| ours, at the start | " in printed
