"""Training runs with checkpoints, runs resumed from them, and their comparison."""

import math
import shutil
from pathlib import Path

import tiny
import torch
from tiny import Recorder

from hf_importance.run.checkpoints import SavedStates, save_state

MODEL = {"dropout": 0.1}
SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
AT_END = {**SAVING, "save_steps": 10_000}
"""Only the last step is saved."""


def easy_texts():
    return tiny.mostly_easy_texts(24)


EARLY_END = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "num_train_epochs": 8, "data": easy_texts}
"""Settings with which epochs end before their last step, of 48 steps in all."""


def train(folder, importance=None, data=tiny.texts, **settings):
    """Train without interruption and save every step; by default 40 examples in batches of 8, 3 epochs.

    `data` is a function, which makes the training data.
    """
    return tiny.trained(folder, tiny.bert(**MODEL), data(), Recorder, importance, **{**SAVING, **settings})


def resume(checkpoint, importance=None, data=tiny.texts, **settings):
    """Resume from a checkpoint into new objects; the output goes to the folder `resumed` beside it."""
    output = checkpoint.parent / "resumed"
    shutil.rmtree(output, ignore_errors=True)
    other = tiny.bert(**MODEL, initializer_range=0.5)  # its parameters must be replaced
    run = tiny.trainer(output, other, data(), Recorder, importance, **{**AT_END, **settings})
    torch.manual_seed(12345)
    run.train(resume_from_checkpoint=str(checkpoint))
    return run


def checkpoint_of(run, step):
    """The checkpoint of a step of a run."""
    return Path(run.args.output_dir) / f"checkpoint-{step}"


def copied_checkpoint(run, step, folder):
    """A copy of the checkpoint of a step in a folder."""
    return Path(shutil.copytree(checkpoint_of(run, step), folder / f"checkpoint-{step}"))


def state_of(checkpoint):
    """The saved state of a single process."""
    (state,) = SavedStates(checkpoint)
    return state


def replace_state(checkpoint, **changes):
    """Replace parts of the saved state of a single process."""
    save_state(checkpoint, 0, 1, {**state_of(checkpoint), **changes})


def last_state(run):
    """The saved state of the last step of a run."""
    return state_of(checkpoint_of(run, run.state.global_step))


def visits_in(state):
    """Visits per example in a saved state, also those that are not yet recorded."""
    visits = state["sampler"]["record"]["visits"].clone()
    for (_, index, *_), _ in state["sampler"]["measured"]:
        visits.index_add_(0, torch.tensor(index), torch.ones(len(index), dtype=visits.dtype))
    return visits


def assert_identical(resumed, uninterrupted):
    """Compare a resumed run with an uninterrupted one: steps, model, importances, draws, logs, and what is saved."""
    assert resumed.state.global_step == uninterrupted.state.global_step
    assert resumed.state.epoch == uninterrupted.state.epoch
    assert tiny.difference(resumed, uninterrupted) == 0.0
    assert torch.equal(resumed.importances.nan_to_num(-1), uninterrupted.importances.nan_to_num(-1))
    assert resumed.draws == uninterrupted.draws[len(uninterrupted.draws) - len(resumed.draws) :]
    for name in ("loss", "learning_rate", "importance/known", "importance/effective_epoch"):
        assert tiny.logged(resumed, name) == tiny.logged(uninterrupted, name)
    if resumed.draws:  # otherwise it has no step to save
        _assert_equal(last_state(resumed), last_state(uninterrupted), "state")


def _assert_equal(a, b, name):
    """Compare nested states; `name` is that of the part."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key, value in a.items():
            _assert_equal(value, b[key], f"{name}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for place, (mine, other) in enumerate(zip(a, b, strict=True)):
            _assert_equal(mine, other, f"{name}[{place}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), name
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)), name
