"""Segments: plain reshuffling with equal importances, credits, sizes, current rates, first visits, state."""

import math

import oracles
import pytest
import torch
from sampling_helpers import (
    memory_of,
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
    drawn = []
    while len(drawn) < 4 * n:
        index, rate = visits.next(batch)
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
        drawn, rates = drawn + index, rates | set(rate)
    assert drawn[: 4 * n] != reshuffled(n, 3, passes=4)
    assert len(rates) == 2


def test_ranks_use_distinct_seeds_in_every_pass():
    """Rank r of R starts with seed + r, and adds R after each pass."""
    for rank in range(3):
        visits = segmented_visits(memory_of([1.0] * 16), seed=5 + rank, stride=3)
        for number in range(3):
            assert visited_examples(visits, 8) == permutation(16, 5 + rank + 3 * number)


def test_global_generator_is_not_used():
    before = torch.get_rng_state()
    next_segments(segmented_visits(memory_of(random_importance(20, 0))), 20)
    next_segments(segmented_visits(memory_of([1.0] * 20)), 20)
    assert torch.equal(torch.get_rng_state(), before)


# ---- credits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_first", [0, 1, 3, 8, 11])
@pytest.mark.parametrize(("n", "batch", "number"), [(40, 5, 8), (37, 4, 8), (37, 10, 3), (6, 4, 1)])
def test_visits_match_reference(n, batch, number, equal_first):
    """The first segments have equal rates; their credits are carried on to the end of the pass."""
    memory = memory_of([1.0] * n)
    visits = segmented_visits(memory, batch, seed=7)
    bounds = [n * k // number for k in range(number + 1)]
    credit = oracles.first_credits(permutation(n, 7))
    for k in range(equal_first + 20):
        if k % number == 0:
            credit = oracles.first_credits(permutation(n, 7 + k // number))
        if k >= equal_first:
            memory.importances[:] = tensor(random_importance(n, k))
        wanted = oracles.rates(memory.importances.tolist(), 0.3)
        size = bounds[k % number + 1] - bounds[k % number]
        expected, credit = oracles.spend(credit, wanted, size)
        index, rate = next_segment(visits)
        assert index == expected
        assert rate == pytest.approx([wanted[i] for i in index], rel=1e-5)
        remaining = visits.state_dict()["credit"]
        assert remaining is None or 0 <= remaining.min() <= remaining.max() < 1


def test_reference_with_equal_rates_is_the_permutation():
    credit = oracles.first_credits(permutation(7, 0))
    first, credit = oracles.spend(credit, [1.0] * 7, 3)
    second, credit = oracles.spend(credit, [1.0] * 7, 4)
    assert first + second == permutation(7, 0)
    assert credit == pytest.approx(oracles.first_credits(permutation(7, 0)))


def test_visits_do_not_depend_on_the_chunk_size(monkeypatch):
    def run(chunk):
        monkeypatch.setattr("hf_importance.sampling.memory.CHUNK", chunk)
        memory = memory_of([math.nan] * 100)
        visits = segmented_visits(memory, 4, prune_mass=0.02, guard=True)
        found = []
        for _ in range(40):
            index, rate = (tensor(x) for x in next_segment(visits))
            measured = tensor(random_importance(100, 0))[index]
            visits.observe(memory.update(index, measured), measured, rate)
            found.append((index.tolist(), rate.tolist()))
        assert visits.pruned.any()
        return found

    whole = run(2**20)
    assert {i for index, _ in whole[:16] for i in index} == set(range(100))
    for chunk in (16, 64):
        found = run(chunk)
        assert [index for index, _ in found] == [index for index, _ in whole]
        for (_, rate), (_, wanted) in zip(found, whole, strict=True):
            assert rate == pytest.approx(wanted, rel=1e-6)
    monkeypatch.setattr(ImportanceMemory, "chunks", lambda _: iter([slice(0, 96)]))
    assert [index for index, _ in run(16)] != [index for index, _ in whole], "control: a missing chunk is detected"


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


def test_rates_are_those_at_the_start_of_the_segment():
    """The memory changes at every visit."""
    memory = memory_of([1.0] * 40)
    visits, outdated, planned = segmented_visits(memory, 5), 0, 0
    for k in range(400):
        memory.importances[:] = tensor(random_importance(40, k))
        current = oracles.rates(memory.importances.tolist(), 0.3)
        if not visits.planned:
            wanted, planned = current, planned + 1
        index, rate = visits.next(1)
        assert rate.tolist() == pytest.approx([wanted[i] for i in index.tolist()], rel=1e-5)
        outdated += rate.tolist() != pytest.approx([current[i] for i in index.tolist()], rel=1e-5)
    assert 76 <= planned <= 84, "8 times a pass"
    assert outdated > 300, "control: the memory has changed since"


def test_rates_have_an_upper_bound():
    visits = segmented_visits(memory_of([0.0] * 999 + [1.0]), 10, uniform_fraction=0.3)
    rates = {i: r for index, rate in next_segments(visits, 30) for i, r in zip(index, rate, strict=True)}
    mean = (999 * 0.3 + 64) / 1000
    assert rates[999] == pytest.approx(64 / mean)
    assert rates[0] == pytest.approx(0.3 / mean)


# ---- first visits ----------------------------------------------------------------------------------------------------


def test_unvisited_examples_have_the_mean_of_recent_first_visits():
    n = 80
    importance = torch.linspace(0.1, 2.0, n)
    memory = ImportanceMemory(n)
    visits = segmented_visits(memory, 10, seed=2)
    fresh, equal_to_mean_of_known = math.nan, []
    for k in range(8):
        index, rate = (tensor(x) for x in next_segment(visits))
        wanted = oracles.rates(memory.importances.tolist(), 0.3, fresh=fresh)
        assert rate.tolist() == pytest.approx([wanted[i] for i in index], rel=1e-5)
        with_mean_of_known = oracles.rates(memory.importances.tolist(), 0.3)
        equal_to_mean_of_known.append(rate.tolist() == pytest.approx([with_mean_of_known[i] for i in index], rel=1e-3))
        measured = importance[index] / (1 + k)  # all importances decrease
        first = measured[memory.importances[index].isnan()]
        assert len(first), "premise"
        fresh = first.mean().item()
        for part in range(0, len(index), 3):
            now = slice(part, part + 3)
            visits.observe(memory.update(index[now], measured[now]), measured[now], rate[now])
    assert equal_to_mean_of_known[0], "no importance is known"
    assert sum(equal_to_mean_of_known) <= 2, "control: the mean of all known importances differs"


def test_non_finite_measurements_do_not_count_as_first_visits():
    memory = ImportanceMemory(8)
    visits = segmented_visits(memory, 4, seed=2)
    index, _ = next_segment(visits)
    measured = tensor([math.nan, math.inf, 2.0, 4.0])
    visits.observe(memory.update(tensor(index), measured), measured, torch.ones(4))
    next_segment(visits)
    assert visits.state_dict()["fresh"] == 3.0


def test_mean_of_first_visits_is_kept_while_nothing_is_measured():
    memory = ImportanceMemory(9)
    visits = segmented_visits(memory, 2, seed=2)
    index, _ = next_segment(visits)
    visits.observe(memory.update(tensor(index), tensor([2.0, 4.0])), tensor([2.0, 4.0]), torch.ones(2))
    for _ in range(3):
        next_segment(visits)
        assert visits.state_dict()["fresh"] == 3.0
        assert visits.state_dict()["mean"] == 3.0


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def draw_and_measure(visits, steps, measure=True):
    """3 visits per step: examples, rates and floor."""
    found = []
    for k in range(steps):
        index, rate = visits.next(3)
        found.append((index.tolist(), rate.tolist(), visits.floor))
        if measure:
            measured = tensor(random_importance(len(visits.memory), 0))[index] * (1 + k % 3)
            visits.observe(visits.memory.update(index, measured), measured, rate.double())
    return found


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("before", [0, 1, 2, 17, 60])
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


def test_state_dict_stores_only_the_remaining_visits_of_a_segment():
    visits = segmented_visits(memory_of([1.0] * 1000), 10)
    visits.next(10)
    assert visits.state_dict()["index"].untyped_storage().nbytes() == 4 * 115


def test_restart_begins_a_pass_with_its_own_permutation():
    visits = segmented_visits(memory_of([1.0] * 30), 3, seed=4)
    visits.restart(passes=2)
    assert visits.begins_pass
    assert visited_examples(visits, 8) == permutation(30, 6)
    assert visits.passes == 3
