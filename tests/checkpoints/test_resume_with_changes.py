"""Training resumed with other data, settings or batch size, and from checkpoints without importances.

Importances are kept if they are still valid, and start unknown otherwise; a warning gives the reason.
"""

from dataclasses import asdict

import datasets
import pytest
import tiny
import torch
from noisy_texts import NoisyTexts
from resuming import EARLY_END, MODEL, SAVING, collect_warnings, record_of, resume, train, visits_of

from hf_importance import ImportanceConfig
from hf_importance.run.checkpoints import load_states
from hf_importance.sampling.rates import rates


@pytest.fixture
def checkpoint_warnings(monkeypatch):
    return collect_warnings(monkeypatch)


# ---- checkpoints without importances ---------------------------------------------------------------------------------


def test_importances_start_unknown_from_a_checkpoint_of_trainer(tmp_path, checkpoint_warnings):
    tiny.trained(tmp_path, tiny.bert(**MODEL), tiny.texts(), tiny.Plain, **SAVING)
    resumed = resume(tmp_path, 7)
    assert resumed.state.global_step == 15
    assert "contains no importances: they start unknown" in checkpoint_warnings[0]
    assert len(resumed.draws) == 8
    assert set(resumed.draws[0].weight) == {1.0}


def test_importances_start_unknown_from_a_checkpoint_of_the_model_only(tmp_path, checkpoint_warnings):
    """As with `Trainer`, training starts from the saved parameters, with a new optimizer."""
    train(tmp_path, save_only_model=True)
    assert not list(tmp_path.glob("checkpoint-7/importance_*.pt"))
    resumed = resume(tmp_path, 7)
    assert resumed.state.global_step == 15
    assert "contains no importances" in checkpoint_warnings[0]


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
CHANGES = {
    "shuffled": (shuffled, "input_ids, labels differ"),
    "relabelled": (relabelled, "labels differs"),
    "reversed tokens": (reversed_tokens, "input_ids differs"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_importances_start_unknown_with_different_data(tmp_path, checkpoint_warnings, kind, change):
    new_data, (changed, difference) = KINDS[kind], CHANGES[change]
    uninterrupted = train(tmp_path, data=new_data(tiny.texts()))
    (state,) = load_states(tmp_path / "checkpoint-14")
    resumed = resume(tmp_path, 14, data=new_data(changed(tiny.texts())))
    assert f"different training data ({difference}): importances start unknown" in checkpoint_warnings[0]
    visits = record_of(resumed).columns()["visits"]
    assert visits.sum() == 8 * len(resumed.draws) < state["sampler"]["record"]["visits"].sum()
    known = resumed.importances.isfinite().sum()
    assert known == (visits > 0).sum() < uninterrupted.importances.isfinite().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_control_importances_are_kept_with_the_same_data(tmp_path, checkpoint_warnings, kind):
    """The data is created again, which gives it another fingerprint in `datasets`."""
    new_data = KINDS[kind]
    uninterrupted = train(tmp_path, data=new_data(tiny.texts()))
    resumed = resume(tmp_path, 14, data=new_data([dict(row) for row in tiny.texts()]))
    assert checkpoint_warnings == []
    torch.testing.assert_close(resumed.importances, uninterrupted.importances, rtol=0.5, atol=0.5)
    assert visits_of(resumed) == visits_of(uninterrupted)


def test_random_augmentation_is_not_different_data(tmp_path, checkpoint_warnings):
    train(tmp_path, data=NoisyTexts(tiny.texts(), torch.Generator().manual_seed(1)))
    resume(tmp_path, 7, data=NoisyTexts(tiny.texts(), torch.Generator().manual_seed(2)))
    assert checkpoint_warnings == []


class TextsByEpoch(NoisyTexts):
    """Its texts depend on the epoch."""

    def set_epoch(self, epoch):
        self.rows = [{**row, "input_ids": (row["input_ids"] + epoch) % tiny.WORDS} for row in tiny.texts()]


def test_data_that_depends_on_the_epoch_is_not_different_data(tmp_path, checkpoint_warnings):
    train(tmp_path, data=TextsByEpoch(tiny.texts()))
    resume(tmp_path, 14, data=TextsByEpoch(tiny.texts()))
    assert checkpoint_warnings == []


def test_importances_start_unknown_with_another_number_of_examples(tmp_path, checkpoint_warnings):
    train(tmp_path)
    resumed = resume(tmp_path, 7, tiny.FIXED, data=tiny.texts(48))
    assert "40 training examples, but train_dataset now has 48" in checkpoint_warnings[0]
    assert resumed.state.global_step == 18
    assert set(resumed.draws[0].weight) == {1.0}


# ---- other settings --------------------------------------------------------------------------------------------------

OTHER = {
    "memory_momentum": 0.5, "uniform_fraction": 0.6, "weight_exponent": 0.5, "prune_mass": 0.1,
    "importance_increment": 0.01, "budget": 0.8, "seed": 5, "sampling": "replacement",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_applies_and_importances_are_kept(tmp_path, checkpoint_warnings, name):
    train(tmp_path, tiny.FIXED)
    (state,) = load_states(tmp_path / "checkpoint-7")
    resumed = resume(tmp_path, 7, {**tiny.FIXED, name: OTHER[name]})
    before = {**asdict(ImportanceConfig(**tiny.FIXED)), "seed": 42}[name]
    assert f"was written with {name}={before!r} (now {OTHER[name]!r}): importances are kept" in checkpoint_warnings[0]
    assert set(resumed.draws[0].rate) != {1.0}, "rates follow from the saved importances"
    visits = state["sampler"]["record"]["visits"].sum()
    assert visits_of(resumed) == visits + sum(len(draw.index) for draw in resumed.draws)
    if name == "uniform_fraction":
        assert max(resumed.draws[0].weight) <= 1 / 0.6 + 1e-6
        assert min(tiny.logged(resumed, "importance/uniform_fraction")[7:]) >= 0.6  # from the resumed steps


def test_importances_start_unknown_with_another_metric(tmp_path, checkpoint_warnings):
    train(tmp_path, tiny.FIXED)
    resumed = resume(tmp_path, 7, {**tiny.FIXED, "metric": "loss"})
    warning = "metric='logit_gradient' (now 'loss'), a different metric: importances start unknown"
    assert warning in checkpoint_warnings[0]
    assert set(resumed.draws[0].rate) == {1.0}


def test_resuming_without_the_record_is_exact_and_silent(tmp_path, checkpoint_warnings):
    uninterrupted = train(tmp_path)
    resumed = resume(tmp_path, 7, {"record": False})
    assert checkpoint_warnings == []
    assert tiny.difference(uninterrupted, resumed) == 0.0


def test_budget_can_change_between_fixed_and_auto(tmp_path, checkpoint_warnings):
    """Each step of a fixed budget counts as one; a fixed budget ignores the effective steps."""
    train(tmp_path / "fixed", tiny.FIXED)
    resumed = resume(tmp_path / "fixed", 7)
    assert tiny.logged(resumed, "importance/effective_epoch")[0] == pytest.approx(8 / 5, abs=0.1)
    assert tiny.progress_of(resumed).finished
    train(tmp_path / "auto")
    resumed = resume(tmp_path / "auto", 7, tiny.FIXED)
    assert resumed.state.global_step == 15
    assert tiny.progress_of(resumed) is None
    assert checkpoint_warnings == []


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
    tiny.trained(tmp_path, tiny.WithoutConfig(scale=1.1), tiny.texts(), more=more, max_steps=5, **SAVING)
    with pytest.raises(ValueError, match="the model has its own loss"):
        resume_with(None)
    assert resume_with(scaled).state.global_step == 6


# ---- another batch size ----------------------------------------------------------------------------------------------


def test_importances_are_kept_with_another_batch_size(tmp_path, checkpoint_warnings):
    """An epoch has 20 batches of 2, of which the first 7 are skipped."""
    train(tmp_path)
    (state,) = load_states(tmp_path / "checkpoint-7")
    resumed = resume(tmp_path, 7, tiny.FIXED, per_device_train_batch_size=2)
    assert "a different number of processes, batch size" in checkpoint_warnings[0]
    assert visits_of(resumed) == state["sampler"]["record"]["visits"].sum() + 2 * len(resumed.draws)
    assert [draw.number for draw in resumed.draws] == list(range(53))
    assert set(resumed.draws[0].weight) != {1.0}, "weights follow from the saved importances"
    rate = rates(state["sampler"]["memory"]["importance"].double(), 0.3, 64.0)
    for draw in resumed.draws[:2]:  # of the first segment
        assert draw.weight == pytest.approx((1 / rate[draw.index]).tolist(), rel=1e-5)


def test_effective_epochs_are_kept_with_another_batch_size(tmp_path, checkpoint_warnings):
    """Epochs rather than steps, because steps differ in size."""
    train(tmp_path, **EARLY_END)
    (state,) = load_states(tmp_path / "checkpoint-30")
    resumed = resume(tmp_path, 30, **{**EARLY_END, "per_device_train_batch_size": 2})
    assert "a different number of processes, batch size" in checkpoint_warnings[0]
    progress = tiny.progress_of(resumed)
    first = tiny.logged(resumed, "importance/effective_epoch")[30]
    saved = state["effective"]["progress"]["value"] / 6
    assert saved < first < saved + 0.2
    assert saved > 5.05, "control: the steps alone would be 5 epochs"
    assert progress.steps == 8 * 12
    assert progress.finished


def test_learning_rate_decays_fully_with_larger_batches(tmp_path, checkpoint_warnings):
    """The first 12 steps were 2 of 8 epochs, and 12 larger ones remain at most."""
    train(tmp_path, **EARLY_END)
    resumed = resume(tmp_path, 12, **{**EARLY_END, "per_device_train_batch_size": 12})
    assert tiny.progress_of(resumed).finished
    assert resumed.state.epoch == 8
    assert 12 + 4 < resumed.state.global_step <= 12 + 12
    gain = tiny.progress_of(resumed).gain  # the last step begins at most that much before the end
    assert tiny.logged(resumed, "learning_rate")[-1] <= 2e-2 * gain**1.5 / 16 < 2e-2 / 4
