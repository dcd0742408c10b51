"""Trainings that start with the importances of another one: what it leaves, what is drawn, what is refused."""

import json
import math
import shutil

import datasets
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import Recorder

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.run import reuse

SHORT = {"num_train_epochs": 2}
NAME = "importances.safetensors"
UNEQUAL = [1.0 if i % 4 else 0.1 for i in range(40)]


def as_dataset(rows):
    return datasets.Dataset.from_dict({key: [torch.as_tensor(row[key]).tolist() for row in rows] for key in rows[0]})


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A training with a checkpoint in `checkpoint-10`, and its model in the folder itself."""
    folder = tmp_path_factory.mktemp("first")
    run = tiny.trained(folder, tiny.opinionated_bert(), tiny.texts(), save_strategy="epoch", **SHORT)
    run.save_model()
    return run


def started(tmp_path, start, data=None, more=None, model=None, **settings):
    """A training that starts from another one, with another seed."""
    importance = {"start_from": start, **settings.pop("importance", {})}
    data, model = tiny.texts() if data is None else data, model or tiny.opinionated_bert()
    return tiny.trained(tmp_path, model, data, Recorder, importance, more, **{"seed": 7, **SHORT, **settings})


def rates(run, start=0, end=None):
    return {rate for draw in run.draws[start:end] for rate in draw.rate}


# ---- what a training leaves ------------------------------------------------------------------------------------------


def test_file_has_importances_and_fingerprint_but_no_examples(first):
    for folder in (first.args.output_dir, f"{first.args.output_dir}/checkpoint-10"):
        path = f"{folder}/{NAME}"
        assert load_file(path).keys() == {"importance"}
        importance = load_file(path)["importance"]
        assert (importance.dtype, list(importance.shape)) == (torch.float32, [40])
        assert importance.isfinite().all()
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        assert about.keys() == {"format", "metric", "data"}
        assert json.loads(about["data"])["columns"].keys() == {"input_ids", "attention_mask", "labels"}
        assert all(len(digest) == 64 for digest in json.loads(about["data"])["columns"].values())


def test_it_is_the_mean_over_the_ends_of_the_first_passes(tmp_path):
    """Every step measures all examples: passes 1, 2, 3 of 5. Before the third ends, its importances count."""
    settings = {"per_device_train_batch_size": 40, "num_train_epochs": 5, "importance": tiny.FIXED}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    run = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts(), **settings)
    saved = [load_file(tmp_path / f"checkpoint-{step}" / NAME)["importance"] for step in range(1, 6)]
    first, second = saved[0], 2 * saved[1] - saved[0]
    assert torch.equal(saved[3], saved[2])
    assert torch.equal(saved[4], saved[2])
    assert not torch.allclose(first, second), "premise"
    assert not torch.allclose(run.importances, saved[4]), "control: the last importances"


@pytest.mark.parametrize("settings", [{"metric": "uniform"}, None])
def test_nothing_is_left_where_nothing_was_measured(tmp_path, settings):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), importance=settings or {}, max_steps=1)
    if settings:
        run.train()
    run.save_model()
    assert (tmp_path / "importance_config.json").exists()
    assert not (tmp_path / NAME).exists()


# ---- the training that starts from it --------------------------------------------------------------------------------


def test_folder_file_checkpoint_path_and_tensor_are_the_same(tmp_path, first, monkeypatch):
    folder = first.args.output_dir
    wanted = started(tmp_path, load_file(f"{folder}/{NAME}")["importance"]).draws
    assert wanted != started(tmp_path, None).draws, "control"
    copy = shutil.copytree(f"{folder}/checkpoint-10", tmp_path / "copy")
    for start in (folder, f"{folder}/{NAME}", copy):
        assert started(tmp_path, start).draws == wanted
    hub = {"someone/model": f"{folder}/{NAME}"}
    monkeypatch.setattr(reuse, "cached_file", lambda name, file: hub[name] if file == NAME else None)
    assert started(tmp_path, "someone/model").draws == wanted


def test_first_segment_is_uniform_and_the_others_follow_the_importances(tmp_path):
    run = started(tmp_path, KNOWN, WITH_POSITIONS, {"per_example_loss_func": scaled_losses}, **FROZEN)
    assert rates(run, end=5) == {1.0}
    for draw in run.draws[12:30]:
        assert (draw.rate[0] > 1) == (draw.index[0] >= 30)


def test_equal_importances_are_the_training_of_trainer(tmp_path):
    """To rounding; with `metric="loss"` and equal losses, importances are equal in this training, too."""
    more = {"per_example_loss_func": equal_losses}
    for start, is_equal in ((torch.full((40,), 0.3), True), (torch.tensor(UNEQUAL), False)):
        run = started(tmp_path, start, more=more, importance={"metric": "loss"}, seed=42)
        plain = tiny.trained(
            tmp_path, tiny.opinionated_bert(), tiny.texts(), Recorder, {"metric": "uniform"}, more, **SHORT
        )
        assert (tiny.difference(run, plain) < 1e-6) == is_equal
        assert (run.draws == plain.draws) == is_equal


def equal_losses(outputs, labels):
    """The same value for all examples, though with different gradients."""
    losses = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")
    return losses / losses.detach()


def test_importances_are_those_measured_in_this_training(tmp_path):
    run = started(tmp_path, torch.tensor(UNEQUAL), max_steps=2, logging_steps=1)
    visited = {i for draw in run.draws for i in draw.index}
    assert set(run.importances.isfinite().nonzero().flatten().tolist()) == visited
    assert len(run.kept_indices) == 40
    assert tiny.logged(run, "importance/known")[-1] == len(visited) / 40
    run.save_model()
    saved = load_file(tmp_path / NAME)["importance"]
    assert torch.equal(saved.isfinite(), run.importances.isfinite())


FROZEN = {"learning_rate": 0.0, "per_device_train_batch_size": 1, "model": tiny.bert(initializer_range=0.0)}
"""Importances do not change; without a scale they are those of the losses, and 40 examples take 40 steps."""


def scaled_losses(outputs, labels):
    losses = torch.nn.functional.cross_entropy(outputs["logits"], labels[:, 0], reduction="none")
    return losses * torch.where(labels[:, 1] < 30, 0.02, 1.0)


KNOWN = torch.tensor([0.02] * 30 + [1.0] * 10)
WITH_POSITIONS = [{**row, "labels": torch.tensor([row["labels"], i])} for i, row in enumerate(tiny.texts())]


def test_a_single_epoch_ends_early(tmp_path, caplog):
    """Most losses are small, and known to be."""
    settings = {
        "data": WITH_POSITIONS,
        "more": {"per_example_loss_func": scaled_losses},
        "num_train_epochs": 1,
        **FROZEN,
    }
    run = started(tmp_path, KNOWN, **settings)
    assert run.state.global_step < 36
    assert run.state.epoch == 1.0
    assert "saves nothing in a single epoch" not in caplog.text
    assert "training is expected to end after about" in caplog.text
    without = started(tmp_path, None, **settings)
    assert without.state.global_step == 40, "control"
    assert "saves nothing in a single epoch" in caplog.text


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(tmp_path, start, message, data=None, error=ValueError, **settings):
    with pytest.raises(error, match=message):
        started(tmp_path, start, data, **settings)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_missing_files_are_named(tmp_path):
    for start in (tmp_path / "nothing", tmp_path):
        message = rf"start_from=.*{start.name}.* must be a folder, or a model on the Hub, with {NAME}"
        refused(tmp_path, start, message, error=OSError)


def test_other_data_are_refused_by_their_columns(tmp_path, first):
    folder = first.args.output_dir
    rows = tiny.texts()
    rows[3] = {**rows[3], "labels": (rows[3]["labels"] + 1) % tiny.CLASSES}
    refused(tmp_path, folder, r"was another \(labels differs\).*another part of that data, pass a tensor", rows)
    refused(tmp_path, folder, r"was another \(input_ids, labels differ\)", tiny.texts()[::-1])
    refused(tmp_path, folder, "40 examples, and train_dataset has 39.*pass a tensor", tiny.texts()[1:])
    started(tmp_path, folder, tiny.texts(), max_steps=1)  # control


def test_a_fold_takes_a_tensor(tmp_path, first):
    importance = load_file(f"{first.args.output_dir}/{NAME}")["importance"]
    fold = list(range(0, 40, 2))
    data = as_dataset(tiny.texts())
    run = started(tmp_path, importance[fold], data.select(fold), max_steps=1)
    assert torch.equal(run._run.sampler.visits.prior, importance[fold])
    refused(tmp_path, importance, "each of the 20 training examples, but has 40: index it", data.select(fold))


def test_another_metric_is_refused(tmp_path, first):
    refused(
        tmp_path, first.args.output_dir, "same metric, 'loss', but.*'logit_gradient'", importance={"metric": "loss"}
    )


@pytest.mark.parametrize("content", ["nothing", "negative", "format", "no fingerprint"])
def test_damaged_files_are_refused(tmp_path, first, content):
    folder = shutil.copytree(f"{first.args.output_dir}/checkpoint-10", tmp_path / "damaged")
    path = folder / NAME
    if content == "nothing":
        path.write_bytes(b"")
    else:
        about = {"format": "2" if content == "format" else "1", "metric": "logit_gradient"}
        about |= {"data": "{}" if content == "no fingerprint" else json.dumps({"datasets": None, "columns": {}})}
        reuse.save_file({"importance": torch.full((40,), -1.0 if content == "negative" else 1.0)}, path, about)
    refused(tmp_path, folder, rf"{NAME} cannot be read .*Train that model again, or remove start_from")


def test_draws_that_cannot_be_weighted_are_refused(tmp_path):
    class Weighted(ImportanceTrainer):
        """Its loss couples the examples of a batch, which shows in the first step."""

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**{name: value for name, value in inputs.items() if name != "importance_draw"})
            return (outputs.loss.square(), outputs) if return_outputs else outputs.loss.square()

    for start, is_refused in ((torch.tensor(UNEQUAL), True), (None, False)):
        run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), Weighted, {"start_from": start}, max_steps=1)
        if is_refused:
            with pytest.raises(ValueError, match="start_from requires draws that are weighted; remove it, or: "):
                run.train()
        else:
            run.train()
    more = {"compute_loss_func": lambda outputs, labels, **_: outputs.loss}
    with pytest.raises(ValueError, match=r"start_from requires draws.*compute_loss_func must be None"):
        tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), importance={"start_from": torch.ones(40)}, more=more)


def test_settings_of_the_report_have_no_tensor(tmp_path):
    run = started(tmp_path, torch.tensor(UNEQUAL), max_steps=1)
    assert run._findings().settings["start_from"] is None
    assert isinstance(run.importance_config, ImportanceConfig)
    assert math.isclose(run.importance_config.start_from[0], 0.1, rel_tol=1e-6)
