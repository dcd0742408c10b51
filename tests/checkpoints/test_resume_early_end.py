"""Resumed training that ends early, when the effective steps are complete."""

import itertools

import pytest
import tiny
from resuming import EARLY_END, assert_identical, resume, train

from hf_importance.run.checkpoints import load_states, save_state

SETTINGS = {
    "default": {},
    "replacement": {"importance": {"sampling": "replacement"}},
    "accumulation": {"gradient_accumulation_steps": 2, "data": tiny.mostly_easy_texts(), "num_train_epochs": 16},
    "workers": {"dataloader_num_workers": 2, "importance": {"prune_mass": 0.02}},
    "max_steps": {"max_steps": 48, "lr_scheduler_type": "cosine"},
}


def _within_a_shortened_epoch(folder, steps):
    """The second step of the last epoch that has several steps but fewer than the first."""
    (states,) = zip(*(load_states(folder / f"checkpoint-{step}") for step in range(1, steps + 1)), strict=True)
    loops = [state["effective"]["loop"] for state in states]
    ends = [step for step, loop in enumerate(loops, 1) if not loop["steps"]]
    assert [loops[end - 1]["finished"] for end in ends] == list(range(1, len(ends) + 1)), (
        "premise: no epoch is left out"
    )
    lengths = {begin: end - begin for begin, end in itertools.pairwise(ends)}
    return max(begin for begin, length in lengths.items() if 3 <= length < ends[0]) + 2


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_training_that_ends_early_is_identical(tmp_path, case):
    """Resumed from the first step, within a shortened epoch, and from each of the last three; the last leaves none."""
    settings = {**EARLY_END, **SETTINGS[case]}
    uninterrupted = train(tmp_path, **settings)
    steps, progress = uninterrupted.state.global_step, tiny.progress_of(uninterrupted)
    assert steps < progress.steps, "premise: training ends early"
    assert progress.finished
    assert not (tmp_path / f"checkpoint-{steps + 1}").exists()
    for step in (1, _within_a_shortened_epoch(tmp_path, steps), steps - 2, steps - 1, steps):
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
    settings = {**EARLY_END, "num_train_epochs": 5, "logging_steps": 1000}
    uninterrupted = train(tmp_path, **settings)
    (earlier,), (state,) = (load_states(tmp_path / f"checkpoint-{step}") for step in (1, 12))
    state["effective"][part] = earlier["effective"][part]
    save_state(tmp_path / "checkpoint-12", 0, 1, state)
    resumed = resume(tmp_path, 12, **settings)
    assert tiny.progress_of(resumed).value != tiny.progress_of(uninterrupted).value
