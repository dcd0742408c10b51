"""Segments with `prune_mass` and `importance_increment`."""

import math

import oracles
import pytest
import torch
from sampling_helpers import (
    memory_of,
    next_by_reference,
    next_segment,
    next_segments,
    random_importance,
    segmented_visits,
    visited_examples,
)
from torch import tensor


def test_pruned_examples_are_not_drawn():
    q = [0.001] * 5 + [1.0, 2.0, 3.0] * 5
    memory = memory_of(q)
    visits, unpruned = (segmented_visits(memory, 2, prune_mass=mass) for mass in (0.01, 0.0))
    next_segments(visits, 8)
    assert visits.pruned is None, "nothing is pruned in the first pass"
    for _ in range(10):
        for index, rate in next_segments(visits, 8):
            assert not set(index) & set(range(5))
            wanted = oracles.rates(q[5:], 0.3)
            assert rate == pytest.approx([wanted[i - 5] for i in index], rel=1e-5)
        assert visits.pruned.tolist() == [True] * 5 + [False] * 15
    assert set(visited_examples(unpruned, 88)) >= set(range(5)), "control"


def test_visits_with_pruning_match_reference():
    """The number of visits is unchanged; the remaining examples have all of them."""
    q = [0.001] * 5 + [0.1 + q for q in random_importance(15, 0)]
    memory = memory_of(q)
    visits = segmented_visits(memory, 4, prune_mass=0.002, seed=3)
    for k in range(40):
        pruned = [k >= 5 and i < 5 for i in range(20)]
        wanted, after = next_by_reference(visits, 4, 3, pruned=pruned)
        before = visits.state_dict()["strata"]
        index, rate = next_segment(visits)
        assert index == [i for _, i, _ in wanted]
        assert rate == pytest.approx([r for _, _, r in wanted], rel=1e-4)
        state = visits.state_dict()["strata"]
        assert state["position"].tolist() == pytest.approx([position for _, position, _ in after], abs=1e-4)
        assert k < 5 or torch.equal(state["position"][:5], before["position"][:5]), "their time stands still"
    assert visits.pruned.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_equally_important_unpruned_examples_are_visited_evenly():
    """Although all their rates are equal, the pass is not the whole permutation."""
    memory = memory_of([0.001] * 2 + [1.0] * 8)
    visits = segmented_visits(memory, 2, prune_mass=0.01)
    counts = torch.bincount(tensor(visited_examples(visits, 5)), minlength=10)
    passed, before = oracles.rates(memory.importances.tolist(), 0.3)[2], counts[:2].clone()
    for _ in range(40):
        index, rate = next_segment(visits)
        assert rate == pytest.approx([1.0] * len(rate), rel=1e-5)
        counts += torch.bincount(tensor(index, dtype=torch.int64), minlength=10)
        passed += 2 / 8
        assert torch.equal(counts[:2], before)
        assert math.floor(passed) <= counts[2:].min() <= counts[2:].max() <= math.floor(passed) + 1, "one per stratum"


def test_pruned_examples_return_when_others_become_less_important():
    memory = memory_of([0.1, 0.1] + [1.0] * 8)
    visits = segmented_visits(memory, 10, prune_mass=0.05)
    next_segment(visits)
    next_segment(visits)
    assert visits.pruned.nonzero().flatten().tolist() == [0, 1]
    memory.importances[2:] = 0.05
    assert visits.pruned.any(), "the current pass is unchanged"
    drawn = visited_examples(visits, 2)
    assert visits.pruned is None or not visits.pruned[:2].any()
    assert {0, 1} <= set(drawn)


def test_pruning_looks_at_the_start_of_the_stratum():
    """What a visit measures does not end its stratum, or the weight of the visit would be too large for its time."""
    memory = memory_of([0.6] * 5 + [1.4] * 5)
    visits = segmented_visits(memory, 10, uniform_fraction=0.0, prune_mass=0.05)
    for _ in range(2):
        next_segment(visits)
        memory.importances[0] = 0.001
        assert memory.unimportant(0.05).tolist() == [True] + [False] * 9, "premise"
        assert visits.pruned is None
    assert visits.state_dict()["strata"]["importance"][0] == tensor(0.001), "its stratum has ended in the second pass"
    next_segment(visits)
    assert visits.pruned.tolist() == [True] + [False] * 9


def test_unknown_examples_are_never_pruned():
    memory = memory_of([math.nan, 0.001, math.nan, *[1.0] * 7])
    visits = segmented_visits(memory, 10, prune_mass=0.2)
    drawn = visited_examples(visits, 5)
    assert visits.pruned.nonzero().flatten().tolist() == [1]
    assert {0, 2} <= set(drawn)


def test_pruning_ends_after_resuming_without_prune_mass():
    """All examples are drawn again from the next pass on."""
    q = [0.001, 1.0, 2.0, 0.001, 1.0, 3.0]
    for mass in (0.0, 0.01):
        pruning = segmented_visits(memory_of(q), 6, prune_mass=0.01)
        for _ in range(2):
            next_segment(pruning)
        assert pruning.pruned.sum() == 2
        visits = segmented_visits(memory_of(q), 6, prune_mass=mass)
        visits.load_state_dict(pruning.state_dict())
        for _ in range(2):
            next_segment(visits)
        assert (visits.pruned is None) == (mass == 0)


@pytest.mark.parametrize("increment", [0.1, 0.0])
def test_pruned_examples_return_through_the_increment(increment):
    """Their stratum stands still, so that only the increment changes the importance with which it began."""
    memory = memory_of([0.01, 0.01] + [1.0] * 8)
    visits = segmented_visits(memory, 10, prune_mass=0.05, increment=increment)
    next_segment(visits)
    pruned = []
    for _ in range(8):
        next_segment(visits)
        pruned.append(visits.pruned is not None)
    assert pruned[0]
    assert pruned[-1] == (increment == 0), "control: without it they stay"


def test_increment_is_added_at_the_end_of_each_pass():
    memory = memory_of([0.0, 1.0, math.nan, 2.0])
    visits = segmented_visits(memory, 4, increment=0.5)
    next_segment(visits)
    assert memory.importances.tolist() == pytest.approx([0.0, 1.0, math.nan, 2.0], nan_ok=True)
    for times in (1, 2):
        next_segment(visits)
        wanted = [0.5 * times, 1 + 0.5 * times, math.nan, 2 + 0.5 * times]
        assert memory.importances.tolist() == pytest.approx(wanted, nan_ok=True)
