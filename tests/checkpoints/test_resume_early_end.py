"""Resumed training that ends early, when the effective steps are complete."""

import pytest
import tiny
from resuming import EARLY_END, assert_identical, resume, train

from hf_importance.checkpoint import load_states, save_state

SETTINGS = {
    "default": {},
    "replacement": {"importance": {"sampling": "replacement"}},
    "accumulation": {"gradient_accumulation_steps": 2, "data": tiny.texts()},
    "workers": {"dataloader_num_workers": 2, "importance": {"prune_mass": 0.02}},
    "max_steps": {"max_steps": 48, "lr_scheduler_type": "cosine"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_training_that_ends_early_is_identical(tmp_path, case):
    """Resumed from the first step, the middle, and each of the last three; the last one leaves no step."""
    settings = {**EARLY_END, **SETTINGS[case]}
    uninterrupted = train(tmp_path, **settings)
    steps, progress = uninterrupted.state.global_step, tiny.progress_of(uninterrupted)
    assert steps < progress.steps, "premise: training ends early"
    assert progress.finished
    assert not (tmp_path / f"checkpoint-{steps + 1}").exists()
    for step in (1, steps // 2, steps - 2, steps - 1, steps):
        resumed = resume(tmp_path, step, **settings)
        assert len(resumed.draws) >= steps - step
        assert_identical(resumed, uninterrupted)
    assert resumed.draws == [], "no step is left at the end"


def test_control_training_without_saved_effective_steps_does_not_end(tmp_path):
    uninterrupted = train(tmp_path, **EARLY_END)
    steps = uninterrupted.state.global_step
    for step in (steps - 1, steps):
        (state,) = load_states(tmp_path / f"checkpoint-{step}")
        assert (state["effective"]["progress"]["value"] >= tiny.progress_of(uninterrupted).steps) == (step == steps)
        save_state(tmp_path / f"checkpoint-{step}", 0, 1, {**state, "effective": None})
        assert resume(tmp_path, step, **EARLY_END).state.global_step > steps


@pytest.mark.parametrize("part", ["progress", "gradients", "measured_until", "pending"])
def test_control_effective_steps_depend_on_each_saved_part(tmp_path, part):
    """The part is replaced by that of an earlier checkpoint."""
    settings = {**EARLY_END, "num_train_epochs": 3, "logging_steps": 1000}
    uninterrupted = train(tmp_path, **settings)
    (earlier,), (state,) = (load_states(tmp_path / f"checkpoint-{step}") for step in (1, 12))
    state["effective"][part] = earlier["effective"][part]
    save_state(tmp_path / "checkpoint-12", 0, 1, state)
    resumed = resume(tmp_path, 12, **settings)
    assert tiny.progress_of(resumed).value != tiny.progress_of(uninterrupted).value
