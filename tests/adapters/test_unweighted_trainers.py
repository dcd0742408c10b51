"""Trainers of TRL whose draws cannot be weighted: they train as without importance sampling, and drop rows."""

import logging
import math

import pytest
import tiny
import trl_trainers
from trl_trainers import IGNORE_WARNINGS, coupled

pytestmark = IGNORE_WARNINGS


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, "hf_importance.messages")
    return lambda: [r.getMessage() for r in caplog.records if "as by Trainer" in r.getMessage()]


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer", "KTOTrainer"])
def test_coupled_trainers_of_trl(tmp_path, messages, dropping_rows, name):
    theirs = trl_trainers.trained(coupled(tmp_path, name))
    ours = trl_trainers.trained(coupled(tmp_path, name, {}))
    (told,) = messages()
    assert f"{name} cannot be used with importance sampling" in told
    assert tiny.logged(ours, "train_unweighted")[0] in told
    assert tiny.difference(ours, theirs) == 0.0
    assert tiny.logged(ours, "loss") == tiny.logged(theirs, "loss")
    other = trl_trainers.trained(coupled(tmp_path, name, {}, learning_rate=1.1e-2))
    assert tiny.difference(ours, other) > 1e-4, "control: another learning rate"

    dropping = trl_trainers.trained(coupled(tmp_path, name, {"backward": "selective"}))
    assert 0 < tiny.logged(dropping, "train_backward_fraction")[0] < 1
    assert all(math.isfinite(loss) for loss in tiny.logged(dropping, "loss"))
    assert tiny.difference(dropping, theirs) > 0
