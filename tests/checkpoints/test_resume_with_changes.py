"""Training resumed with other data, settings or batch size, and from checkpoints without importances.

Importances are kept if they are still valid, and start unknown otherwise; a warning gives the reason.
"""

from dataclasses import asdict

import datasets
import pytest
import tiny
import torch
from noisy_texts import NoisyTexts
from oracles import rates_of as rates
from resuming import EARLY_END, MODEL, SAVING, checkpoint_of, last_state, resume, state_of, train, visits_in

from hf_importance import ImportanceConfig

# ---- checkpoints without importances ---------------------------------------------------------------------------------


def test_importances_start_unknown_from_a_checkpoint_of_trainer(tmp_path, warned):
    tiny.trained(tmp_path, tiny.bert(**MODEL), tiny.texts(), tiny.Plain, **{**SAVING, "save_steps": 7})
    resumed = resume(tmp_path / "checkpoint-7")
    assert resumed.state.global_step == 15
    assert "contains no importances: they start unknown" in warned()[0]
    assert len(resumed.draws) == 8
    assert set(resumed.draws[0].weight) == {1.0}


def test_importances_start_unknown_from_a_checkpoint_of_the_model_only(tmp_path, warned):
    """As with `Trainer`, training starts from the saved parameters, with a new optimizer."""
    train(tmp_path, save_only_model=True, save_steps=7, max_steps=8)
    assert not list(tmp_path.glob("checkpoint-7/importance_*.pt"))
    resumed = resume(tmp_path / "checkpoint-7", max_steps=8)
    assert resumed.state.global_step == 8
    assert "contains no importances" in warned()[0]


# ---- other data ------------------------------------------------------------------------------------------------------


def as_dataset(rows):
    return datasets.Dataset.from_list([{k: torch.as_tensor(v).tolist() for k, v in row.items()} for row in rows])


def shuffled(rows):
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()]


def relabelled(rows):
    return [{**row, "labels": (row["labels"] + (i == 20)) % tiny.CLASSES} for i, row in enumerate(rows)]


def reversed_tokens(rows):
    return [{**row, "input_ids": row["input_ids"].flip(0)} for row in rows]


KINDS = {"list": list, "torch": NoisyTexts, "datasets": as_dataset}
TEXTS = {kind: (lambda new=new: new([dict(row) for row in tiny.texts()])) for kind, new in KINDS.items()}
"""The same data in several forms; each call creates it again, which gives it another fingerprint in `datasets`."""
CHANGES = {
    "shuffled": (shuffled, "input_ids, labels differ"),
    "relabelled": (relabelled, "labels differs"),
    "reversed tokens": (reversed_tokens, "input_ids differs"),
}


@pytest.mark.parametrize(
    ("kind", "change"), [*(("list", change) for change in CHANGES), ("torch", "shuffled"), ("datasets", "relabelled")]
)
def test_importances_start_unknown_with_different_data(uninterrupted, warned, kind, change):
    changed, difference = CHANGES[change]
    run = uninterrupted(data=TEXTS[kind])
    checkpoint = checkpoint_of(run, 14)
    resumed = resume(checkpoint, data=lambda: KINDS[kind](changed(tiny.texts())))
    assert f"different training data ({difference}): importances start unknown" in warned()[0]
    visits = visits_in(last_state(resumed))
    assert visits.sum() == 8 * len(resumed.draws) < visits_in(state_of(checkpoint)).sum()
    known = resumed.importances.isfinite().sum()
    assert known == (visits > 0).sum() < run.importances.isfinite().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_control_importances_are_kept_with_the_same_data(uninterrupted, warned, kind):
    run = uninterrupted(data=TEXTS[kind])
    resumed = resume(checkpoint_of(run, 14), data=TEXTS[kind])
    assert warned() == []
    torch.testing.assert_close(resumed.importances, run.importances, rtol=0.5, atol=0.5)
    assert visits_in(last_state(resumed)).sum() == visits_in(last_state(run)).sum()


def test_random_augmentation_is_not_different_data(tmp_path, warned):
    train(tmp_path, data=lambda: NoisyTexts(tiny.texts(), torch.Generator().manual_seed(1)), save_steps=7, max_steps=8)
    resume(
        tmp_path / "checkpoint-7",
        data=lambda: NoisyTexts(tiny.texts(), torch.Generator().manual_seed(2)),
        max_steps=8,
    )
    assert warned() == []


class TextsByEpoch(NoisyTexts):
    """Its texts depend on the epoch."""

    def set_epoch(self, epoch):
        self.rows = [{**row, "input_ids": (row["input_ids"] + epoch) % tiny.WORDS} for row in tiny.texts()]


def test_data_that_depends_on_the_epoch_is_not_different_data(tmp_path, warned):
    train(tmp_path, data=lambda: TextsByEpoch(tiny.texts()), save_steps=14)
    resume(tmp_path / "checkpoint-14", data=lambda: TextsByEpoch(tiny.texts()))
    assert warned() == []


def test_importances_start_unknown_with_another_number_of_examples(uninterrupted, warned):
    resumed = resume(checkpoint_of(uninterrupted(), 7), tiny.FIXED, data=lambda: tiny.texts(48))
    assert "40 training examples, but train_dataset now has 48" in warned()[0]
    assert resumed.state.global_step == 18
    assert set(resumed.draws[0].weight) == {1.0}


# ---- other settings --------------------------------------------------------------------------------------------------

OTHER = {
    "memory_momentum": 0.5, "uniform_fraction": 0.6, "weight_exponent": 0.5, "prune_mass": 0.1,
    "visits_per_epoch": 0.8, "seed": 5, "sampling": "replacement",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_applies_and_importances_are_kept(uninterrupted, warned, name):
    checkpoint = checkpoint_of(uninterrupted(tiny.FIXED), 7)
    resumed = resume(checkpoint, {**tiny.FIXED, name: OTHER[name]})
    before = {**asdict(ImportanceConfig(**tiny.FIXED)), "seed": 42, "sampling": "reshuffled"}[name]
    assert f"was written with {name}={before!r} (now {OTHER[name]!r}): importances are kept" in warned()[0]
    assert set(resumed.draws[0].rate) != {1.0}, "rates follow from the saved importances"
    visits = state_of(checkpoint)["sampler"]["record"]["visits"].sum()
    assert visits_in(last_state(resumed)).sum() == visits + sum(len(draw.index) for draw in resumed.draws)
    if name == "uniform_fraction":
        assert max(resumed.draws[0].weight) <= 1 / 0.6 + 1e-6
        assert min(tiny.logged(resumed, "importance/uniform_fraction")[7:]) >= 0.6  # from the resumed steps


def test_importances_start_unknown_with_another_metric(uninterrupted, warned):
    resumed = resume(checkpoint_of(uninterrupted(tiny.FIXED), 7), {**tiny.FIXED, "metric": "loss"})
    warning = "metric='logit_gradient' (now 'loss'), a different metric: importances start unknown"
    assert warning in warned()[0]
    assert set(resumed.draws[0].rate) == {1.0}


def test_resuming_without_the_record_is_exact_and_silent(uninterrupted, warned):
    resumed = resume(checkpoint_of(uninterrupted(), 7), {"record": False})
    assert warned() == []
    assert tiny.difference(uninterrupted(), resumed) == 0.0


def test_effective_epochs_can_be_switched_off_and_on(uninterrupted, warned):
    """Without them, each step counts as one, and the effective steps of a checkpoint are ignored."""
    resumed = resume(checkpoint_of(uninterrupted(tiny.FIXED), 7))
    assert tiny.logged(resumed, "importance/effective_epoch")[0] == pytest.approx(8 / 5, abs=0.1)
    assert resumed.state.epoch == 3
    resumed = resume(checkpoint_of(uninterrupted(), 7), tiny.FIXED)
    assert resumed.state.global_step == 15
    assert last_state(resumed)["effective"] is None
    assert warned() == []


def test_first_batch_is_checked_again_with_another_loss(tmp_path):
    """Checks of the first batch are only valid for the loss that they were made with."""

    def resume_with(function):
        more = {} if function is None else {"per_example_loss_func": function}
        run = tiny.trainer(tmp_path / "resumed", tiny.WithoutConfig(scale=1.1), tiny.texts(), more=more, max_steps=6)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        return run

    def scaled(outputs, labels):
        return 1.1 * torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    more = {"per_example_loss_func": scaled}
    tiny.trained(tmp_path, tiny.WithoutConfig(scale=1.1), tiny.texts(), more=more, max_steps=4, **SAVING)
    with pytest.raises(ValueError, match="the model has its own loss"):
        resume_with(None)
    assert resume_with(scaled).state.global_step == 6


# ---- another batch size ----------------------------------------------------------------------------------------------


def test_importances_are_kept_with_another_batch_size(uninterrupted, warned):
    """An epoch has 20 batches of 2, of which the first 7 are skipped."""
    checkpoint = checkpoint_of(uninterrupted(), 7)
    sampler = state_of(checkpoint)["sampler"]
    resumed = resume(checkpoint, tiny.FIXED, per_device_train_batch_size=2)
    assert "a different number of processes, batch size" in warned()[0]
    visits = visits_in(last_state(resumed)).sum()
    assert visits == sampler["record"]["visits"].sum() + 2 * len(resumed.draws)
    assert [draw.number for draw in resumed.draws] == list(range(53))
    assert set(resumed.draws[0].weight) != {1.0}, "weights follow from the saved importances"
    rate = rates(sampler["memory"]["importance"].double(), 0.3, 64.0)
    for draw in resumed.draws[:2]:  # of the first segment
        assert draw.weight == pytest.approx((1 / rate[draw.index]).tolist(), rel=1e-5)


def test_effective_epochs_are_kept_with_another_batch_size(uninterrupted, warned):
    """Epochs rather than steps, because steps differ in size."""
    checkpoint = checkpoint_of(uninterrupted(**EARLY_END), 30)
    resumed = resume(checkpoint, **{**EARLY_END, "per_device_train_batch_size": 2})
    assert "a different number of processes, batch size" in warned()[0]
    first = tiny.logged(resumed, "importance/effective_epoch")[30]
    saved = state_of(checkpoint)["effective"]["progress"]["value"] / 6
    assert saved < first < saved + 0.2
    assert saved > 5.05, "control: the steps alone would be 5 epochs"
    progress = last_state(resumed)["effective"]["progress"]
    assert progress["steps_per_epoch"] == 12
    assert progress["value"] >= 8 * 12
    assert resumed.state.epoch == 8


def test_learning_rate_decays_fully_with_larger_batches(uninterrupted, warned):
    """The first 12 steps were 2 of 8 epochs, and 12 larger ones remain at most."""
    checkpoint = checkpoint_of(uninterrupted(**EARLY_END), 12)
    resumed = resume(checkpoint, **{**EARLY_END, "per_device_train_batch_size": 12})
    progress = last_state(resumed)["effective"]["progress"]
    assert progress["value"] >= 8 * 2
    assert resumed.state.epoch == 8
    assert 12 + 4 < resumed.state.global_step <= 12 + 12
    gain = progress["gain"]  # the last step begins at most that much before the end
    assert tiny.logged(resumed, "learning_rate")[-1] <= 2e-2 * gain**1.5 / 16 < 2e-2 / 4
