"""Checkpoints contain what is buffered: measurements that are not yet in the memory, and sums since the last log."""

import pytest
import tiny
import torch
from resuming import MODEL, SAVING, assert_identical, resume
from tiny import Recorder

from hf_importance.run.checkpoints import load_states, save_state

LARGE = {"save_steps": 28, "logging_steps": 1000, "num_train_epochs": 1.3}


def many_texts():
    """640 random texts: an epoch has 80 batches, more than are buffered at once."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, tiny.WORDS, (640, tiny.LENGTH), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row.sum()) % tiny.CLASSES}
        for row in rows
    ]


def train_and_resume(folder, step, change=lambda state: state, **settings):
    """An uninterrupted run, a run resumed from its checkpoint after a change of the state, and the original state."""
    settings = {**SAVING, **LARGE, **settings}
    uninterrupted = tiny.trained(folder, tiny.bert(**MODEL), many_texts(), Recorder, **settings)
    (state,) = load_states(folder / f"checkpoint-{step}")
    save_state(folder / f"checkpoint-{step}", 0, 1, change(state))
    return uninterrupted, resume(folder, step, data=many_texts(), **settings), state


@pytest.mark.parametrize("budget", ["auto", 1.0])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("sampling", "buffered"), [("reshuffled", 4), ("replacement", 1)])
def test_buffered_measurements_are_saved(tmp_path, sampling, buffered, workers, budget):
    """The memory is read, and therefore updated, when a segment is planned, or at each draw with replacement."""
    settings = {"importance": {"sampling": sampling, "budget": budget}, "dataloader_num_workers": workers}
    uninterrupted, resumed, state = train_and_resume(tmp_path, 84, **settings)  # 4 steps after the first pass
    measured = state["sampler"]["measured"]
    assert len(measured) >= buffered
    assert [draw[0] for draw, _ in measured] == list(range(84))[-len(measured) :]
    (draw, rows), remembered = measured[-1], state["sampler"]["memory"]["importance"]
    assert not torch.isin(rows[0], remembered[draw[1]]).any(), "premise: they are not in the memory yet"
    assert len(resumed.draws) == len(uninterrupted.draws) - 84 == 20
    assert_identical(resumed, uninterrupted)


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_control_resumed_training_without_buffered_measurements_differs(tmp_path, sampling):
    def drop_measurements(state):
        return {**state, "sampler": {**state["sampler"], "measured": []}}

    settings = {"importance": {"sampling": sampling, **tiny.FIXED}, "num_train_epochs": 2}
    uninterrupted, resumed, _ = train_and_resume(tmp_path, 84, drop_measurements, **settings)
    assert resumed.draws != uninterrupted.draws[84:]
    assert tiny.difference(resumed, uninterrupted) > 1e-6


@pytest.mark.parametrize("step", [4, 14])
def test_logs_of_resumed_training_are_identical(tmp_path, step):
    """The next log covers the steps since the previous one, with a checkpoint in between."""
    settings = {"logging_steps": 10, "save_steps": 2, "num_train_epochs": 0.7}
    uninterrupted, resumed, _ = train_and_resume(tmp_path, step, **settings)
    for name in ("variance_ratio", "mean", "effective_sample_size", "known"):
        assert tiny.logged(uninterrupted, f"importance/{name}")
        assert tiny.logged(resumed, f"importance/{name}") == tiny.logged(uninterrupted, f"importance/{name}")
    assert len(tiny.logged(resumed, "importance/mean")) == 5
