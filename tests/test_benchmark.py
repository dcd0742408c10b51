"""The benchmark: a grid of a few seconds, its file of results, and what is made of it."""

import json

import benchmark
import pytest
import torch


def small(_):
    torch.manual_seed(0)
    columns = {"pixel_values": torch.randn(64, 784), "labels": torch.arange(64) % 10}
    return benchmark.Task(columns, columns, benchmark.Perceptron, epochs=4, batch=16, learning_rate=1e-3)


def test_a_run_has_the_steps_of_its_budget():
    for budget, steps in ((1.0, 16), (0.5, 8), (0.3, 8)):
        for method in ("uniform", "importance, pruning 10 %"):
            found = benchmark.run(small(None), benchmark.METHODS[method], budget, seed=1)
            assert found["steps"] == steps
            assert 0 <= found["accuracy"] <= 1
            assert found["cross_entropy"] > 0
            assert ("pruned" in found) == (method != "uniform")


def test_runs_are_repeatable():
    first, second = (benchmark.run(small(None), {}, 1.0, seed=3) for _ in range(2))
    assert first["cross_entropy"] == second["cross_entropy"]
    assert first["cross_entropy"] != benchmark.run(small(None), {}, 1.0, seed=4)["cross_entropy"], "control"


@pytest.fixture
def results(tmp_path):
    """Two methods, budgets and seeds, with figures that are easy to see through."""
    found = benchmark._load(tmp_path / "accuracy.json")
    for method, gain in (("uniform", 0.0), ("importance", 0.1)):
        for budget in (0.5, 1.0):
            for seed in (1, 2):
                run = {"task": "digits", "method": method, "budget": budget, "seed": seed}
                run |= {"accuracy": budget / 2 + gain + seed / 100, "cross_entropy": 1 - budget / 2}
                found["runs"].append(run)
    benchmark._save(tmp_path / "accuracy.json", found)
    return tmp_path / "accuracy.json"


def test_table_and_plot(results, capsys):
    benchmark.main(["plot", "--output", str(results)])
    printed = capsys.readouterr().out
    assert "| digits | uniform | 0.2650 ± 0.0050 (0.750) | 0.5150 ± 0.0050 (0.500) |" in printed
    assert "| digits | importance | 0.3650 ± 0.0050 (0.750) | 0.6150 ± 0.0050 (0.500) |" in printed
    assert results.with_suffix(".png").stat().st_size > 1000


def test_what_is_there_is_not_run_again(results, capsys):
    arguments = ["--methods", "uniform", "--budgets", "0.5", "1.0", "--seeds", "2", "--tasks", "digits"]
    before = results.read_text()
    benchmark.main(["accuracy", *arguments, "--output", str(results)])
    assert "4 of 4 runs are in" in capsys.readouterr().out
    assert results.read_text() == before
    assert json.loads(before)["format"] == benchmark.FORMAT


def test_a_task_without_its_data_says_so():
    with pytest.raises(SystemExit, match="needs --fashion_mnist PATH"):
        benchmark.fashion_mnist_task(benchmark.argparse.Namespace(fashion_mnist=None))
