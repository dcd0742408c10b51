"""Resumed training is identical to uninterrupted training."""

import shutil

import pytest
import tiny
import torch
from resuming import assert_identical, resume, train

from hf_importance.run.checkpoints import load_states

SETTINGS = {
    "default": {},
    "fixed budget": {"importance": tiny.FIXED},
    "replacement": {"importance": {"sampling": "replacement"}},
    "replacement, fixed budget": {"importance": {"sampling": "replacement", **tiny.FIXED}},
    "pruning, budget": {"importance": {"prune_mass": 0.1, "budget": 0.7, "importance_increment": 0.01}},
    "pruning": {"importance": {"prune_mass": 0.1}},
    "pruning, replacement": {"importance": {"prune_mass": 0.1, "sampling": "replacement"}},
    "weight exponent": {"importance": {"weight_exponent": 0.5, "memory_momentum": 0.0}},
    "uniform": {"importance": {"metric": "uniform"}},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, fixed budget": {"gradient_accumulation_steps": 3, "importance": tiny.FIXED},
    "workers": {"dataloader_num_workers": 2},
    "workers, replacement": {"dataloader_num_workers": 2, "importance": {"sampling": "replacement"}},
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
    "ignore_data_skip": {"ignore_data_skip": True, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_training_is_identical(tmp_path, case):
    settings = SETTINGS[case]
    uninterrupted = train(tmp_path, **settings)
    steps = uninterrupted.state.global_step
    assert steps == uninterrupted.state.max_steps
    for step in (1, steps // 3, steps // 2, steps - 1):
        resumed = resume(tmp_path, step, **settings)
        assert 0 < len(resumed.draws) < len(uninterrupted.draws)
        assert_identical(resumed, uninterrupted)


def test_training_resumed_twice_is_identical(tmp_path):
    uninterrupted = train(tmp_path)
    resume(tmp_path, 4, save_strategy="steps")
    shutil.copytree(tmp_path / "resumed" / "checkpoint-9", tmp_path / "checkpoint-9", dirs_exist_ok=True)
    assert tiny.difference(resume(tmp_path, 9), uninterrupted) == 0.0


def test_finished_training_is_resumed_without_steps(tmp_path):
    uninterrupted = train(tmp_path, tiny.FIXED)
    resumed = resume(tmp_path, 15, tiny.FIXED)
    assert resumed.draws == []
    assert_identical(resumed, uninterrupted)


def test_control_resumed_training_without_importance_files_differs(tmp_path):
    uninterrupted = train(tmp_path)
    for path in (tmp_path / "checkpoint-7").glob("importance_*"):
        path.unlink()
    resumed = resume(tmp_path, 7)
    assert tiny.difference(resumed, uninterrupted) > 1e-6


def test_saved_state_is_small_and_loads_without_code(tmp_path):
    train(tmp_path, dataloader_num_workers=2, max_steps=7)
    (state,) = load_states(tmp_path / "checkpoint-4")  # torch.load(weights_only=True)
    sampler = state["sampler"]
    assert sampler["shard"] is None
    assert len(sampler["outstanding"]) == 1, "all 5 batches of the epoch are drawn, and 4 used"
    assert sampler["memory"]["importance"].dtype == torch.float32
    visits = sampler["visits"]
    assert visits["index"].untyped_storage().nbytes() == 4 * len(visits["index"]), "a view's whole storage is saved"
    assert {"format", "rank", "ranks", "settings", "data", "sampler", "effective", "objective"} <= set(state)
    assert state["format"] == 8
    assert state["effective"]["progress"]["value"] >= 4
    path = next((tmp_path / "checkpoint-4").glob("importance_*.pt"))
    assert path.stat().st_size < 40_000
