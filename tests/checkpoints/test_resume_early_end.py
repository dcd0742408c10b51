"""Resumed training that ends early, when the effective steps are complete."""

import itertools

import pytest
import tiny
from resuming import (
    EARLY_END,
    assert_identical,
    checkpoint_of,
    copied_checkpoint,
    last_state,
    replace_state,
    resume,
    state_of,
)

SETTINGS = {
    "default": {},
    "replacement": {"importance": {"sampling": "replacement"}},
    "accumulation": {"gradient_accumulation_steps": 2, "data": tiny.mostly_easy_texts, "num_train_epochs": 10},
    "workers": {"dataloader_num_workers": 2, "importance": {"prune_mass": 0.02}},
    "max_steps": {"max_steps": 48, "lr_scheduler_type": "cosine"},
}
REQUESTED = {"accumulation": 50}
"""Steps that are asked for, 48 by default."""


def effective_steps(state):
    return state["effective"]["progress"]["value"]


def _within_a_shortened_epoch(run, steps):
    """The second step of the last epoch that has several steps but fewer than the first."""
    loops = [state_of(checkpoint_of(run, step))["effective"]["loop"] for step in range(1, steps + 1)]
    ends = [step for step, loop in enumerate(loops, 1) if not loop["steps"]]
    assert [loops[end - 1]["finished"] for end in ends] == list(range(1, len(ends) + 1)), (
        "premise: no epoch is left out"
    )
    lengths = {begin: end - begin for begin, end in itertools.pairwise(ends)}
    return max(begin for begin, length in lengths.items() if 3 <= length < ends[0]) + 2


@pytest.mark.parametrize("case", SETTINGS)
def test_resumed_training_that_ends_early_is_identical(uninterrupted, case):
    """Resumed within a shortened epoch, and from the last step, which leaves none; once also from others."""
    settings = {**EARLY_END, **SETTINGS[case]}
    run, requested = uninterrupted(**settings), REQUESTED.get(case, 48)
    steps = run.state.global_step
    assert steps < requested, "premise: training ends early"
    assert effective_steps(last_state(run)) >= requested
    assert not checkpoint_of(run, steps + 1).exists()
    others = (1, steps - 2, steps - 1) if case == "default" else ()
    for step in (*others, _within_a_shortened_epoch(run, steps), steps):
        resumed = resume(checkpoint_of(run, step), **settings)
        assert len(resumed.draws) >= steps - step
        assert_identical(resumed, run)
    assert resumed.draws == [], "no step is left at the end"


def test_control_training_without_saved_effective_steps_does_not_end(tmp_path, uninterrupted):
    run = uninterrupted(**EARLY_END)
    steps = run.state.global_step
    for step in (steps - 1, steps):
        checkpoint = copied_checkpoint(run, step, tmp_path)
        assert (effective_steps(state_of(checkpoint)) >= 48) == (step == steps)
        replace_state(checkpoint, effective=None)
        assert resume(checkpoint, **EARLY_END).state.global_step > steps


@pytest.mark.parametrize("part", ["progress", "gradients", "measured_until", "pending"])
def test_control_effective_steps_depend_on_each_saved_part(tmp_path, uninterrupted, part):
    """The part is replaced by that of an earlier checkpoint."""
    settings = {**EARLY_END, "num_train_epochs": 5, "logging_steps": 1000}
    run = uninterrupted(**settings)
    checkpoint = copied_checkpoint(run, 12, tmp_path)
    earlier = state_of(checkpoint_of(run, 1))["effective"][part]
    replace_state(checkpoint, effective={**state_of(checkpoint)["effective"], part: earlier})
    assert effective_steps(last_state(resume(checkpoint, **settings))) != effective_steps(last_state(run))
