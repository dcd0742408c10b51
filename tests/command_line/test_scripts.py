"""The classification scripts and `compare_runs` run offline, a few steps each, called through their `main`."""

import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import benchmark
import compare_runs
import datasets
import numpy as np
import pytest
import run_image_classification
import run_text_classification
import torch
from PIL import Image
from runs import data_arguments, flags, predictions, results, write
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_importance
from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.command_line.arguments import ModelArguments
from hf_importance.command_line.embedded_data import docstrings
from hf_importance.command_line.fine_tuning import script

CALM = "The food was calm and good, the waiter calm too."
ANGRY = "Never again! Cold soup, angry people."


def reviews(n=12):
    return [{"text": f"{ANGRY if i % 3 else CALM} Table {i}.", "label": "bad" if i % 3 else "good"} for i in range(n)]


# ---- embedded data and settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), [("importance", ImportanceTrainer), ("uniform", Trainer)])
@pytest.mark.parametrize("module", [run_text_classification, run_image_classification], ids=["text", "image"])
def test_embedded_data(tmp_path, capsys, module, name, cls):
    few = {"max_train_samples": 60, "max_eval_samples": 30, "logging_steps": 1}
    trainer = module.main(flags(tmp_path, trainer=name, eval_strategy="steps", eval_steps=2, **few))
    assert type(trainer) is cls
    assert trainer.state.global_step == 3
    found = results(tmp_path)
    assert found["trainer"] == name
    assert (found["examples_per_epoch"], found["examples_processed"]) == (60, 12)
    assert 0 <= found["eval_accuracy"] <= 1
    assert found["seconds_of_training"] > 0
    assert f"The model was saved in {tmp_path / 'run'}" in capsys.readouterr().out
    assert any("importance/mean" in log for log in trainer.state.log_history) == (name == "importance")
    text = module is run_text_classification
    auto = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    saved = auto.from_pretrained(tmp_path / "run")
    assert saved.config.problem_type == "single_label_classification"
    assert saved.config.num_labels == (11 if text else 10)
    for mine, theirs in zip(trainer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_flags_set_the_importance_config(tmp_path):
    more = {"budget": 0.5, "sampling": "replacement", "uniform_fraction": 0.4, "seed": 5, "max_train_samples": 40}
    trainer = run_image_classification.main(flags(tmp_path, max_eval_samples=10, **more))
    config = trainer.importance_config
    assert (config.budget, config.sampling, config.uniform_fraction) == (0.5, "replacement", 0.4)
    assert len(trainer.get_train_dataloader()) == 5
    assert results(tmp_path)["examples_processed"] == 12


def test_importance_config_from_a_file(tmp_path):
    """Flags take precedence over the file, and the file over the defaults."""
    ImportanceConfig(budget=0.5, uniform_fraction=0.6, metric="loss", seed=7).save_pretrained(tmp_path)
    more = {"importance_config": tmp_path, "metric": "logit_gradient", "max_train_samples": 40, "max_eval_samples": 10}
    trainer = run_image_classification.main(flags(tmp_path, **more))
    assert trainer.importance_config == ImportanceConfig(budget=0.5, uniform_fraction=0.6, seed=7)
    assert ImportanceConfig.from_pretrained(tmp_path / "run") == trainer.importance_config


@pytest.mark.parametrize("module", [run_text_classification, run_image_classification], ids=["text", "image"])
def test_report(tmp_path, capsys, module):
    """The report shows the original texts and images, not the inputs of the model."""
    module.main([*flags(tmp_path, max_train_samples=40, max_eval_samples=10), "--report"])
    folder = tmp_path / "run" / "_importance_report"
    assert f"The report was saved as {folder / 'report.html'}" in capsys.readouterr().out
    if module is run_text_classification:
        with (folder / "hardest.csv").open(encoding="utf-8", newline="") as file:
            shown = list(csv.DictReader(file))
        texts = docstrings()["train"]["text"]
        assert len(shown) == 12, "the examples visited in three steps"
        assert all(row["text"] == texts[int(row["index"])] or len(row["text"]) == 500 for row in shown)
    else:
        assert (folder / "hardest.png").exists()
    with pytest.raises(ValueError, match="--report needs --do_train, --trainer importance"):
        module.main([*flags(tmp_path, trainer="uniform", max_train_samples=40), "--report"])


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_text_files(tmp_path, kind):
    files = {
        "train_file": write(tmp_path / f"train.{kind}", reviews()),
        "validation_file": write(tmp_path / f"validation.{kind}", reviews(4)),
        "test_file": write(tmp_path / f"test.{kind}", reviews(5)),
    }
    trainer = run_text_classification.main(
        [*flags(tmp_path, **files), "--do_train", "--do_eval", "--do_predict", "--learning_rate", "0.01"]
    )
    assert trainer.model.config.label2id == {"bad": 0, "good": 1}
    assert trainer.importances.isfinite().sum() == 12
    assert len(predictions(tmp_path)) == 5
    assert set(predictions(tmp_path)) <= {"bad", "good"}
    assert {"eval_accuracy", "eval_f1", "predict_accuracy", "predict_f1"} <= set(results(tmp_path))


def test_model_from_a_folder(tmp_path):
    train = write(tmp_path / "train.csv", reviews())
    first = run_text_classification.main([*flags(tmp_path, train_file=train), "--do_train"])
    again = run_text_classification.main(
        [*flags(tmp_path, model_name_or_path=tmp_path / "run", test_file=train), "--do_predict"]
    )
    expected = first.predict(first.train_dataset).predictions.argmax(-1)
    assert predictions(tmp_path) == [["bad", "good"][k] for k in expected]
    assert not again.args.do_train


def test_prediction_without_labels(tmp_path):
    train = write(tmp_path / "train.csv", reviews())
    test = write(tmp_path / "test.csv", [{"text": CALM}, {"text": ANGRY}])
    files = {"train_file": train, "test_file": test}
    run_text_classification.main([*flags(tmp_path, **files), "--do_train", "--do_predict"])
    together = predictions(tmp_path)
    run_text_classification.main(
        [*flags(tmp_path, model_name_or_path=tmp_path / "run", test_file=test), "--do_predict"]
    )
    assert predictions(tmp_path) == together
    assert set(together) <= {"bad", "good"}


def test_labels_keep_the_ids_of_the_trained_model(tmp_path):
    """Also if the data only has one of the labels, or class labels in another order."""
    train = write(tmp_path / "train.json", [{"text": f"{CALM} {i}", "label": [7, 12, 3][i % 3]} for i in range(12)])
    run_text_classification.main([*flags(tmp_path, train_file=train), "--do_train"])
    saved = {"model_name_or_path": tmp_path / "run"}
    few = write(tmp_path / "few.json", [{"text": CALM, "label": 12}, {"text": ANGRY, "label": 12}])
    trainer = run_text_classification.main([*flags(tmp_path, **saved, validation_file=few), "--do_eval"])
    assert trainer.model.config.label2id == {"3": 0, "7": 1, "12": 2}
    assert trainer.eval_dataset["labels"][:] == [2, 2]
    named = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["12", "3", "7"]))
    datasets.Dataset.from_list([{"text": CALM, "label": 0}], features=named).to_parquet(tmp_path / "named.parquet")
    trainer = run_text_classification.main(
        [*flags(tmp_path, **saved, validation_file=tmp_path / "named.parquet"), "--do_eval"]
    )
    assert trainer.eval_dataset["labels"][:] == [2]
    unknown = write(tmp_path / "unknown.json", [{"text": CALM, "label": 9}])
    with pytest.raises(ValueError, match="has the label '9', but the model only has"):
        run_text_classification.main([*flags(tmp_path, **saved, validation_file=unknown), "--do_eval"])


def test_regression(tmp_path):
    rows = [{"sentence": f"{CALM} {i}", "score": i / 4} for i in range(12)]
    train = write(tmp_path / "train.csv", rows)
    files = {"train_file": train, "validation_file": train, "test_file": train, "label_column_name": "score"}
    trainer = run_text_classification.main([*flags(tmp_path, **files), "--do_train", "--do_eval", "--do_predict"])
    assert trainer.model.config.problem_type == "regression"
    assert trainer.model.config.num_labels == 1
    assert {"eval_mse", "eval_pearson"} <= set(results(tmp_path))
    assert all(isinstance(p, float) for p in predictions(tmp_path))


def test_regression_with_integer_labels(tmp_path):
    train = write(tmp_path / "train.csv", [{"text": CALM, "label": i} for i in range(12)])
    arguments = [*flags(tmp_path, train_file=train), "--do_train"]
    assert run_text_classification.main(arguments).model.config.num_labels == 12
    assert run_text_classification.main([*arguments, "--do_regression"]).model.config.num_labels == 1


def test_multi_label_classification(tmp_path):
    rows = [{"text": f"{CALM} {i}", "labels": [t for t in ("soup", "staff") if len(t) % (i + 1)]} for i in range(12)]
    train = write(tmp_path / "train.json", rows)
    files = {"train_file": train, "validation_file": train, "test_file": train}
    trainer = run_text_classification.main([*flags(tmp_path, **files), "--do_train", "--do_eval", "--do_predict"])
    assert trainer.model.config.problem_type == "multi_label_classification"
    assert trainer.train_dataset[3]["labels"] == [0.0, 1.0], "4 % 4 == 0: no soup"
    assert all(set(p) <= {"soup", "staff"} for p in predictions(tmp_path))


def test_several_text_columns(tmp_path):
    train = write(tmp_path / "train.csv", [{"a": "soup", "b": "cold", "label": i % 2} for i in range(12)])
    files = {"train_file": train, "text_column_names": "b,a", "text_column_delimiter": " and "}
    trainer = run_text_classification.main([*flags(tmp_path, **files), "--do_train"])
    decoded = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"], skip_special_tokens=True)
    assert decoded.replace(" ##", "").split() == ["cold", "and", "soup"]


# ---- images ----------------------------------------------------------------------------------------------------------


def pictures(n=12):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (9, 7), dtype=np.uint8)) for _ in range(n)]


SMALL = {"image_size": 8, "patch_size": 4}


def test_image_folder(tmp_path):
    for i, picture in enumerate(pictures()):
        folder = tmp_path / "train" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")
    arguments = flags(tmp_path, train_dir=tmp_path / "train", train_val_split=0.25, **SMALL)
    trainer = run_image_classification.main([*arguments, "--do_train", "--do_eval", "--random_crop", "--random_flip"])
    assert trainer.model.config.id2label == {0: "cat", 1: "dog"}
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (9, 3)
    augmented = [trainer.train_dataset[0]["pixel_values"] for _ in range(5)]
    assert any(not torch.equal(augmented[0], other) for other in augmented), "augmented anew at every visit"
    assert torch.equal(trainer.eval_dataset[0]["pixel_values"], trainer.eval_dataset[0]["pixel_values"]), "control"


def test_images_in_parquet(tmp_path):
    features = datasets.Features(img=datasets.Image(), kind=datasets.Value("string"))
    rows = {"img": pictures(), "kind": ["cat", "dog"] * 6}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    files = {"train_file": path, "test_file": path, "label_column_name": "kind", **SMALL}
    trainer = run_image_classification.main([*flags(tmp_path, **files), "--do_train", "--do_predict"])
    assert trainer.importances.isfinite().all()
    assert set(predictions(tmp_path)) <= {"cat", "dog"}


# ---- invalid flags and data ------------------------------------------------------------------------------------------


def invalid(tmp_path, case):
    good = write(tmp_path / "good.csv", reviews())
    other = write(tmp_path / "other.csv", [{"text": CALM, "label": "new"}, {"text": CALM, "label": "bad"}])
    empty = write(tmp_path / "empty.json", [*reviews(), {"text": CALM, "label": None}])
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "notes.tsv").write_text("text\tlabel\na\tb")
    return {
        "nothing to do": (flags(tmp_path, train_file=good), "Nothing to do: pass --do_train"),
        "no file": ([*flags(tmp_path, train_file="none.csv"), "--do_train"], "'none.csv' does not exist"),
        "no csv": ([*flags(tmp_path, train_file=tmp_path / "notes.txt"), "--do_train"], "must be a csv, json, jsonl"),
        "tabs": ([*flags(tmp_path, train_file=tmp_path / "notes.tsv"), "--do_train"], "must be a csv, json, jsonl"),
        "two kinds": (
            [*flags(tmp_path, train_file=good, validation_file=empty), "--do_train"], "must have the same format"
        ),
        "no split": ([*flags(tmp_path, train_file=good), "--do_eval"], "--do_eval needs the split 'validation'"),
        "no text": (
            [*flags(tmp_path, train_file=good, text_column_names="body"), "--do_train"],
            r"--text_column_names must be one of the columns \['text', 'label'\], but is 'body'",
        ),
        "no label": (
            [*flags(tmp_path, train_file=good, label_column_name="kind"), "--do_train"],
            "--label_column_name must be one of the columns .*, but is 'kind'",
        ),
        "unknown label": (
            [*flags(tmp_path, train_file=good, validation_file=other), "--do_train", "--do_eval"],
            r"has the label 'new', but the model only has the labels \['bad', 'good'\]",
        ),
        "empty label": ([*flags(tmp_path, train_file=empty), "--do_train"], "rows without a label"),
        "no words": ([*flags(tmp_path, test_file=good), "--do_predict"], "--model_name_or_path is required"),
        "range": (
            [*flags(tmp_path, train_file=good, uniform_fraction=2), "--do_train"],
            r"uniform_fraction must be in \[0, 1\], but is 2.0",
        ),
    }[case]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        "nothing to do",
        "no file",
        "no csv",
        "tabs",
        "two kinds",
        "no split",
        "no text",
        "no label",
        "unknown label",
        "empty label",
        "no words",
        "range",
    ],
)
def test_invalid_text_arguments(tmp_path, case):
    arguments, message = invalid(tmp_path, case)
    with pytest.raises(ValueError, match=message):
        run_text_classification.main(arguments)
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_invalid_image_arguments(tmp_path):
    with pytest.raises(ValueError, match="--train_dir must be a folder with one subfolder per class"):
        run_image_classification.main([*flags(tmp_path, train_dir="nowhere"), "--do_train"])


def test_errors_are_shown_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_text_classification.py", *flags(tmp_path, train_file="none.csv")])
    with pytest.raises(SystemExit, match=r"^error: Nothing to do"):
        script(run_text_classification.main)


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_comparison(tmp_path, capsys):
    """The table has the means of four short runs, and the plot is a valid image."""
    expected = {}
    for trainer in ("importance", "uniform"):
        for seed in (1, 2):
            more = {"trainer": trainer, "seed": seed, "max_train_samples": 40, "max_eval_samples": 20}
            more["output_dir"] = tmp_path / "runs" / "digits" / f"{trainer}-{seed}"
            run_image_classification.main(flags(tmp_path, eval_strategy="steps", eval_steps=1, **more))
            found = json.loads((more["output_dir"] / "all_results.json").read_text())
            expected.setdefault(trainer, []).append(found["eval_accuracy"])
    capsys.readouterr()
    lines = compare_runs.main([str(tmp_path / "runs")]).splitlines()
    assert lines[0].split()[:4] == ["task", "trainer", "seeds", "accuracy"]
    for line, trainer in zip(lines[2:], ("uniform", "importance"), strict=True):
        mean = sum(expected[trainer]) / 2
        cells = re.split(r"  +", line)
        assert cells[:3] == ["digits", trainer, "2"]
        assert cells[3].startswith(f"{mean:.4f} ± ")
        assert cells[5:7] == ["12", "100%"]
    with Image.open(tmp_path / "runs" / "comparison.png") as picture:
        assert picture.width > 400


def test_comparison_of_runs_of_different_length():
    curves = [[(10, 0.2), (20, 0.4), (30, 0.6)], [(10, 0.4), (14, 0.8)]]
    for found, point in zip(compare_runs.mean_curve(curves), [(10, 0.3), (22, 0.7)], strict=True):
        assert found == pytest.approx(point)
    assert compare_runs.mean_curve(curves[:1]) == curves[0], "control"
    run = {"task": "digits", "loss": 0.5, "examples": 9, "seconds": 1.0, "accuracy": 0.9}
    runs = [run | {"trainer": "uniform", "steps": 40}, run | {"trainer": "importance", "steps": 30}]
    assert [re.split(r"  +", line)[6] for line in compare_runs.table(runs).splitlines()[2:]] == ["100%", "75%"]
    assert re.split(r"  +", compare_runs.table(runs[1:]).splitlines()[2])[5] == "9", "nothing to compare with"


def test_comparison_without_runs(tmp_path):
    with pytest.raises(SystemExit, match="must contain finished runs"):
        compare_runs.main([str(tmp_path)])


# ---- help and copies -------------------------------------------------------------------------------------------------

SCRIPTS = sorted(Path(compare_runs.__file__).parent.glob("*.py"))
PARTS = next(iter(benchmark.new_parser()._subparsers._group_actions)).choices
HELP = [[path.stem] for path in SCRIPTS] + [["benchmark", part] for part in PARTS]
FINE_TUNING = [path for path in SCRIPTS if path.stem.startswith("run_")]


def flags_of(name, part=None):
    """Flags that the help of a script must list."""
    if part is not None:
        return [flag for action in PARTS[part]._actions for flag in action.option_strings]
    if name.startswith("run_"):
        classes = (ModelArguments, data_arguments(importlib.import_module(name)), TrainingArguments, ImportanceConfig)
        return [f"--{field.name}" for cls in classes for field in dataclasses.fields(cls) if field.init]
    return {"benchmark": list(PARTS), "compare_runs": ["folder"]}.get(name, ["--help"])


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(words[0]).main([*words[1:], "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in flags_of(*words):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag
    assert not re.search(r"(?<![\w-])--unknown(?![\w-])", text), "control"


def run_alone(script, *more):
    """Run a script with only the package on the path, not the other scripts."""
    paths = {"PYTHONPATH": str(Path(hf_importance.__file__).parent.parent)}
    command = [sys.executable, script, *more]
    return subprocess.run(command, cwd=script.parent, env={**os.environ, **paths}, capture_output=True, text=True)


@pytest.mark.parametrize("path", FINE_TUNING, ids=lambda path: path.stem)
def test_a_copied_script_runs_alone(tmp_path, path):
    done = run_alone(Path(shutil.copy(path, tmp_path)), "--help")
    assert done.returncode == 0, done.stderr
    assert "--do_train" in done.stdout
    other = tmp_path / "other.py"
    other.write_text("import compare_runs")
    assert "No module named 'compare_runs'" in run_alone(other).stderr, "control"
