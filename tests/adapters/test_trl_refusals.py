"""TRL trainers, settings and versions that are refused, and overrides of `compute_loss`."""

import copy

import pytest
import tiny
import torch
from trl_trainers import IGNORE_WARNINGS, ImportanceSFT, coupled, rows, sft, trained, trl

from hf_importance import ImportanceTrainerMixin
from hf_importance.adapters.trl import SFTLoss

pytestmark = IGNORE_WARNINGS


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("GRPOTrainer", "completions that the model generates"),
        ("RLOOTrainer", "completions that the model generates"),
        ("KTOTrainer", "mean KL divergence of the batch"),
    ],
)
def test_trainers_without_per_example_loss_are_refused_at_construction(trainer, reason, tmp_path):
    with pytest.raises(ValueError, match=f"{trainer} cannot be used with importance sampling: .*{reason}"):
        coupled(tmp_path, trainer, tiny.REFUSING)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"more": {"compute_loss_func": lambda *_, **__: 0.0}}, "per_example_loss_func"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy must be"),
    ],
    ids=["compute_loss_func", "train_sampling_strategy"],
)
def test_unsupported_settings_are_refused_at_construction(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, importance=tiny.REFUSING, **more)


def test_streaming_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a stream"):
        sft(tmp_path, data=rows().to_iterable_dataset(), importance=tiny.REFUSING, max_steps=3)


def test_trl_without_fused_head_is_refused_at_construction(tmp_path, monkeypatch):
    original = SFTLoss.__init__

    def without_head(self, *args):
        monkeypatch.delattr("trl.trainer.utils.add_fused_lm_head")
        original(self, *args)

    monkeypatch.setattr(SFTLoss, "__init__", without_head)
    with pytest.raises(ImportError, match="add_fused_lm_head"):
        sft(tmp_path)


def test_changed_trl_loss_is_refused_on_first_batch(tmp_path, monkeypatch):
    """As a version of TRL could do that weights tokens differently; the model is not trained."""
    original = trl.SFTTrainer.compute_loss
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", lambda self, *args, **kwargs: 1.5 * original(self, *args))
    trainer = sft(tmp_path, importance=tiny.REFUSING)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match="the mean of its per-example losses is"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


class DoubledLoss(trl.SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_compute_loss_is_honoured_before_the_mixin_and_refused_after_it(tmp_path):
    class After(ImportanceTrainerMixin, DoubledLoss):
        pass

    with pytest.raises(ValueError, match=r"DoubledLoss.compute_loss comes after .* put DoubledLoss first"):
        sft(tmp_path, After, importance=tiny.REFUSING)

    class Before(ImportanceSFT):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    once, twice = trained(sft(tmp_path)), trained(sft(tmp_path, Before))
    losses = [tiny.logged(trainer, "loss")[0] for trainer in (once, twice)]
    assert losses[1] == pytest.approx(2 * losses[0])
