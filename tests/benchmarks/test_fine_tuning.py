"""The benchmark of fine-tuning in seconds, on tiny encoders and data; its tables, for runs with simple figures."""

import json

import benchmark
import pytest
import torch
from benchmarks import fine_tuning, fine_tuning_tables
from benchmarks.fine_tuning_tasks import TASKS, collate_texts
from benchmarks.task import IGNORED
from small_encoders import write_entities, write_models, write_photographs, write_texts
from small_tasks import use_same_process

UNIFORM, OURS = fine_tuning.UNIFORM, fine_tuning.OURS


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of data and models; trainings run in this process."""
    use_same_process(monkeypatch)
    data, models = tmp_path / "data", tmp_path / "models"
    for write in (write_texts, write_entities, write_photographs):
        write(data)
    write_models(models)
    yield data, models
    fine_tuning._material.cache_clear()


def fill(folders, path, *more):
    data, models = folders
    size = ["--examples", "32", "--layers", "1", "--epochs", "1"]
    benchmark.main(
        [
            "fine_tuning",
            "--data",
            str(data),
            "--models",
            str(models),
            "--output",
            str(path),
            *size,
            "--seeds",
            "1",
            *more,
        ]
    )
    return json.loads(path.read_text())["runs"]


def test_both_trainers_are_run_on_all_kinds_of_tasks(folders, tmp_path, capsys):
    path, tasks = tmp_path / "runs.json", ["sst2", "snli", "banking77", "conll2003", "cifar10"]
    runs = fill(folders, path, "--tasks", *tasks)
    assert {(run["task"], run["method"]) for run in runs} == {
        (task, name) for task in tasks for name in (UNIFORM, OURS)
    }
    for run in runs:
        assert run["layers"] == run["epochs"] == run["steps"] == 1
        assert run["seconds"] > 0 < run["wall_seconds"]
        assert 0 <= run["accuracy"] <= 1 < run["cores"] + 1
        assert run["cross_entropy"] > 0 < run["backward_fraction"]
        assert ("f1" in run) == (run["task"] == "conll2003")
        assert str(tmp_path) not in json.dumps(run), "folders of a machine are not in the file"
    assert "| **snli**: " in capsys.readouterr().out
    assert str(tmp_path) not in path.read_text()


def test_finished_runs_are_skipped(folders, tmp_path, capsys):
    path = tmp_path / "runs.json"
    (first,) = fill(folders, path, "--tasks", "sst2", "--methods", UNIFORM)
    capsys.readouterr()
    runs = fill(folders, path, "--tasks", "sst2")
    assert "1 of 2 runs are in" in capsys.readouterr().out
    assert first in runs
    assert len(runs) == 2


def test_the_first_batch_is_the_same_for_both(folders):
    """Both have the same weights, and the same examples if training ends after a step of all of them."""
    found = [fine_tuning.run("sst2", 1, 32, 1, 3, name, *folders) for name in (UNIFORM, OURS)]
    assert found[0]["cross_entropy"] == pytest.approx(found[1]["cross_entropy"], abs=1e-4)
    other = fine_tuning.run("sst2", 1, 32, 1, 4, UNIFORM, *folders)
    assert abs(other["cross_entropy"] - found[0]["cross_entropy"]) > 1e-3, "control: another seed"


def test_folders_and_enough_examples_are_needed(folders, tmp_path, monkeypatch):
    for name in ("BENCHMARK_DATA", "BENCHMARK_MODELS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="--data and --models"):
        benchmark.main(["fine_tuning", "--output", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="there are 40 examples, fewer than the 41"):
        fine_tuning.run("sst2", 1, 41, 1, 1, UNIFORM, *folders)


def test_order_of_the_methods_changes_with_the_seed():
    points = fine_tuning.points(["sst2", "banking77"], [UNIFORM, OURS], [1, 2], examples=100, layers=None)
    assert [point[-1] for point in points] == [UNIFORM, OURS, UNIFORM, OURS, OURS, UNIFORM, OURS, UNIFORM]
    assert points[0] == ("sst2", 6, 100, 1, 1, UNIFORM)
    assert points[2][:4] == ("banking77", 6, 100, 3), "epochs of the task"


# ---- data ------------------------------------------------------------------------------------------------------------


def test_texts_have_their_own_length_and_label(folders):
    data, models = folders
    texts = write_texts(data)
    material = TASKS["sst2"].read(data, models / "all-MiniLM-L6-v2", 40)
    batch = material.collate(material.test)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert [length - 2 for length in lengths] == [len(text.split()) for text in texts]
    assert batch["input_ids"].shape[1] == max(lengths)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert batch["labels"].tolist() == [i % 2 for i in range(40)]
    pair = TASKS["snli"].read(data, models / "all-MiniLM-L6-v2", 40).test[0]["input_ids"]
    assert len(pair) > len(material.test[0]["input_ids"]), "both texts"
    assert TASKS["banking77"].read(data, models / "all-MiniLM-L6-v2", 40).labels == ["kind 0", "kind 1", "kind 2"]


def test_entities_have_a_label_at_the_first_token_of_each_word(folders):
    data, models = folders
    material = TASKS["conll2003"].read(data, models / "all-MiniLM-L6-v2", 40)
    assert material.labels == ["B-PER", "I-PER", "O"]
    for i, row in enumerate(material.test[:3]):
        labels = [label for label in row["labels"] if label != IGNORED]
        assert labels == [0, *[1] * (2 - i), 2]
        assert row["labels"][0] == row["labels"][-1] == IGNORED, "[CLS] and [SEP]"
    short, long = collate_texts([{"input_ids": [1], "labels": [2]}, {"input_ids": [1, 3], "labels": [2, 0]}])["labels"]
    assert (short.tolist(), long.tolist()) == ([2, IGNORED], [2, 0])


def test_images_are_normalised_and_enlarged(folders):
    data, models = folders
    material = TASKS["cifar10"].read(data, models / "dinov2-small", 40)
    batch = material.collate(material.test[:2])
    assert batch["pixel_values"].shape == (2, 3, 56, 56)
    expected = (torch.tensor([0.0, 200 / 255]) - 0.485) / 0.229
    torch.testing.assert_close(batch["pixel_values"][:, 0, 5, 5], expected)


def test_f1_counts_whole_entities():
    tags = ["B-PER", "I-PER", "O", "B-LOC"]
    assert fine_tuning.entity_f1([(tags, tags)]) == 1
    assert fine_tuning.entity_f1([(tags, ["O"] * 4)]) == 0
    assert fine_tuning.entity_f1([(tags, ["B-PER", "O", "O", "B-LOC"])]) == 0.5, "half of an entity is wrong"
    assert fine_tuning.entity_f1([(["O"], ["O"])]) == 1
    assert fine_tuning.entities_of(["I-PER", "I-LOC", "B-LOC"]) == {("PER", 0, 1), ("LOC", 1, 2), ("LOC", 2, 3)}


# ---- tables ----------------------------------------------------------------------------------------------------------


def example_runs(seeds=(1, 2), task="sst2", **more):
    """Ours takes 60 and 80 % of the seconds, with accuracies .01 lower and .02 higher."""
    runs = []
    for seed in seeds:
        head = {"task": task, "layers": 6, "examples": 4000, "epochs": 1, "seed": seed, "share_of_steps": 1.0}
        uniform = {"seconds": 100.0 * seed, "accuracy": 0.8, "cross_entropy": 0.5, "backward_fraction": 1.0}
        ours = {"seconds": (40 + 20 * seed) * seed, "accuracy": 0.76 + 0.03 * seed, "cross_entropy": 0.48 + 0.01 * seed}
        runs.append({**head, "method": UNIFORM, **uniform, **more})
        runs.append({**head, "method": OURS, "backward_fraction": 0.5, **ours, **more})
    return runs


def test_table_has_ratios_and_differences_paired_by_seed():
    table = fine_tuning_tables.table(example_runs())
    ours = "| 6 | 4,000 × 1 | 2 | ImportanceTrainer | 150 | 70.0 ± 10.0 % | 100 % | 50 % |"
    assert f"{ours} 80.00 | +0.50 ± 1.50 | 0.500 | −0.005 ± 0.005 |" in table
    runs = example_runs()
    worse = [run | ({"cross_entropy": 0.6} if run["method"] == OURS else {}) for run in runs]
    assert "+0.100 ± 0.000, worse |" in fine_tuning_tables.table(worse)
    unpaired = [run for run in runs if (run["seed"], run["method"]) != (2, UNIFORM)]
    assert "| 1 | ImportanceTrainer | 100 | 60.0 % | 100 % | 50 % | 80.00 | −1.00 | 0.500 | −0.010 |" in (
        fine_tuning_tables.table(unpaired)
    )


def test_rows_are_in_the_order_of_the_tasks_and_have_other_methods():
    full = [run | {"method": "ImportanceTrainer, full backward"} for run in example_runs() if run["method"] == OURS]
    runs = [*example_runs(task="conll2003", f1=0.9), *full, *example_runs()]
    rows = fine_tuning_tables.table(runs).splitlines()[2:]
    assert [row.split("**")[1] for row in rows] == ["sst2", "sst2", "conll2003"]
    assert "ImportanceTrainer, full backward" in rows[1]
    assert "| 90.00 | +0.00 ± 0.00 |" in rows[2], "entities are judged by F1"


def test_claim_says_what_was_measured():
    one = fine_tuning_tables.claim(example_runs(seeds=(1,)))
    assert "takes 60 % of the seconds of `Trainer` on one task, with −1.00 points of accuracy." in one
    assert "(MiniLM), 4,000 examples, 1 epoch and 1 seed per task, in one thread of a CPU." in one
    entities = example_runs(seeds=(1, 2, 3), task="conll2003", f1=0.9)
    claim = fine_tuning_tables.claim([*example_runs(), *entities])
    assert "takes 75 % of the seconds of `Trainer` in the mean over 2 tasks, from 70 % to 80 %, with" in claim
    assert "+0.25 ± 0.75 points of accuracy or F1." in claim
    assert "2 to 3 seeds per task" in claim
    images = fine_tuning_tables.claim(example_runs(task="cifar10"))
    assert "(DINOv2-small)" in images
    assert fine_tuning_tables.claim([]) == fine_tuning_tables.claims([], []) == ""
    assert fine_tuning_tables.claim(example_runs()[:1]) == "", "without pairs"
