"""The benchmark of fine-tuning in seconds, on tiny encoders and data; its tables, for runs with simple figures."""

import json

import benchmark
import pytest
import torch
from benchmarks import fine_tuning, fine_tuning_tables, fine_tuning_tasks, networks, pairs, plot_seconds
from benchmarks.fine_tuning_methods import AS_MANY_SECONDS, METHODS, OURS, UNIFORM
from benchmarks.fine_tuning_tasks import TASKS, collate_texts
from benchmarks.task import IGNORED
from small_encoders import write_entities, write_models, write_photographs, write_texts
from small_tasks import use_same_process


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
    size = ["--examples", "32", "--layers", "1", "--epochs", "1"]  # of the same flags, the last one counts
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
        assert 0 <= run["accuracy"] <= 1 <= run["cores"]
        assert run["cross_entropy"] > 0 < run["backward_fraction"]
        assert ("f1" in run) == (run["task"] == "conll2003")
        assert str(tmp_path) not in json.dumps(run), "folders of a machine are not in the file"
    assert "| **snli** |" in capsys.readouterr().out
    assert str(tmp_path) not in path.read_text()


def test_all_methods_are_run(folders, tmp_path):
    """Three epochs of three steps of 16 of the 40 rows."""
    path, size = tmp_path / "runs.json", ["--layers", "2", "--epochs", "3", "--examples", "40"]
    runs = fill(folders, path, *size, "--tasks", "sst2", "conll2003", "--methods", *METHODS)
    assert [(run["task"], run["method"]) for run in runs] == [
        (task, method) for task in ("conll2003", "sst2") for method in sorted(METHODS)
    ]
    for run in runs:
        assert 0 < run["steps"] <= 6 or run["method"] == AS_MANY_SECONDS
        assert 0 < run["operations"] < 1.3 or run["method"] == AS_MANY_SECONDS
        assert run["share_of_steps"] == pytest.approx(run["steps"] / 6, abs=1e-4)
    found = {(run["task"], run["method"]): run for run in runs}
    uniform, ours, control = (found["sst2", name] for name in (UNIFORM, OURS, AS_MANY_SECONDS))
    assert control["steps"] == max(1, round(6 * ours["seconds"] / uniform["seconds"]))
    assert ours["steps"] == 6, "premise"
    assert found["sst2", "Trainer, as many steps"]["cross_entropy"] == uniform["cross_entropy"]
    assert control["cross_entropy"] != uniform["cross_entropy"], "control: other steps"


def test_methods_that_follow_ours_need_its_runs(folders):
    with pytest.raises(SystemExit, match="run these first"):
        fine_tuning.run("sst2", 1, 32, 1, 1, AS_MANY_SECONDS, *folders)


def test_methods_that_do_nothing_in_one_epoch_are_left_out():
    methods = [UNIFORM, "InfoBatch", "SeTa"]
    one, three = (fine_tuning.points(["sst2"], methods, [1], 100, epochs=epochs) for epochs in (1, 3))
    assert [point[-1] for point in one] == [UNIFORM, "SeTa"]
    assert [point[-1] for point in three] == methods


def test_networks_are_trained_from_scratch(folders, tmp_path):
    data, _ = folders
    path = tmp_path / "networks.json"
    size = ["--examples", "32", "--epochs", "1", "--seeds", "1", "--layers", "1"]
    benchmark.main(["networks", "--data", str(data), "--output", str(path), *size])
    runs = json.loads(path.read_text())["runs"]
    assert {run["task"] for run in runs} == set(networks.NETWORKS)
    assert len(runs) == 6
    names = [type(m).__name__ for m in networks.resnet_with_groups(1, 3).modules()]
    assert "BatchNorm2d" not in names
    assert names.count("GroupNorm") == [type(m).__name__ for m in networks.resnet(1, 3).modules()].count("BatchNorm2d")


def test_half_of_the_images_are_mirrored():
    images = torch.arange(6.0).view(1, 1, 2, 3).expand(400, 1, 2, 3)
    torch.manual_seed(0)
    flipped = networks.flipped({"pixel_values": images, "labels": 1})
    mirrored = (flipped["pixel_values"] == images.flip(-1)).flatten(1).all(1)
    assert ((flipped["pixel_values"] == images).flatten(1).all(1) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250
    assert flipped["labels"] == 1


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


def test_tweets_have_the_sign_of_their_score(folders):
    data, models = folders
    scores = [1.5, -0.2, 0.0, 3.0]
    (data / "tweets_sentiment").mkdir()
    for split in ("train", "test"):
        lines = ["text,score", *(f"film {i},{score}" for i, score in enumerate(scores))]
        (data / f"tweets_sentiment/{split}.csv").write_text("\n".join(lines) + "\n")
    material = TASKS["tweets"].read(data, models / "all-MiniLM-L6-v2", 4)
    assert [row["labels"] for row in material.test] == [1, 0, 0, 1]
    assert all(len(row["input_ids"]) > 2 for row in material.train), "the score is not the text"


def test_words_of_functions_have_their_kinds(folders, monkeypatch):
    monkeypatch.setattr(fine_tuning_tasks, "_FUNCTIONS_TESTED", 5)
    data, models = folders
    material = TASKS["functions"].read(data, models / "all-MiniLM-L6-v2", 20)
    assert (len(material.train), len(material.test)) == (20, 5)
    assert material.labels == sorted(material.labels)
    words = [label for row in material.train for label in row["labels"] if label != IGNORED]
    assert {material.labels[label] for label in words} >= {"keyword", "defined", "other name"}
    assert all(material.labels[row["labels"][1]] == "keyword" for row in material.train), "each starts with def"


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
        usual = {"layers": fine_tuning.RECIPES[task].layers, "epochs": fine_tuning.RECIPES[task].epochs}
        head = {"task": task, "examples": 4000, "seed": seed, "steps": 125, "share_of_steps": 1.0, **usual}
        uniform = {"seconds": 100.0 * seed, "accuracy": 0.8, "cross_entropy": 0.5}
        ours = {"seconds": (40 + 20 * seed) * seed, "accuracy": 0.76 + 0.03 * seed, "cross_entropy": 0.48 + 0.01 * seed}
        runs.append({**head, "method": UNIFORM, "backward_fraction": 1.0, "operations": 1.0, **uniform, **more})
        runs.append({**head, "method": OURS, "backward_fraction": 0.5, "operations": 0.75, **ours, **more})
    return runs


def by(method, runs, **changes):
    """The runs of ours as those of another method."""
    return [run | {"method": method} | changes for run in runs if run["method"] == OURS]


def test_table_has_ratios_and_differences_paired_by_seed():
    table = fine_tuning_tables.table(example_runs())
    ours = "| 6 | 4,000 × 1 | 2 | ImportanceTrainer | 150 | 70.0 ± 10.0 % | 75 % | 100 % | 50 % |"
    assert f"{ours} 80.00 | +0.50 ± 1.50 | 0.500 | −0.005 ± 0.005 |" in table
    runs = example_runs()
    worse = [run | ({"cross_entropy": 0.6} if run["method"] == OURS else {}) for run in runs]
    assert "+0.100 ± 0.000, worse |" in fine_tuning_tables.table(worse)
    unpaired = [run for run in runs if (run["seed"], run["method"]) != (2, UNIFORM)]
    assert "| 1 | ImportanceTrainer | 100 | 60.0 % | 75 % | 100 % | 50 % | 80.00 | −1.00 | 0.500 | −0.010 |" in (
        fine_tuning_tables.table(unpaired)
    )


def test_rows_are_in_the_order_of_the_tasks_and_have_other_methods():
    full = by("ImportanceTrainer, full backward", example_runs())
    runs = [*example_runs(task="conll2003", f1=0.9), *full, *example_runs()]
    rows = fine_tuning_tables.table(runs).splitlines()[2:]
    assert [row.split("**")[1] for row in rows] == ["sst2", "sst2", "conll2003"]
    assert "ImportanceTrainer, full backward" in rows[1]
    assert "| 90.00 | +0.00 ± 0.00 |" in rows[2], "entities are judged by F1"


def test_headline_has_parts_means_and_the_control_with_as_many_seconds():
    untouched, network = example_runs(task="tweets"), example_runs(task="vit")
    control = by(AS_MANY_SECONDS, example_runs(), accuracy=0.79, share_of_steps=0.7)
    table = fine_tuning_tables.headline_table([*example_runs(), *control, *untouched], network).splitlines()[2:]
    titles = [row.split("*")[1] for row in table if row.startswith("| *") and "**" not in row]
    assert titles == [pairs.LOOKED_AT, pairs.UNTOUCHED, pairs.FROM_SCRATCH]
    assert "**sst2**" in table[1]
    assert table[1].endswith("| −1.00 ± 0.00, worse |")
    assert "**mean of 1** |  |  | 70 % | 75 % | 100 % | 50 % |" in table[2]
    assert "**tweets**" in table[4]
    assert table[4].endswith("|  |"), "no control"
    assert "**vit**: CIFAR-10; ViT |" in table[7]
    assert "| 4,000 × 10 |" in table[7]


def test_minutes_of_both():
    minutes = fine_tuning_tables.minutes_table(example_runs())
    assert "| SST-2, sentiment; MiniLM | 2.5 | 1.8 | 70 % | +0.50 ± 1.50 points |  |" in minutes


def test_settings_with_the_most_examples_are_those_of_the_claim():
    fewer = example_runs(examples=2000, seconds=7.0)
    assert fine_tuning_tables.claim([*fewer, *example_runs()]) == fine_tuning_tables.claim(example_runs())
    assert fine_tuning_tables.claim(fewer) != fine_tuning_tables.claim(example_runs()), "control"
    two_layers = example_runs(layers=2, seconds=7.0)
    assert fine_tuning_tables.claim([*two_layers, *example_runs()]) == fine_tuning_tables.claim(example_runs())


def test_methods_are_compared_where_rivals_were_run():
    one, two = example_runs(seeds=(1,)), example_runs(seeds=(1,), task="banking77")
    rivals = [*by("VCAS-like", [*one, *two], seconds=90.0), *by("InfoBatch", two, seconds=80.0, accuracy=0.8)]
    elsewhere = example_runs(task="conll2003", f1=0.9)
    rows = fine_tuning_tables.methods_table([*one, *two, *rivals, *elsewhere]).splitlines()
    assert rows[0] == "| method | seconds | operations | points | sst2 | banking77 |"
    assert rows[2] == "| ImportanceTrainer | 60 % | 75 % | −1.00 | 60 %, −1.0 | 60 %, −1.0 |"
    assert rows[3] == "| VCAS-like | 90 % | 75 % | −1.00 | 90 %, −1.0 | 90 %, −1.0 |"
    assert rows[4] == "| InfoBatch | 90 % | 88 % | +0.00 | as `Trainer` | 80 %, +0.0 |", "nothing in one epoch"
    assert len(rows) == 5
    missing = [*one, *two, *by("VCAS-like", one), *by("InfoBatch", two)]
    assert pairs.means_of(missing, "VCAS-like") is None, "not run on all tasks"
    assert pairs.means_of([*one, *two, *by("VCAS-like", [*one, *two])], "InfoBatch") is None
    three = example_runs(seeds=(1,), task="cifar10")
    more = [*one, *two, *three, *by("VCAS-like", [*one, *two, *three]), *by("InfoBatch", two)]
    assert pairs.means_of(more, "InfoBatch") is None, "of two epochs, and not run there"


def test_methods_are_compared_in_the_setting_with_most_of_them():
    most, more_examples = example_runs(seeds=(1,)), example_runs(seeds=(1,), examples=5000)
    runs = [*most, *by("VCAS-like", most), *by("SeTa", most), *more_examples, *by("VCAS-like", more_examples)]
    assert {each.examples for each in pairs.compared_with_rivals(runs)} == {4000}


def test_methods_of_less_steps_are_judged_by_these():
    """Seconds of `Trainer` with fewer steps are not measured again: a step takes as long."""
    (found,) = pairs.pairs(
        [*example_runs(), *by(AS_MANY_SECONDS, example_runs(), share_of_steps=0.64)], [AS_MANY_SECONDS]
    )
    assert found.ratios == [0.64, 0.64]


def of_points(task, *points):
    """The pairs of a task with these differences in points."""
    runs = [({"accuracy": 0.5}, {"accuracy": 0.5 + each / 100}) for each in points]
    return pairs.Pairs(task, 6, 4000, 1, OURS, runs)


def test_worse_tasks_with_the_correction_of_holm():
    bad, weak, good = of_points("a", -1.0, -1.1, -0.9), of_points("b", -0.2, -0.1, 0.1), of_points("c", 0.1, 0.0, 0.2)
    assert pairs.worse_by_holm([bad, weak, good]) == ["a"]
    assert pairs.worse_by_holm([of_points("b", -0.2, -0.1, -0.02)]) == ["b"], "p = .08 of one task"
    assert pairs.worse_by_holm([of_points(name, -0.2, -0.1, -0.02) for name in "bcd"]) == [], "not of three"
    assert pairs.worse_by_holm([of_points("a", -5.0)]) == [], "one seed says nothing"
    assert pairs.worse_by_holm([of_points("a", 0.0, 0.0), of_points("b", -1.0, -1.0)]) == ["b"]


def test_claim_says_what_was_measured():
    one = fine_tuning_tables.claim(example_runs(seeds=(1,)))
    assert "takes 60 % of the seconds of `Trainer` on one task, with −1.00 points of accuracy. Measured" in one
    assert "(MiniLM), 4,000 examples, 1 epoch and 1 seed per task, in one thread of a CPU." in one
    entities = example_runs(seeds=(1, 2, 3), task="conll2003", f1=0.9)
    claim = fine_tuning_tables.claim([*example_runs(), *entities])
    assert "takes 75 % of the seconds of `Trainer` in the mean over 2 tasks, from 70 % to 80 %, with" in claim
    assert "+0.25 ± 0.75 points of accuracy or F1; with Holm's correction worse on none." in claim
    assert "2 to 3 seeds per task" in claim
    assert "no influence" not in claim
    images = fine_tuning_tables.claim(example_runs(task="cifar10"))
    assert "(DINOv2-small)" in images
    worse = [run | ({"accuracy": 0.7 - run["seed"] / 100} if run["method"] == OURS else {}) for run in example_runs()]
    assert "; with Holm's correction worse on SST-2, sentiment." in fine_tuning_tables.claim(worse)
    untouched = fine_tuning_tables.claim([*example_runs(), *example_runs(task="tweets", seconds=90.0)])
    assert "On the 1 task that had no influence on its constants: 100 %, +0.50 ± 1.50 points of accuracy." in untouched
    assert fine_tuning_tables.claim([]) == fine_tuning_tables.claims([], [], []) == ""
    assert fine_tuning_tables.claim(example_runs()[:1]) == "", "without pairs"


def test_claim_of_methods_compares_with_the_same_seconds():
    ours = [*example_runs(seeds=(1,)), *example_runs(seeds=(1,), task="banking77")]
    control = by(AS_MANY_SECONDS, ours, accuracy=0.77, share_of_steps=0.6)
    rivals = [*by("VCAS-like", ours, seconds=90.0), *by("SeTa", ours, seconds=80.0)]
    claim = fine_tuning_tables.claim_of_methods([*ours, *control, *rivals])
    assert "ends at −3.0 points, and ours at −1.0 (mean over 2 tasks with 4,000 examples, 1 seed)" in claim
    assert "ours takes 60 % of the seconds, and methods of others 80 % to 90 %." in claim
    assert fine_tuning_tables.claim_of_methods([*ours, *control]) == "", "without rivals"


def test_claim_of_networks():
    network = example_runs(task="vit", examples=12_000)
    claim = fine_tuning_tables.claim_of_networks(network)
    assert "take 70 % of the seconds on one task, with +0.50 ± 1.50 points of accuracy" in claim
    assert "(CIFAR-10, 12,000 images, 10 epochs)" in claim


def test_picture_has_a_bar_per_task_and_a_point_per_method(tmp_path):
    runs = [*example_runs(seeds=(1,)), *by("VCAS-like", example_runs(seeds=(1,)), seconds=90.0)]
    figure = plot_seconds.plot_seconds(runs, example_runs(task="vit"), tmp_path / "seconds.png")
    bars, points = figure.axes
    assert [text.get_text() for text in bars.get_yticklabels()] == ["SST-2, sentiment; MiniLM", "CIFAR-10; ViT"]
    assert {round(bar.get_width()) for bar in bars.patches} == {60, 70, 100}
    found = {text.get_text(): text.xy for text in points.texts}
    assert found["ours"] == pytest.approx((60, -1))
    assert found["VCAS-like"] == pytest.approx((90, -1))
    assert "1 tasks" in points.get_title(loc="left")
    assert (tmp_path / "seconds.png").stat().st_size > 1000
