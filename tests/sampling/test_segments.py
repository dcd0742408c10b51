"""Segments: plain reshuffling with equal importances, the pass at which strata begin, sizes, state and restart."""

import math

import pytest
import torch
from sampling_helpers import (
    in_batches,
    memory_of,
    next_by_reference,
    next_segment,
    next_segments,
    permutation,
    random_importance,
    segmented_visits,
    visited_examples,
)
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory


def reshuffled(n, seed, passes):
    return [i for number in range(passes) for i in permutation(n, seed + number)]


# ---- equal importances: plain reshuffling ----------------------------------------------------------------------------

SIZES = [(23, 5), (100, 7), (64, 8), (17, 2), (9, 1), (5, 8), (3, 2), (1, 1)]  # examples and batch size


@pytest.mark.parametrize("importance", [math.nan, 0.7, 0.0], ids=["unknown", "equal", "zero"])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(("n", "batch"), SIZES)
def test_equal_importances_give_plain_reshuffling(n, batch, importance, guard):
    """In each of 4 passes, also if importances become known only during the first."""
    memory = memory_of([importance] * n, momentum=0.2)
    visits = segmented_visits(memory, batch, seed=3, guard=guard)
    drawn, batches = [], in_batches(visits, batch)
    while len(drawn) < 4 * n:
        index, rate = next(batches)
        assert rate.tolist() == [1.0] * len(index)
        drawn += index.tolist()
        measured = torch.full((len(index),), 0.0 if importance == 0 else 0.7)
        visits.observe(memory.update(index, measured), measured, rate.double())
    assert drawn == reshuffled(n, 3, passes=4)
    assert visits.passes == 4


@pytest.mark.parametrize(("n", "batch"), SIZES[:5])
def test_control_unequal_importances_do_not_give_plain_reshuffling(n, batch):
    """One example is twice as important as the others."""
    visits = segmented_visits(memory_of([0.7] * (n - 1) + [1.4]), batch, seed=3)
    drawn, rates = [], set()
    while len(drawn) < 4 * n:
        index, rate = next_segment(visits)
        drawn, rates = drawn + index, rates | {round(r, 4) for r in rate}
    assert drawn[: 4 * n] != reshuffled(n, 3, passes=4)
    assert len(rates) == 2


def test_ranks_use_distinct_seeds_in_every_pass():
    """Rank r of R starts with seed + r, and adds R after each pass."""
    for rank in range(3):
        visits = segmented_visits(memory_of([1.0] * 16), seed=5 + rank, stride=3)
        for number in range(3):
            assert visited_examples(visits, 8) == permutation(16, 5 + rank + 3 * number)


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(("n", "batch"), SIZES[:5])
def test_first_pass_is_the_permutation_while_importances_are_measured(n, batch, guard):
    """Unequal importances that become known during a pass take effect with the next, at which strata begin."""
    visits = segmented_visits(ImportanceMemory(n), batch, seed=3, guard=guard)
    importance, drawn, rates = tensor(random_importance(n, 1)), [], []
    while visits.passes < 3:
        index, rate = visits.plan()
        index = index.long()
        assert (visits.state_dict()["strata"] is None) == (visits.passes == 1)
        measured = importance[index]
        visits.observe(visits.memory.update(index, measured), measured, rate.double())
        drawn, rates = drawn + index.tolist(), rates + rate.tolist()
    assert drawn[:n] == permutation(n, 3)
    assert rates[:n] == [1.0] * n
    assert len(set(rates[n : 2 * n])) > n // 3, "control: not so the second pass"
    assert drawn[n : 2 * n] != permutation(n, 4)


@pytest.mark.parametrize("differ_in", [1, 2, 4])
def test_strata_begin_at_the_first_pass_that_begins_with_different_importances(differ_in):
    """Not within the pass in which they become different."""
    visits, n = segmented_visits(memory_of([0.7] * 40), 5, seed=3), 40
    for number in range(differ_in):
        drawn = []
        for k in range(8):
            drawn += next_segment(visits)[0]
            if (number, k) == (differ_in - 1, 2):
                visits.memory.importances[:] = tensor(random_importance(n, 1))
        assert drawn == permutation(n, 3 + number)
        assert visits.state_dict()["strata"] is None
    importance = visits.memory.importances.clone()
    visits.plan()
    state = visits.state_dict()
    assert state["order"] is None
    assert torch.equal(state["strata"]["importance"], importance), "of no example has the stratum ended yet"


@pytest.mark.parametrize("importance", [math.nan, 0.7], ids=["unknown", "equal"])
def test_first_pass_begins_with_a_given_example(importance):
    """It changes places with the one that the permutation begins with; the second pass is as it was."""
    for first in range(9):
        order = visited_examples(segmented_visits(memory_of([importance] * 9), seed=3, first=first), 16)
        expected = permutation(9, 3)
        place = expected.index(first)
        expected[0], expected[place] = expected[place], expected[0]
        assert order == expected + permutation(9, 4)
        assert order[0] == first
    plain = visited_examples(segmented_visits(memory_of([importance] * 9), seed=3), 16)
    assert plain == reshuffled(9, 3, 2) != order, "control: no example is given"


def test_global_generator_is_not_used():
    before = torch.get_rng_state()
    next_segments(segmented_visits(memory_of(random_importance(20, 0))), 20)
    next_segments(segmented_visits(memory_of([1.0] * 20)), 20)
    assert torch.equal(torch.get_rng_state(), before)


# ---- segment sizes and current rates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch", "sizes"),
    [
        (40, 1, [5] * 8),
        (40, 5, [5] * 8),
        (43, 5, [5, 5, 6, 5, 5, 6, 5, 6]),
        (40, 6, [6, 7, 7, 6, 7, 7]),
        (40, 15, [20, 20]),
        (40, 21, [40]),
        (40, 64, [40]),
        (7, 1, [1] * 7),
    ],
)
def test_pass_has_at_most_eight_segments_of_at_least_a_batch(n, batch, sizes):
    visits = segmented_visits(memory_of([1.0] * n), batch)
    assert [len(index) for index, _ in next_segments(visits, 2 * len(sizes))] == 2 * sizes
    assert visits.passes == 2
    assert min(sizes) >= min(batch, n)
    unequal = segmented_visits(memory_of(random_importance(n, 0)), batch)
    planned = [len(index) for index, _ in next_segments(unequal, 40 * len(sizes))]
    assert unequal.passes == 40
    assert abs(sum(planned) - 40 * n) <= n, "the same number of visits on average"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def draw_and_measure(visits, steps, measure=True):
    """A segment per step: examples, rates and floor."""
    found = []
    for k in range(steps):
        index, rate = visits.plan()
        index = index.long()
        found.append((index.tolist(), rate.tolist(), visits.floor))
        if measure:
            measured = tensor(random_importance(len(visits.memory), 0))[index] * (1 + k % 3)
            visits.observe(visits.memory.update(index, measured), measured, rate.double())
    return found


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("before", [0, 1, 2, 8, 60])
def test_segmented_visits_state_dict_restores_exactly(before, measure):
    def new_visits():
        return segmented_visits(ImportanceMemory(50, 0.2), 3, prune_mass=0.02, increment=0.001, guard=True)

    visits = new_visits()
    draw_and_measure(visits, before, measure)
    state, memory = visits.state_dict(), visits.memory.state_dict()
    wanted = draw_and_measure(visits, 80, measure)
    for _ in range(2):  # twice, because the state must not change
        again = new_visits()
        again.memory.load_state_dict(memory)
        again.load_state_dict(state)
        assert draw_and_measure(again, 80, measure) == wanted
        moments = [either.state_dict()["guard"]["second_moments"] for either in (again, visits)]
        assert torch.equal(*moments)
    without_state = new_visits()
    without_state.memory.load_state_dict(memory)
    if before:
        assert draw_and_measure(without_state, 80, measure) != wanted, "control"
    assert (state["strata"] is not None) == (before > 8 and measure), "premise: before and within strata"


@pytest.mark.parametrize("name", ["importance", "place", "position", "rng"])
def test_control_every_part_of_the_strata_is_needed(name):
    def new_visits():
        return segmented_visits(ImportanceMemory(50, 0.2), 3, guard=True)

    visits = new_visits()
    draw_and_measure(visits, 60)
    state, memory = visits.state_dict(), visits.memory.state_dict()
    wanted = draw_and_measure(visits, 80)
    later = visits.state_dict()["strata"][name]
    again = new_visits()
    again.memory.load_state_dict(memory)
    again.load_state_dict({**state, "strata": {**state["strata"], name: later}})
    assert draw_and_measure(again, 80) != wanted


def test_restart_begins_a_pass_with_its_own_permutation():
    visits = segmented_visits(memory_of([1.0] * 30), 3, seed=4)
    visits.restart(passes=2)
    assert visits.begins_pass
    assert visited_examples(visits, 8) == permutation(30, 6)
    assert visits.passes == 3


def test_restart_with_unequal_importances_begins_strata():
    """With the places of that pass; the rates are those of the current memory from the first visit on."""
    importance = random_importance(30, 0)
    visits = segmented_visits(memory_of(importance), 3, seed=4)
    visits.restart(passes=2)
    wanted, _ = next_by_reference(visits, 3, seed=6)
    index, rate = next_segment(visits)
    assert index == [i for _, i, _ in wanted]
    assert rate == pytest.approx([r for *_, r in wanted], rel=1e-4)
    assert visits.passes == 3
    other = segmented_visits(memory_of(importance), 3, seed=4)
    next_segment(other)
    places = [v.state_dict()["strata"]["place"] for v in (visits, other)]
    assert not torch.equal(*places), "control: places of another pass"
