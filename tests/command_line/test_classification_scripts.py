"""The classification scripts: data, training, predictions and invalid flags, in runs of a few steps."""

import csv
import runpy
import sys

import datasets
import numpy as np
import pytest
import run_image_classification
import run_text_classification
import torch
from PIL import Image
from runs import flags, predictions, results, write
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, Trainer

from hf_importance import ImportanceConfig, ImportanceTrainer

CALM = "The food was calm and good, the waiter calm too."
ANGRY = "Never again! Cold soup, angry people."


def reviews(n=12):
    return [{"text": f"{ANGRY if i % 3 else CALM} Table {i}.", "label": "bad" if i % 3 else "good"} for i in range(n)]


# ---- embedded data and settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), [("importance", ImportanceTrainer), ("uniform", Trainer)])
@pytest.mark.parametrize("module", [run_text_classification, run_image_classification], ids=["text", "image"])
def test_scripts_train_on_embedded_data(tmp_path, capsys, module, name, cls):
    more = {"max_train_samples": 60, "max_eval_samples": 30, "logging_steps": 1}
    trainer = module.main(flags(tmp_path, trainer=name, eval_strategy="steps", eval_steps=2, **more))
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
    for trained, loaded in zip(trainer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(trained, loaded)


def test_resumed_training_is_identical_with_a_tokenizer_trained_again(tmp_path):
    more = {"max_train_samples": 60, "max_eval_samples": 10, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    uninterrupted = run_text_classification.main(flags(tmp_path, **more)).model.state_dict()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    more |= {"resume_from_checkpoint": checkpoint, "output_dir": tmp_path / "resumed"}
    resumed = run_text_classification.main(flags(tmp_path, **more)).model.state_dict()
    saved = AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())
    assert any(not torch.equal(value, saved[name]) for name, value in uninterrupted.items()), "control: the checkpoint"


def test_flags_set_the_importance_config(tmp_path):
    more = {
        "effective_epochs": False,
        "visits_per_epoch": 0.5,
        "uniform_fraction": 0.4,
        "seed": 5,
        "max_train_samples": 40,
    }
    trainer = run_image_classification.main(flags(tmp_path, max_eval_samples=10, **more))
    config = trainer.importance_config
    assert (config.effective_epochs, config.visits_per_epoch, config.uniform_fraction) == (False, 0.5, 0.4)
    assert results(tmp_path)["examples_processed"] == 12


@pytest.mark.parametrize("backward", ["selective", "full"])
def test_flags_set_the_backward_pass(tmp_path, backward):
    more = {"backward": backward, "backward_tolerance": 0.2, "max_train_samples": 40, "max_eval_samples": 10}
    trainer = run_text_classification.main(flags(tmp_path, **more))
    assert trainer.importance_config.backward == backward
    assert trainer.importance_config.backward_tolerance == 0.2
    is_logged = any("train_backward_fraction" in log for log in trainer.state.log_history)
    assert is_logged == (backward == "selective")


def test_flags_take_precedence_over_an_importance_config_file(tmp_path):
    """The file takes precedence over the defaults."""
    ImportanceConfig(prune_mass=0.1, uniform_fraction=0.6, metric="loss", seed=7).save_pretrained(tmp_path)
    more = {"importance_config": tmp_path, "metric": "logit_gradient", "max_train_samples": 40, "max_eval_samples": 10}
    trainer = run_image_classification.main(flags(tmp_path, **more))
    assert trainer.importance_config == ImportanceConfig(prune_mass=0.1, uniform_fraction=0.6, seed=7)
    assert ImportanceConfig.from_pretrained(tmp_path / "run") == trainer.importance_config


@pytest.mark.parametrize("module", [run_text_classification, run_image_classification], ids=["text", "image"])
def test_report_shows_the_original_texts_and_images(tmp_path, capsys, module):
    module.main([*flags(tmp_path, max_train_samples=40, max_eval_samples=10), "--report"])
    folder = tmp_path / "run" / "_importance_report"
    assert f"The report was saved as {folder / 'report.html'}" in capsys.readouterr().out
    if module is run_text_classification:
        with (folder / "hardest.csv").open(encoding="utf-8", newline="") as file:
            shown = list(csv.DictReader(file))
        texts = run_text_classification.docstrings()["train"]["text"]
        assert len(shown) == 12, "the examples visited in three steps"
        assert all(row["text"] == texts[int(row["index"])] or len(row["text"]) == 500 for row in shown)
    else:
        assert (folder / "hardest.png").exists()
    with pytest.raises(ValueError, match="--report needs --do_train, --trainer importance"):
        module.main([*flags(tmp_path, trainer="uniform", max_train_samples=40), "--report"])


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_training_evaluation_and_prediction_on_files(tmp_path, kind):
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


def test_saved_model_predicts_like_the_trained_model(tmp_path):
    train = write(tmp_path / "train.csv", reviews())
    trained = run_text_classification.main([*flags(tmp_path, train_file=train), "--do_train"])
    saved = run_text_classification.main(
        [*flags(tmp_path, model_name_or_path=tmp_path / "run", test_file=train), "--do_predict"]
    )
    expected = trained.predict(trained.train_dataset).predictions.argmax(-1)
    assert predictions(tmp_path) == [["bad", "good"][k] for k in expected]
    assert not saved.args.do_train


def test_prediction_needs_no_labels(tmp_path):
    train = write(tmp_path / "train.csv", reviews())
    test = write(tmp_path / "test.csv", [{"text": CALM}, {"text": ANGRY}])
    files = {"train_file": train, "test_file": test}
    run_text_classification.main([*flags(tmp_path, **files), "--do_train", "--do_predict"])
    after_training = predictions(tmp_path)
    run_text_classification.main(
        [*flags(tmp_path, model_name_or_path=tmp_path / "run", test_file=test), "--do_predict"]
    )
    assert predictions(tmp_path) == after_training
    assert set(after_training) <= {"bad", "good"}


def test_label_ids_are_those_of_the_saved_model(tmp_path):
    """The evaluation data has only one of the labels, or class labels in another order."""
    train = write(tmp_path / "train.json", [{"text": f"{CALM} {i}", "label": [7, 12, 3][i % 3]} for i in range(12)])
    run_text_classification.main([*flags(tmp_path, train_file=train), "--do_train"])
    saved = {"model_name_or_path": tmp_path / "run"}
    one_label = write(tmp_path / "one_label.json", [{"text": CALM, "label": 12}, {"text": ANGRY, "label": 12}])
    trainer = run_text_classification.main([*flags(tmp_path, **saved, validation_file=one_label), "--do_eval"])
    assert trainer.model.config.label2id == {"3": 0, "7": 1, "12": 2}
    assert trainer.eval_dataset["labels"][:] == [2, 2]
    named = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["12", "3", "7"]))
    datasets.Dataset.from_list([{"text": CALM, "label": 0}], features=named).to_parquet(tmp_path / "named.parquet")
    trainer = run_text_classification.main(
        [*flags(tmp_path, **saved, validation_file=tmp_path / "named.parquet"), "--do_eval"]
    )
    assert trainer.eval_dataset["labels"][:] == [2]
    unknown = write(tmp_path / "unknown.json", [{"text": CALM, "label": 9}])
    with pytest.raises(
        ValueError, match=r"the model does not have, by number of rows {'9': 1}; those of the model are"
    ):
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


def test_integer_labels_are_classes_unless_regression_is_set(tmp_path):
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
    assert trainer.train_dataset[3]["labels"] == [0.0, 1.0], "without soup, as 4 % 4 == 0"
    assert all(set(p) <= {"soup", "staff"} for p in predictions(tmp_path))


def test_text_columns_are_joined_in_the_given_order(tmp_path):
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


def test_images_in_folders_are_augmented_for_training_only(tmp_path):
    for i, picture in enumerate(pictures()):
        folder = tmp_path / "train" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")
    arguments = flags(tmp_path, train_dir=tmp_path / "train", train_val_split=0.25, **SMALL)
    trainer = run_image_classification.main([*arguments, "--do_train", "--do_eval", "--random_crop", "--random_flip"])
    assert trainer.model.config.id2label == {0: "cat", 1: "dog"}
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (9, 3)
    augmented = [trainer.train_dataset[0]["pixel_values"] for _ in range(5)]
    assert any(not torch.equal(augmented[0], other) for other in augmented), "differs between visits"
    evaluated = [trainer.eval_dataset[0]["pixel_values"] for _ in range(2)]
    assert torch.equal(*evaluated), "control: not augmented"


def test_training_and_prediction_on_images_in_parquet(tmp_path):
    features = datasets.Features(img=datasets.Image(), kind=datasets.Value("string"))
    rows = {"img": pictures(), "kind": ["cat", "dog"] * 6}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    files = {"train_file": path, "test_file": path, "label_column_name": "kind", **SMALL}
    trainer = run_image_classification.main([*flags(tmp_path, **files), "--do_train", "--do_predict"])
    assert trainer.importances.isfinite().all()
    assert set(predictions(tmp_path)) <= {"cat", "dog"}


# ---- invalid flags and data ------------------------------------------------------------------------------------------


@pytest.fixture
def text_files(tmp_path, monkeypatch):
    """Write files into the working directory."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "reviews.csv", reviews())
    write(tmp_path / "new_label.csv", [{"text": CALM, "label": "new"}, {"text": CALM, "label": "bad"}])
    write(tmp_path / "missing_label.json", [*reviews(), {"text": CALM, "label": None}])
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "notes.tsv").write_text("text\tlabel\na\tb")


INVALID = {
    "nothing to do": ({"train_file": "reviews.csv"}, [], "Nothing to do: pass --do_train"),
    "missing file": ({"train_file": "none.csv"}, ["--do_train"], "'none.csv' does not exist"),
    "txt file": ({"train_file": "notes.txt"}, ["--do_train"], "must be a csv, json, jsonl"),
    "tsv file": ({"train_file": "notes.tsv"}, ["--do_train"], "must be a csv, json, jsonl"),
    "missing split": ({"train_file": "reviews.csv"}, ["--do_eval"], "--do_eval needs the split 'validation'"),
    "unknown text column": (
        {"train_file": "reviews.csv", "text_column_names": "body"},
        ["--do_train"],
        r"train data must have a column 'body', but has \['text', 'label'\]: pass --text_column_names",
    ),
    "unknown label column": (
        {"train_file": "reviews.csv", "label_column_name": "kind"},
        ["--do_train"],
        "must have a column 'kind', but has .*: pass --label_column_name",
    ),
    "unknown label": (
        {"train_file": "reviews.csv", "validation_file": "new_label.csv"},
        ["--do_train", "--do_eval"],
        r"eval data has labels in 'label' .* {'new': 1}; those of the model are \['bad', 'good'\]",
    ),
    "missing label": (
        {"train_file": "missing_label.json"},
        ["--do_train"],
        "1 of 13 rows of the train data have no label",
    ),
    "prediction without a model": ({"test_file": "reviews.csv"}, ["--do_predict"], "--model_name_or_path is required"),
    "uniform_fraction out of range": (
        {"train_file": "reviews.csv", "uniform_fraction": 2},
        ["--do_train"],
        r"uniform_fraction must be in \[0, 1\], but is 2.0",
    ),
}


@pytest.mark.usefixtures("text_files")
@pytest.mark.parametrize("case", INVALID)
def test_invalid_flags_and_text_files(tmp_path, case):
    given, steps, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        run_text_classification.main([*flags(tmp_path, **given), *steps])
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_missing_image_folders_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="--train_dir must be a folder with one subfolder per class"):
        run_image_classification.main([*flags(tmp_path, train_dir="nowhere"), "--do_train"])


def test_training_without_a_model_warns(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("run_text_classification.logger.warning", warnings.append)
    data = write(tmp_path / "train.csv", reviews())
    for more, number in (({"train_file": data}, 1), ({"max_train_samples": 20}, 0)):
        warnings.clear()
        run_text_classification.main(["--do_train", *flags(tmp_path, **more)])
        assert len(warnings) == number, more


def test_errors_are_shown_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_text_classification.py", *flags(tmp_path, train_file="none.csv")])
    with pytest.raises(SystemExit, match=r"^error: Nothing to do"):
        runpy.run_path(run_text_classification.__file__, run_name="__main__")
