"""Training runs with checkpoints, runs resumed from them, and their comparison."""

import shutil

import tiny
import torch
from tiny import Recorder

MODEL = {"dropout": 0.1}
SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
EARLY_END = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "num_train_epochs": 8}
EARLY_END["data"] = tiny.mostly_easy_texts(24)
"""Settings with which epochs end before their last step."""


def train(folder, importance=None, data=None, **settings):
    """Train without interruption and save every step; by default 40 examples in batches of 8, 3 epochs."""
    data = data or tiny.texts()
    return tiny.trained(folder, tiny.bert(**MODEL), data, Recorder, importance, **{**SAVING, **settings})


def resume(folder, step, importance=None, data=None, **settings):
    """Resume from the checkpoint of a step into new objects; the output goes to the subfolder `resumed`."""
    output = folder / "resumed"
    shutil.rmtree(output, ignore_errors=True)
    other = tiny.bert(**MODEL, initializer_range=0.5)  # its parameters must be replaced
    settings = {**SAVING, "save_strategy": "no", **settings}
    run = tiny.trainer(output, other, data or tiny.texts(), Recorder, importance, **settings)
    torch.manual_seed(12345)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return run


def collect_warnings(monkeypatch):
    """A list to which the warnings are added that are logged when a checkpoint is loaded."""
    warnings = []
    monkeypatch.setattr("hf_importance.hooks.checkpoints.logger.warning", warnings.append)
    return warnings


def record_of(run):
    """Record of the visits."""
    return run._sampler.record


def visits_of(run):
    """Number of recorded visits."""
    return record_of(run).columns()["visits"].sum()


def assert_identical(resumed, uninterrupted):
    """Compare a resumed run with an uninterrupted one: steps, model, importances, draws, record, progress and logs."""
    assert resumed.state.global_step == uninterrupted.state.global_step
    assert resumed.state.epoch == uninterrupted.state.epoch
    assert tiny.difference(resumed, uninterrupted) == 0.0
    assert torch.equal(resumed.importances.nan_to_num(-1), uninterrupted.importances.nan_to_num(-1))
    assert resumed.draws == uninterrupted.draws[len(uninterrupted.draws) - len(resumed.draws) :]
    _assert_identical_records(record_of(resumed), record_of(uninterrupted))
    _assert_identical_progress(tiny.progress_of(resumed), tiny.progress_of(uninterrupted))
    for name in ("loss", "learning_rate", "importance/known", "importance/effective_epoch"):
        assert tiny.logged(resumed, name) == tiny.logged(uninterrupted, name)


def _assert_identical_records(a, b):
    columns, others = a.columns(), b.columns()
    assert all(torch.equal(column.nan_to_num(-1), others[name].nan_to_num(-1)) for name, column in columns.items())
    assert len(a.distributions) == len(b.distributions)
    for mine, other in zip(a.distributions, b.distributions, strict=True):
        assert mine.visits == other.visits
        assert torch.equal(mine.visits_since, other.visits_since)


def _assert_identical_progress(a, b):
    if a is None or b is None:
        assert a is b
        return
    a, b = a.state_dict(), b.state_dict()
    assert torch.equal(a.pop("sums"), b.pop("sums"))
    assert a == b
