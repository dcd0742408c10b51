"""Resuming a training that started with the importances of another one."""

import shutil

import pytest
import tiny
import torch
from resuming import (
    assert_identical,
    checkpoint_of,
    copied_checkpoint,
    easy_texts,
    last_state,
    replace_state,
    resume,
    state_of,
    train,
)

SETTINGS = {"per_device_train_batch_size": 4, "num_train_epochs": 4, "learning_rate": 2e-2, "data": easy_texts}
PRIOR = torch.tensor([1.0 if i % 4 == 0 else 0.2 for i in range(24)])


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A training that started from the folder of another one, which is gone."""
    folder = tmp_path_factory.mktemp("started")
    train(folder / "first", **{**SETTINGS, "num_train_epochs": 2})
    shutil.copytree(folder / "first" / "checkpoint-12", folder / "start")
    run = train(folder / "run", {"start_from": folder / "start"}, **SETTINGS)
    shutil.rmtree(folder / "start")
    return run


def assert_kept(run, prior):
    """The prior of a training is this one, except for examples whose label was doubted meanwhile."""
    kept = run._run.sampler.visits.prior.isfinite()
    assert torch.equal(run._run.sampler.visits.prior[kept], prior[kept])
    assert kept.sum() > 12


def test_resumed_training_is_identical_without_the_other_one(started):
    """In the first epoch, when some examples are still unknown, and later; also without the setting."""
    start = started.importance_config.start_from
    for step, importance in ((2, {"start_from": start}), (3, {}), (9, {"start_from": torch.ones(24)})):
        resumed = resume(checkpoint_of(started, step), importance, **SETTINGS)
        assert_identical(resumed, started)
    assert last_state(started)["sampler"]["visits"]["prior"].isfinite().any()


def test_control_resumed_training_without_the_saved_importances_differs(tmp_path, started):
    checkpoint = copied_checkpoint(started, 2, tmp_path)
    sampler = state_of(checkpoint)["sampler"]
    replace_state(checkpoint, sampler={**sampler, "visits": {**sampler["visits"], "prior": None}})
    resumed = resume(checkpoint, **SETTINGS)
    assert resumed.draws != started.draws[2:]


def test_with_another_batch_size_they_are_kept(tmp_path, started, warned):
    checkpoint = copied_checkpoint(started, 2, tmp_path)
    resumed = resume(checkpoint, **{**SETTINGS, "per_device_train_batch_size": 6})
    assert "importances are kept" in warned()[0]
    assert_kept(resumed, state_of(checkpoint)["sampler"]["visits"]["prior"])


def test_where_the_checkpoint_has_none_training_starts_from_the_setting(tmp_path, started):
    checkpoint = copied_checkpoint(started, 2, tmp_path)
    for path in checkpoint.glob("importance_*.pt"):
        path.unlink()
    resumed = resume(checkpoint, {"start_from": PRIOR}, **SETTINGS)
    assert_kept(resumed, PRIOR)
    with pytest.raises(OSError, match="start_from="):
        resume(checkpoint, {"start_from": started.importance_config.start_from}, **SETTINGS)


def test_what_the_resumed_training_leaves_is_identical(started):
    resumed = resume(checkpoint_of(started, 3), **SETTINGS)
    left = [run._run.columns.for_another_training for run in (resumed, started)]
    assert torch.equal(*left)
    assert not torch.equal(left[0], resumed.importances), "control"
    assert tiny.difference(resumed, started) == 0.0
