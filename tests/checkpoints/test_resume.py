"""Resumed training is identical to uninterrupted training."""

import shutil

import pytest
import tiny
import torch
from resuming import assert_identical, checkpoint_of, copied_checkpoint, resume, state_of

SETTINGS = {
    "default": {},
    "all steps": {"importance": tiny.FIXED},
    "replacement": {"importance": {"sampling": "replacement"}},
    "pruning, fewer visits": {
        "importance": {"prune_mass": 0.1, "sampling": "replacement", **tiny.visits(0.7), "importance_increment": 0.01}
    },
    "pruning": {"importance": {"prune_mass": 0.1}},
    "weight exponent": {"importance": {"weight_exponent": 0.5, "memory_momentum": 0.0}},
    "uniform": {"importance": {"metric": "uniform"}},
    "accumulation": {"gradient_accumulation_steps": 3},
    "workers": {"dataloader_num_workers": 2},
    "persistent workers, accumulation": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "gradient_accumulation_steps": 3,
        "importance": {"sampling": "replacement"},
    },
    "smaller last batch": {"per_device_train_batch_size": 7},
    "drop_last": {"per_device_train_batch_size": 7, "dataloader_drop_last": True},
    "bf16": {"bf16": True},
    "ignore_data_skip": {"ignore_data_skip": True, "gradient_accumulation_steps": 3, "importance": tiny.FIXED},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_training_is_identical(uninterrupted, case):
    """Resumed from the end of an epoch, and within the next; for some settings also from the first and last step."""
    settings = SETTINGS[case]
    run = uninterrupted(**settings)
    steps = run.state.global_step
    assert steps == run.state.max_steps
    within = (steps // 3, steps // 2)
    for step in within if case not in ("default", "all steps") else (1, *within, steps - 1):
        resumed = resume(checkpoint_of(run, step), **settings)
        assert 0 < len(resumed.draws) < len(run.draws)
        assert_identical(resumed, run)


def test_training_resumed_twice_is_identical(tmp_path, uninterrupted):
    once = resume(copied_checkpoint(uninterrupted(), 4, tmp_path), save_steps=9)
    shutil.copytree(checkpoint_of(once, 9), tmp_path / "checkpoint-9")
    assert_identical(resume(tmp_path / "checkpoint-9"), uninterrupted())


def test_finished_training_is_resumed_without_steps(uninterrupted):
    run = uninterrupted(tiny.FIXED)
    resumed = resume(checkpoint_of(run, 15), tiny.FIXED)
    assert resumed.draws == []
    assert_identical(resumed, run)


def test_control_resumed_training_without_importance_files_differs(tmp_path, uninterrupted):
    checkpoint = copied_checkpoint(uninterrupted(), 7, tmp_path)
    for path in checkpoint.glob("importance_*"):
        path.unlink()
    assert tiny.difference(resume(checkpoint), uninterrupted()) > 1e-6


def test_saved_state_is_small_and_loads_without_code(uninterrupted):
    checkpoint = checkpoint_of(uninterrupted(**SETTINGS["workers"]), 4)
    state = state_of(checkpoint)  # torch.load(weights_only=True)
    sampler = state["sampler"]
    assert sampler["shard"] is None
    assert len(sampler["outstanding"]) == 1, "all 5 batches of the epoch are drawn, and 4 used"
    assert sampler["memory"]["importance"].dtype == torch.float32
    index = sampler["planned"]["index"]
    assert index.untyped_storage().nbytes() == 4 * len(index), "a view's whole storage is saved"
    parts = {"settings", "data", "sampler", "effective", "objective", "figures", "backward", "unweighted"}
    assert set(state) == {"format", "rank", "ranks"} | parts
    assert state["format"] == 11
    assert state["effective"]["progress"]["value"] >= 4
    (path,) = checkpoint.glob("importance_*.pt")
    assert path.stat().st_size < 40_000
