"""Segments and credits: reference implementation, enumeration of all random starts, and evenness of the visits."""

import itertools
import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.segments import SegmentedVisits


def memory_of(importance, momentum=0.0):
    memory = ImportanceMemory(len(importance), momentum)
    memory.load_state_dict({"importance": tensor(importance)})
    return memory


def visits_from(memory, batch=1, **settings):
    return SegmentedVisits(memory, batch, **{"uniform_fraction": 0.3, "guard": False, **settings})


def segment(visits):
    """The whole next segment: examples and rates, as lists."""
    assert not visits.planned
    index, rate = visits.next(2**62)
    assert not visits.planned
    return index.tolist(), rate.tolist()


def segments(visits, number):
    return [segment(visits) for _ in range(number)]


def visited(visits, number):
    """Examples of the next segments."""
    return [i for index, _ in segments(visits, number) for i in index]


def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def reshuffled(n, seed, passes):
    return [i for epoch in range(passes) for i in permutation(n, seed + epoch)]


def random_importance(n, seed, power=2):
    return (torch.rand(n, generator=torch.Generator().manual_seed(1000 + seed)) ** power).tolist()


# ---- equal importances: plain reshuffling ----------------------------------------------------------------------------

SIZES = [(23, 5), (100, 7), (64, 8), (17, 2), (9, 1), (5, 8), (3, 2), (1, 1)]  # of data and batch


@pytest.mark.parametrize("known", [math.nan, 0.7, 0.0], ids=["unknown", "equal", "zero"])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(("n", "batch"), SIZES)
def test_equal_importances_are_plain_reshuffling_in_every_pass(n, batch, known, guard):
    """Also if they become known only now; 4 passes."""
    memory = memory_of([known] * n, momentum=0.2)
    visits = visits_from(memory, batch, seed=3, guard=guard)
    drawn = []
    while len(drawn) < 4 * n:
        index, rate = visits.next(batch)
        assert rate.tolist() == [1.0] * len(index)
        drawn += index.tolist()
        measured = torch.full((len(index),), 0.0 if known == 0 else 0.7)
        visits.observe(memory.update(index, measured), measured, rate.double())
    assert drawn == reshuffled(n, 3, passes=4)
    assert visits.passes == 4


@pytest.mark.parametrize(("n", "batch"), SIZES[:5])
def test_unequal_importances_are_not_plain_reshuffling(n, batch):
    """Control of the test above: one example is slightly more important."""
    visits = visits_from(memory_of([0.7] * (n - 1) + [1.4]), batch, seed=3)
    drawn, rates = [], set()
    while len(drawn) < 4 * n:
        index, rate = segment(visits)
        drawn, rates = drawn + index, rates | set(rate)
    assert drawn[: 4 * n] != reshuffled(n, 3, passes=4)
    assert len(rates) == 2


def test_seeds_of_ranks_do_not_meet():
    """Rank r of R starts with seed + r, and adds R after each pass."""
    for rank in range(3):
        visits = visits_from(memory_of([1.0] * 16), seed=5 + rank, stride=3)
        for number in range(3):
            drawn = visited(visits, 8)
            assert drawn == permutation(16, 5 + rank + 3 * number)


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    segments(visits_from(memory_of(random_importance(20, 0))), 20)
    segments(visits_from(memory_of([1.0] * 20)), 20)
    assert torch.equal(torch.get_rng_state(), before)


# ---- credit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_first", [0, 1, 3, 8, 11])
@pytest.mark.parametrize(("n", "batch", "number"), [(40, 5, 8), (37, 4, 8), (37, 10, 3), (6, 4, 1)])
def test_visits_are_those_of_the_oracle(n, batch, number, equal_first):
    """The first segments have equal rates; their credits are carried on to the end of the pass."""
    memory = memory_of([1.0] * n)
    visits = visits_from(memory, batch, seed=7)
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
        index, rate = segment(visits)
        assert index == expected
        assert rate == pytest.approx([wanted[i] for i in index], rel=1e-5)
        assert visits._credit is None or 0 <= visits._credit.min() <= visits._credit.max() < 1


def test_the_oracle_is_the_permutation_where_all_are_alike():
    credit = oracles.first_credits(permutation(7, 0))
    first, credit = oracles.spend(credit, [1.0] * 7, 3)
    second, credit = oracles.spend(credit, [1.0] * 7, 4)
    assert first + second == permutation(7, 0)
    assert credit == pytest.approx(oracles.first_credits(permutation(7, 0)))


def test_large_data_are_gone_through_in_pieces(monkeypatch):
    def run(piece):
        monkeypatch.setattr("hf_importance.sampling.memory.CHUNK", piece)
        memory = memory_of([math.nan] * 100)
        visits = visits_from(memory, 4, prune_mass=0.02, guard=True)
        found = []
        for _ in range(40):
            index, rate = (tensor(x) for x in segment(visits))
            measured = tensor(random_importance(100, 0))[index]
            visits.observe(memory.update(index, measured), measured, rate)
            found.append((index.tolist(), rate.tolist()))
        assert visits.pruned.any()
        return found

    whole = run(2**20)
    assert {i for index, _ in whole[:16] for i in index} == set(range(100))
    for piece in (16, 64):
        found = run(piece)
        assert [index for index, _ in found] == [index for index, _ in whole]
        for (_, rate), (_, wanted) in zip(found, whole, strict=True):
            assert rate == pytest.approx(wanted, rel=1e-6)
    monkeypatch.setattr(ImportanceMemory, "chunks", lambda _: iter([slice(0, 96)]))
    with pytest.raises(AssertionError):
        assert [index for index, _ in run(16)] == [index for index, _ in whole], "control: a piece is left out"


# ---- unbiased: every random start in turn ----------------------------------------------------------------------------

SCHEDULES = {  # rates of the segments, such that visits · rate is whole; of 2 passes
    "4 in 1s": (4, 1, [[1, 1, 1, 1], [2, 1, 1, 0], [0, 1, 0, 3], [3, 0, 1, 0], [0, 1, 1, 2], [1] * 4] * 2),
    "5 in 2s": (5, 2, [[0.5, 1, 1.5, 2, 0], [1, 1 / 3, 5 / 3, 2 / 3, 4 / 3], [1.5, 0.5, 0, 2.5, 0.5], [2, 1, 1, 1, 0]]),
    "first alike": (5, 1, [[1] * 5, [1] * 5, [3, 1, 1, 0, 0], [0, 1, 2, 1, 1], [1] * 5, [1, 0, 0, 4, 0]]),
    "6 in 2s": (6, 2, [[1] * 6, [2, 0.5, 0.5, 1, 1.5, 0.5], [0.5, 0.5, 3, 1, 0.5, 0.5], [1.5, 1.5, 1, 1, 1, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULES)
def test_unbiased_over_every_random_start(monkeypatch, case):
    """E visits of i = visits · r_i / N and E Σ weight · 1[visits i] = visits / N, in every segment, for every i."""
    n, batch, schedule = SCHEDULES[case]
    number = max(1, min(8, n // batch))
    counts, weights = torch.zeros(len(schedule), n).double(), torch.zeros(len(schedule), n).double()
    of_another_segment, starts = weights.clone(), math.factorial(n)
    for start in itertools.permutations(range(n)):
        monkeypatch.setattr(torch, "randperm", lambda *_, s=start, **__: tensor(s, dtype=torch.int32))
        memory = ImportanceMemory(n)
        visits = visits_from(memory, batch, uniform_fraction=0.0)
        for k, rates in enumerate(schedule):
            memory.importances[:] = tensor(rates, dtype=torch.float32)
            index, rate = segment(visits)
            for i, r in zip(index, rate, strict=True):
                counts[k, i] += 1 / starts
                weights[k, i] += 1 / r / starts
                of_another_segment[k, i] += 1 / (schedule[k - 1][i] or 1.0) / starts
    rates = tensor(schedule, dtype=torch.float64)
    sizes = [n * (k % number + 1) // number - n * (k % number) // number for k in range(len(schedule))]
    sizes = tensor(sizes, dtype=torch.float64)[:, None]
    assert ((sizes * rates) - (sizes * rates).round()).abs().max() < 1e-9, "premise"
    torch.testing.assert_close(counts, sizes * rates / n, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights, sizes / n * (rates > 0), rtol=1e-6, atol=1e-9)
    assert (of_another_segment - sizes / n * (rates > 0)).abs().max() > 0.05, "control"


# ---- even: over any stretch of visits --------------------------------------------------------------------------------


class RoundsIndependently(SegmentedVisits):
    """Control: correct rates with visits that are correct in expectation only."""

    def _plan_visits(self, visits, total):
        self._credit = torch.rand(len(self.memory))
        return super()._plan_visits(visits, total)


class DrawsIndependently(IndependentVisits):
    """Control: independent draws for a segment with the rates at its start."""

    def next(self, size):
        self._measure()
        index, rate = [], []
        while sum(map(len, index)) < 25:
            found = super().next(25 - sum(map(len, index)))
            index, rate = [*index, found[0]], [*rate, found[1]]
        return torch.cat(index), torch.cat(rate)


def spread(make, n=200, number=160, drift=0.1):
    """The largest difference between the visits of an example and its summed rates over an interval of a pass.

    Between segments, as planned; and between any two visits.
    """
    memory, rng = memory_of(random_importance(n, 0)), torch.Generator().manual_seed(0)
    visits = make(memory)
    worst = [0.0, 0.0]
    for k in range(number):
        if k % 8 == 0:
            between_segments, off = [torch.zeros(n).double()], torch.zeros(n).double()
            lowest, highest, now = (torch.zeros(n).double() for _ in range(3))
        rates = tensor(oracles.rates(memory.importances.tolist(), 0.3, max_rate=64.0), dtype=torch.float64)
        index, rate = segment(visits)
        assert rate == pytest.approx(rates[index].tolist(), rel=1e-5), "premise"
        off = off + torch.bincount(tensor(index), minlength=n) - 25 * rates / n
        between_segments.append(off)
        for i in index:
            now -= rates / n
            lowest = torch.minimum(lowest, now)
            now[i] += 1
            highest = torch.maximum(highest, now)
        memory.importances.mul_(torch.exp(drift * torch.randn(n, generator=rng)))
        spans = torch.stack(between_segments)
        worst[0] = max(worst[0], (spans.amax(0) - spans.amin(0)).max().item())
        worst[1] = max(worst[1], (highest - lowest).max().item())
    return tuple(worst)


@pytest.mark.parametrize(("drift", "within"), [(0.0, 1.25), (0.1, 3.0), (1.0, math.inf)])
def test_visits_are_as_even_as_the_rates_allow(drift, within):
    """Within one visit between any two segments, whatever the rates; between any two visits nearly so.

    Only nearly, as a segment has a few visits more or less than were planned, each of which counts r/N here. With rates
    that have drifted far apart, of up to 20, that is more.
    """
    between_segments, between_visits = spread(lambda memory: visits_from(memory, 25, seed=1), drift=drift)
    assert between_segments <= 1 + 1e-4
    assert between_visits <= within


@pytest.mark.parametrize("kind", ["rounds", "draws"])
def test_independent_visits_are_not(kind):
    """The control."""
    if kind == "rounds":
        found = spread(lambda memory: RoundsIndependently(memory, 25, uniform_fraction=0.3, guard=False))
    else:
        found = spread(lambda memory: DrawsIndependently(memory, uniform_fraction=0.3))
    assert found[0] > 2


def test_visits_within_a_segment_are_spread_over_it():
    """The visits of an example with rate 8 in a pass of one segment are evenly spaced."""
    memory = memory_of([8.0] + [56 / 63] * 63)
    visits = visits_from(memory, 64, uniform_fraction=0.0)
    index = visited(visits, 1)
    gaps = tensor([place for place, i in enumerate(index) if i == 0]).diff()
    assert len(gaps) == 7
    assert gaps.min() >= 6
    assert gaps.max() <= 10


# ---- rates are never older than a segment ----------------------------------------------------------------------------


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
def test_a_pass_has_eight_segments_or_fewer_and_none_is_smaller_than_a_batch(n, batch, sizes):
    visits = visits_from(memory_of([1.0] * n), batch)
    assert [len(index) for index, _ in segments(visits, 2 * len(sizes))] == 2 * sizes
    assert visits.passes == 2
    assert min(sizes) >= min(batch, n)
    unequal = visits_from(memory_of(random_importance(n, 0)), batch)
    planned = [len(index) for index, _ in segments(unequal, 40 * len(sizes))]
    assert unequal.passes == 40
    assert abs(sum(planned) - 40 * n) <= n, "as many on average"


def test_a_rate_is_never_older_than_a_segment():
    """The memory changes at every visit; rates are those when the segment was planned."""
    memory = memory_of([1.0] * 40)
    visits, stale, read = visits_from(memory, 5), 0, 0
    for k in range(400):
        memory.importances[:] = tensor(random_importance(40, k))
        if not visits.planned:
            wanted, read = oracles.rates(memory.importances.tolist(), 0.3), read + 1
        index, rate = visits.next(1)
        assert rate.tolist() == pytest.approx([wanted[i] for i in index.tolist()], rel=1e-5)
        stale += rate.tolist() != pytest.approx(
            [oracles.rates(memory.importances.tolist(), 0.3)[i] for i in index.tolist()], rel=1e-5
        )
    assert 76 <= read <= 84, "8 times a pass"
    assert stale > 300, "control: between, the memory was another one"


def test_no_rate_is_far_above_the_others():
    visits = visits_from(memory_of([0.0] * 999 + [1.0]), 10, uniform_fraction=0.3)
    rates = {i: r for index, rate in segments(visits, 30) for i, r in zip(index, rate, strict=True)}
    mean = (999 * 0.3 + 64) / 1000
    assert rates[999] == pytest.approx(64 / mean)
    assert rates[0] == pytest.approx(0.3 / mean)


# ---- the first pass learns from itself -------------------------------------------------------------------------------


def test_unvisited_examples_have_the_mean_of_recent_first_visits():
    n = 80
    true = torch.linspace(0.1, 2.0, n)
    memory = ImportanceMemory(n)
    visits = visits_from(memory, 10, seed=2)
    fresh, of_all = math.nan, []
    for k in range(8):
        index, rate = (tensor(x) for x in segment(visits))
        wanted = oracles.rates(memory.importances.tolist(), 0.3, fresh=fresh)
        assert rate.tolist() == pytest.approx([wanted[i] for i in index], rel=1e-5)
        careless = oracles.rates(memory.importances.tolist(), 0.3)
        of_all.append(rate.tolist() == pytest.approx([careless[i] for i in index], rel=1e-3))
        measured = true[index] / (1 + k)  # all is learnt, seen or not
        first = measured[memory.importances[index].isnan()]
        assert len(first), "premise"
        fresh = first.mean().item()
        for part in range(0, len(index), 3):
            now = slice(part, part + 3)
            visits.observe(memory.update(index[now], measured[now]), measured[now], rate[now])
    assert of_all[0], "nothing is known"
    assert sum(of_all) <= 2, "control: the mean of all that are known is another one"


def test_what_is_not_finite_was_not_seen():
    memory = ImportanceMemory(8)
    visits = visits_from(memory, 4, seed=2)
    index, _ = segment(visits)
    measured = tensor([math.nan, math.inf, 2.0, 4.0])
    visits.observe(memory.update(tensor(index), measured), measured, torch.ones(4))
    segment(visits)
    assert visits._fresh == 3.0


def test_nothing_new_leaves_what_was_known_of_new_ones():
    memory = ImportanceMemory(9)
    visits = visits_from(memory, 2, seed=2)
    index, _ = segment(visits)
    visits.observe(memory.update(tensor(index), tensor([2.0, 4.0])), tensor([2.0, 4.0]), torch.ones(2))
    for _ in range(3):
        segment(visits)  # nothing is measured
        assert visits._fresh == 3.0
        assert visits._mean == 3.0


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_pruned_examples_are_not_drawn_for_a_pass():
    q = [0.001] * 5 + [1.0, 2.0, 3.0] * 5
    memory = memory_of(q)
    visits, without = (visits_from(memory, 2, prune_mass=mass) for mass in (0.01, 0.0))
    segments(visits, 8)
    assert visits.pruned is None, "the first pass knows nothing"
    for _ in range(10):
        for index, rate in segments(visits, 8):
            assert not set(index) & set(range(5))
            wanted = oracles.rates(q[5:], 0.3)
            assert rate == pytest.approx([wanted[i - 5] for i in index], rel=1e-5)
        assert visits.pruned.tolist() == [True] * 5 + [False] * 15
    assert set(visited(without, 88)) >= set(range(5)), "control"


def test_pruned_visits_are_those_of_the_oracle():
    """As many visits as in any pass, distributed over the remaining examples."""
    q = [0.001] * 5 + [0.1 + q for q in random_importance(15, 0)]
    memory = memory_of(q)
    visits = visits_from(memory, 4, prune_mass=0.002, seed=3)
    for k in range(40):
        if k % 5 == 0:
            credit = oracles.first_credits(permutation(20, 3 + k // 5))
        rates = oracles.rates(q, 0.3) if k < 5 else [0.0] * 5 + oracles.rates(q[5:], 0.3)
        wanted, credit = oracles.spend(credit, rates, 4)
        assert segment(visits)[0] == wanted
    assert visits.pruned.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_equal_ones_beside_pruned_ones_are_not_the_whole_permutation():
    memory = memory_of([0.001] * 2 + [1.0] * 8)
    visits = visits_from(memory, 2, prune_mass=0.01)
    segments(visits, 5)
    memory.importances[:2] = 0.001
    for _ in range(8):
        drawn = [i for index, rate in segments(visits, 5) for i in index if rate == pytest.approx([1.0] * len(rate))]
        counts = torch.bincount(tensor(drawn), minlength=10)
        assert counts[:2].tolist() == [0, 0]
        assert counts[2:].min() >= 1
        assert counts[2:].max() - counts[2:].min() <= 1


def test_pruned_examples_come_back_when_others_have_become_less_important():
    memory = memory_of([0.1, 0.1] + [1.0] * 8)
    visits = visits_from(memory, 10, prune_mass=0.05)
    segment(visits)
    segment(visits)
    assert visits.pruned.nonzero().flatten().tolist() == [0, 1]
    memory.importances[2:] = 0.05
    assert visits.pruned.any(), "the current pass is unchanged"
    drawn = visited(visits, 2)
    assert visits.pruned is None or not visits.pruned[:2].any()
    assert {0, 1} <= set(drawn)


def test_unknown_examples_are_never_pruned():
    memory = memory_of([math.nan, 0.001, math.nan, *[1.0] * 7])
    visits = visits_from(memory, 10, prune_mass=0.2)
    drawn = visited(visits, 5)
    assert visits.pruned.nonzero().flatten().tolist() == [1]
    assert {0, 2} <= set(drawn)


def test_pruning_ends_where_it_is_switched_off():
    """Resuming without `prune_mass` restores all examples in the next pass."""
    q = [0.001, 1.0, 2.0, 0.001, 1.0, 3.0]
    for mass in (0.0, 0.01):
        visits_before = visits_from(memory_of(q), 6, prune_mass=0.01)
        for _ in range(2):
            segment(visits_before)
        assert visits_before.pruned.sum() == 2
        visits = visits_from(memory_of(q), 6, prune_mass=mass)
        visits.load_state_dict(visits_before.state_dict())
        for _ in range(2):
            segment(visits)
        assert (visits.pruned is None) == (mass == 0)


def test_the_increment_is_added_at_the_end_of_each_pass():
    memory = memory_of([0.0, 1.0, math.nan, 2.0])
    visits = visits_from(memory, 4, increment=0.5)
    segment(visits)
    assert memory.importances.tolist() == pytest.approx([0.0, 1.0, math.nan, 2.0], nan_ok=True)
    for times in (1, 2):
        segment(visits)
        wanted = [0.5 * times, 1 + 0.5 * times, math.nan, 2 + 0.5 * times]
        assert memory.importances.tolist() == pytest.approx(wanted, nan_ok=True)


# ---- going on after an interruption ----------------------------------------------------------------------------------


def walk(visits, steps, measure=True):
    """3 visits at a time, with what they measure."""
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
def test_it_goes_on_exactly(before, measure):
    def fresh():
        return visits_from(ImportanceMemory(50, 0.2), 3, prune_mass=0.02, increment=0.001, guard=True)

    visits = fresh()
    walk(visits, before, measure)
    state, memory = visits.state_dict(), visits.memory.state_dict()
    wanted = walk(visits, 80, measure)
    for _ in range(2):  # also a second time: a state stays what it was
        again = fresh()
        again.memory.load_state_dict(memory)
        again.load_state_dict(state)
        assert walk(again, 80, measure) == wanted
        moments = [one.state_dict()["guard"]["second_moments"] for one in (again, visits)]
        assert torch.equal(*moments)
    without = fresh()
    without.memory.load_state_dict(memory)
    if before:
        assert walk(without, 80, measure) != wanted, "control"


def test_the_state_of_a_view_is_not_all_that_it_is_a_view_of():
    visits = visits_from(memory_of([1.0] * 1000), 10)
    visits.next(10)
    assert visits.state_dict()["index"].untyped_storage().nbytes() == 4 * 115


def test_a_new_pass_begins_with_its_own_permutation():
    visits = visits_from(memory_of([1.0] * 30), 3, seed=4)
    visits.restart(passes=2)
    assert visits.begins_pass
    assert visited(visits, 8) == permutation(30, 6)
    assert visits.passes == 3
