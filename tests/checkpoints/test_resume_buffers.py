"""Checkpoints contain what is buffered: measurements that are not yet in the memory, and sums since the last log."""

import pytest
import tiny
import torch
from resuming import assert_identical, checkpoint_of, copied_checkpoint, replace_state, resume, state_of


def many_texts():
    """160 random texts: an epoch has 80 batches of 2, more than are buffered at once."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, tiny.WORDS, (160, tiny.LENGTH), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row.sum()) % tiny.CLASSES}
        for row in rows
    ]


SETTINGS = {"data": many_texts, "per_device_train_batch_size": 2, "logging_steps": 1000}
LONG = {**SETTINGS, "save_steps": 28, "num_train_epochs": 1.3}
CASES = {
    "reshuffled": ({}, 4),
    "reshuffled, all steps, workers": (tiny.FIXED, 4),
    "replacement, workers": ({"sampling": "replacement"}, 1),
    "replacement, all steps": ({"sampling": "replacement", **tiny.FIXED}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_buffered_measurements_are_saved(uninterrupted, case):
    """The memory is read, and therefore updated, when a segment is planned, or at each draw with replacement."""
    importance, buffered = CASES[case]
    settings = {**LONG, "importance": importance, "dataloader_num_workers": 2 * ("workers" in case)}
    run = uninterrupted(**settings)
    checkpoint = checkpoint_of(run, 84)  # 4 steps after the first pass
    sampler = state_of(checkpoint)["sampler"]
    measured = sampler["measured"]
    assert len(measured) >= buffered
    assert [draw[0] for draw, _ in measured] == list(range(84))[-len(measured) :]
    (draw, rows), remembered = measured[-1], sampler["memory"]["importance"]
    assert not torch.isin(rows[0], remembered[draw[1]]).any(), "premise: they are not in the memory yet"
    resumed = resume(checkpoint, **settings)
    assert len(resumed.draws) == len(run.draws) - 84 == 20
    assert_identical(resumed, run)


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_control_resumed_training_without_buffered_measurements_differs(tmp_path, uninterrupted, sampling):
    importance, workers = {"sampling": sampling, **tiny.FIXED}, 0
    if sampling == "reshuffled":
        importance, workers = tiny.FIXED, 2
    settings = {**LONG, "importance": importance, "dataloader_num_workers": workers}
    run = uninterrupted(**settings)
    checkpoint = copied_checkpoint(run, 84, tmp_path)
    replace_state(checkpoint, sampler={**state_of(checkpoint)["sampler"], "measured": []})
    resumed = resume(checkpoint, **settings)
    assert resumed.draws != run.draws[84:]
    assert tiny.difference(resumed, run) > 1e-6


@pytest.mark.parametrize("step", [4, 14])
def test_logs_of_resumed_training_are_identical(uninterrupted, step):
    """The next log covers the steps since the previous one, with a checkpoint in between."""
    settings = {**SETTINGS, "logging_steps": 10, "save_steps": 2, "num_train_epochs": 0.4}
    run = uninterrupted(**settings)
    resumed = resume(checkpoint_of(run, step), **settings)
    for name in ("variance_ratio", "mean", "effective_sample_size", "known"):
        assert len(tiny.logged(run, f"importance/{name}")) == 3
        assert tiny.logged(resumed, f"importance/{name}") == tiny.logged(run, f"importance/{name}")
