"""What is logged and said at the end of a training, and the figures of its examples."""

import pytest
import torch

from hf_importance.report.columns import Columns
from hf_importance.report.training import Training
from hf_importance.sampling.effective_steps import EffectiveSteps
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler


def training_of(progress, record=None):
    sampler = ImportanceBatchSampler(ImportanceMemory(4), 2, record=record)
    return Training(sampler, Columns(sampler, first=True), progress, has_lengths=False, token_losses=lambda index: {})


def test_shares_at_the_end_are_relative_to_uniform_sampling():
    progress = EffectiveSteps(steps=20, steps_per_epoch=5)
    progress.value = 21.5
    training = training_of(progress)
    assert training.at_end(15) == {"train_effective_epochs": 4.0, "train_share_of_steps": 0.75}
    assert training.ended(15) == "Importance sampling: ended after 15 of 20 steps (75%)."
    progress.value = 10.0
    assert training.at_end(15)["train_effective_epochs"] == 2.0, "control: stopped early"
    assert training_of(None).at_end(15) == {}, "all steps are made"


def test_findings_have_columns_history_and_settings():
    record = VisitRecord(4)
    record.update(torch.tensor([1]), torch.rand(4, 1))
    training = training_of(None, record)
    found = training.findings([{"step": 3, "importance/known": 1.0}], {0: "cat"}, {"prune_mass": 0.1})
    assert len(found) == training.examples == 4
    assert found.columns["visits"].tolist() == [0, 1, 0, 0]
    assert found.logged("known") == ([3], [1.0])
    assert (found.label_names, found.settings) == ({0: "cat"}, {"prune_mass": 0.1})


def test_state_has_the_figures_until_the_last_log():
    training = training_of(None)
    training.measured()
    restored = training_of(None)
    restored.load_state_dict(training.state_dict())
    assert restored.state_dict() == training.state_dict() != {}
    with pytest.raises(ValueError, match="weight must be a number"):
        restored.load_state_dict({"weight": "x"})
