"""What is refused in `train()` or at import, and what is supported without training data."""

import copy

import pytest
import tiny
import torch
from overridden_losses import LossInALaterBase
from torch.utils.data import IterableDataset

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.upstream import validate_upstream


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny.texts())

    def __len__(self):
        return 40


SET_AFTER_CONSTRUCTION = {
    "compute_loss in a later base": (
        LossInALaterBase,
        {"train_dataset": tiny.texts()},
        "Weighted.compute_loss comes after",
    ),
    "stream": (ImportanceTrainer, {"train_dataset": Stream()}, "Stream is a stream"),
    "compute_loss_func": (
        ImportanceTrainer,
        {"train_dataset": tiny.texts(), "compute_loss_func": max},
        "compute_loss_func must be None",
    ),
    "label_smoother": (
        ImportanceTrainer,
        {"train_dataset": tiny.texts(), "label_smoother": type("CustomSmoother", (), {})()},
        "label_smoother must be the one of label_smoothing_factor, but is CustomSmoother",
    ),
}


@pytest.mark.parametrize("case", SET_AFTER_CONSTRUCTION)
def test_attributes_set_after_construction_are_refused_in_train(tmp_path, case):
    cls, attributes, message = SET_AFTER_CONSTRUCTION[case]
    run = tiny.trainer(tmp_path, tiny.bert(), None, cls, tiny.REFUSING)
    for name, value in attributes.items():
        setattr(run, name, value)
    with pytest.raises(ValueError, match=message):
        run.train()


def test_compute_loss_func_is_supported_in_evaluation_only(tmp_path):
    run = tiny.trainer(
        tmp_path,
        tiny.bert(),
        None,
        importance=tiny.REFUSING,
        more={"compute_loss_func": lambda outputs, labels, **_: 7.0 + outputs.logits.sum() * 0},
    )
    assert run.evaluate(tiny.texts())["eval_loss"] == 7.0
    run.train_dataset = tiny.texts()
    with pytest.raises(ValueError, match="compute_loss_func must be None, because it returns one loss per batch"):
        run.train()


def test_copy_of_a_trainer_trains(tmp_path):
    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts())
    copied = copy.deepcopy(run)
    copied.train()
    assert copied.importances.isfinite().all()
    assert run.importances.isnan().all(), "control: the original is not trained"


def test_versions_without_a_private_name_are_refused(tmp_path, monkeypatch):
    """The message says what would break; at import, and for attributes of trainers at construction."""
    validate_upstream()
    with monkeypatch.context() as patch:
        patch.delattr("transformers.Trainer._run_epoch")
        with pytest.raises(
            ImportError, match=r"needs Trainer._run_epoch, without which .* without importance sampling"
        ):
            validate_upstream()
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    del run._train_batch_size
    with pytest.raises(ImportError, match=r"needs ImportanceTrainer._train_batch_size, without which batches"):
        validate_upstream(run)


def test_training_step_outside_of_a_training_is_that_of_trainer(tmp_path):
    batch = {name: torch.stack([row[name] for row in tiny.texts(8)]) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.tensor([row["labels"] for row in tiny.texts(8)])
    plain = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), tiny.Plain)
    plain.current_gradient_accumulation_steps = 1  # set in the loop only, without which its `training_step` fails
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    expected = plain.training_step(plain.model, dict(batch))
    assert run.training_step(run.model, dict(batch)) == expected
    run.train()
    assert run.training_step(run.model, dict(batch)) > 0, "also after it"


def test_importances_require_training_data(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), None)
    for name in ("importances", "kept_indices"):
        with pytest.raises(ValueError, match="importances requires train_dataset"):
            getattr(run, name)


@pytest.mark.parametrize("seed", [2**63, -1])
def test_seeds_out_of_range_are_refused(tmp_path, seed):
    with pytest.raises(ValueError, match=f"data_seed must be in 0 … 2\\^63 − 1, but is {seed}"):
        tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), data_seed=seed)
    with pytest.raises(ValueError, match="seed must be"):
        ImportanceConfig(seed=seed)
