"""The benchmark of selective backward: cost by kept share, and families of models with dense detours."""

import json

import benchmark
import pytest
import torch
from benchmarks import backward, families
from small_tasks import use_same_process


@pytest.fixture
def tiny_models(monkeypatch):
    """Models of width 16 and three layers, each measured once, with two shares."""
    use_same_process(monkeypatch)
    monkeypatch.setattr(backward, "MODELS", {name: (16, 3) for name in backward.MODELS})
    monkeypatch.setattr(backward, "SHARES", (1.0, 0.25))
    monkeypatch.setattr(backward, "_REPETITIONS", 1)


@pytest.mark.usefixtures("tiny_models")
def test_all_ways_are_measured(tmp_path, capsys):
    path = tmp_path / "backward.json"
    models = ["BERT tiny", "ViT tiny"]
    command = ["backward", "--models", *models, "--batch", "8", "--tokens", "4", "--output", str(path)]
    benchmark.main(command)
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 6, "images have no padding"
    for run in runs:
        assert run["layers"] == 3
        assert run["kept"] == {"1.0": 1.0, "0.25": 0.25}
        assert set(run["ratios"]) == set(run["kept"])
        assert set(run["memory"]) == {"plain", *run["kept"]}
        assert run["detours"] == []
        assert 0 < run["share"] < 1
    printed = capsys.readouterr().out
    assert "| ideal |  | checkpointing |  | 1 | 1.00 | 0.44 |  |" in printed
    assert "| ViT tiny, 3 layers, " in printed


@pytest.mark.usefixtures("tiny_models")
def test_memory_is_that_of_activations():
    memory = {way: backward.run("ViT tiny", 3, 8, 16, way, backward.FULL, "CPU")["memory"] for way in backward.WAYS}
    assert memory[backward.RECOMPUTED]["plain"] < memory[backward.ROWS]["plain"], "checkpointing saves it"
    assert memory[backward.ROWS]["0.25"] == pytest.approx(memory[backward.ROWS]["plain"], rel=0.2)


def test_peak_is_that_of_tensors_at_one_time():
    kilobyte = 256

    def both():
        first = torch.ones(4 * kilobyte)
        second = torch.ones(4 * kilobyte)
        return first, second

    def one_after_the_other():
        for _ in range(2):
            torch.ones(4 * kilobyte)

    backward._peak_of(both)  # the first profile warms up
    expected = (8192, 4096) if not torch.cuda.is_available() else (0, 0)
    assert (backward._peak_of(both), backward._peak_of(one_after_the_other)) == expected


def test_natural_lengths_are_half_of_the_tokens():
    full, natural = (backward._batch("BERT tiny", 20, 16, lengths) for lengths in backward.LENGTHS)
    assert full["attention_mask"].all()
    assert natural["attention_mask"].double().mean() == pytest.approx(0.5, abs=0.05)
    assert natural["attention_mask"][-1].all(), "the longest has all"
    assert ((natural["input_ids"] > 0) == natural["attention_mask"].bool()).all()


def test_expected_cost_counts_the_rows_below_the_places():
    found = {"share": 0.5, "kept": {"0.25": 0.25}}
    assert backward._expected(found, 0.25) == 0.625
    assert backward.ideal(backward.ROWS, 1.0) == backward.ideal(backward.RECOMPUTED, 1.0) == 1


def test_families_are_listed_with_their_detours(tmp_path, capsys, monkeypatch):
    use_same_process(monkeypatch)
    path = tmp_path / "families.json"
    benchmark.main(["families", "--families", "BERT", "--output", str(path)])
    (run,) = json.loads(path.read_text())["runs"]
    assert run["model"] == "BertForSequenceClassification"
    assert run["detours"] == {}
    assert "| BERT | `BertForSequenceClassification` | none |" in capsys.readouterr().out
    assert "| X | `Y` | `aten.add.Tensor` |" in families.tables(
        [{"family": "X", "model": "Y", "detours": {"aten.add.Tensor": 6}}]
    )
    assert len(families.names()) > 20
