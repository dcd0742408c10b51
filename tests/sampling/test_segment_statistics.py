"""Statistics of segmented visits: unbiased over all random starts, and evenly spaced."""

import itertools
import math

import oracles
import pytest
import torch
from sampling_helpers import memory_of, next_segment, random_importance, segmented_visits, visited_examples
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.segments import SegmentedVisits

# ---- unbiased: enumeration of all random starts ----------------------------------------------------------------------

SCHEDULES = {  # examples, batch size, and rates of the segments of two passes, such that visits · rate is an integer
    "4 examples": (4, 1, [[1, 1, 1, 1], [2, 1, 1, 0], [0, 1, 0, 3], [3, 0, 1, 0], [0, 1, 1, 2], [1] * 4] * 2),
    "5 examples": (
        5, 2, [[0.5, 1, 1.5, 2, 0], [1, 1 / 3, 5 / 3, 2 / 3, 4 / 3], [1.5, 0.5, 0, 2.5, 0.5], [2, 1, 1, 1, 0]]
    ),
    "equal rates first": (5, 1, [[1] * 5, [1] * 5, [3, 1, 1, 0, 0], [0, 1, 2, 1, 1], [1] * 5, [1, 0, 0, 4, 0]]),
    "6 examples": (6, 2, [[1] * 6, [2, 0.5, 0.5, 1, 1.5, 0.5], [0.5, 0.5, 3, 1, 0.5, 0.5], [1.5, 1.5, 1, 1, 1, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULES)
def test_segments_are_unbiased(monkeypatch, case):
    """E visits of i = visits · r_i / N and E Σ weight · 1[visits i] = visits / N, in every segment, for every i."""
    n, batch, schedule = SCHEDULES[case]
    number = max(1, min(8, n // batch))
    counts, weights = torch.zeros(len(schedule), n).double(), torch.zeros(len(schedule), n).double()
    weights_of_previous_segment, starts = weights.clone(), math.factorial(n)
    for start in itertools.permutations(range(n)):
        monkeypatch.setattr(torch, "randperm", lambda *_, s=start, **__: tensor(s, dtype=torch.int32))
        memory = ImportanceMemory(n)
        visits = segmented_visits(memory, batch, uniform_fraction=0.0)
        for k, rates in enumerate(schedule):
            memory.importances[:] = tensor(rates, dtype=torch.float32)
            index, rate = next_segment(visits)
            for i, r in zip(index, rate, strict=True):
                counts[k, i] += 1 / starts
                weights[k, i] += 1 / r / starts
                weights_of_previous_segment[k, i] += 1 / (schedule[k - 1][i] or 1.0) / starts
    rates = tensor(schedule, dtype=torch.float64)
    sizes = [n * (k % number + 1) // number - n * (k % number) // number for k in range(len(schedule))]
    sizes = tensor(sizes, dtype=torch.float64)[:, None]
    assert ((sizes * rates) - (sizes * rates).round()).abs().max() < 1e-9, "premise"
    torch.testing.assert_close(counts, sizes * rates / n, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights, sizes / n * (rates > 0), rtol=1e-6, atol=1e-9)
    assert (weights_of_previous_segment - sizes / n * (rates > 0)).abs().max() > 0.05, "control"


# ---- evenly spaced ---------------------------------------------------------------------------------------------------


class RoundsIndependently(SegmentedVisits):
    """Control: visits in proportion to the rates in expectation only, with random credits in each segment."""

    def _plan_visits(self, visits, total):
        self._credit = torch.rand(len(self.memory))
        return super()._plan_visits(visits, total)


class DrawsIndependently(IndependentVisits):
    """Control: segments of independent draws with the rates at their start."""

    def next(self, size):
        self._measure()
        index, rate = [], []
        while sum(map(len, index)) < 25:
            found = super().next(25 - sum(map(len, index)))
            index, rate = [*index, found[0]], [*rate, found[1]]
        return torch.cat(index), torch.cat(rate)


def largest_deviation(make, n=200, number=160, drift=0.1):
    """Largest difference between the visits of an example and its summed rates, over any interval of a pass.

    Returns:
        The deviation over intervals of whole segments, relative to the planned visits; and over any interval.
    """
    memory, rng = memory_of(random_importance(n, 0)), torch.Generator().manual_seed(0)
    visits = make(memory)
    worst = [0.0, 0.0]
    for k in range(number):
        if k % 8 == 0:
            between_segments, deviation = [torch.zeros(n).double()], torch.zeros(n).double()
            lowest, highest, now = (torch.zeros(n).double() for _ in range(3))
        rates = tensor(oracles.rates(memory.importances.tolist(), 0.3, max_rate=64.0), dtype=torch.float64)
        index, rate = next_segment(visits)
        assert rate == pytest.approx(rates[index].tolist(), rel=1e-5), "premise"
        deviation = deviation + torch.bincount(tensor(index), minlength=n) - 25 * rates / n
        between_segments.append(deviation)
        for i in index:
            now -= rates / n
            lowest = torch.minimum(lowest, now)
            now[i] += 1
            highest = torch.maximum(highest, now)
        memory.importances.mul_(torch.exp(drift * torch.randn(n, generator=rng)))
        deviations = torch.stack(between_segments)
        worst[0] = max(worst[0], (deviations.amax(0) - deviations.amin(0)).max().item())
        worst[1] = max(worst[1], (highest - lowest).max().item())
    return tuple(worst)


@pytest.mark.parametrize(("drift", "bound"), [(0.0, 1.25), (0.1, 3.0), (1.0, math.inf)])
def test_visits_deviate_from_summed_rates_by_at_most_one(drift, bound):
    """Over any interval of whole segments; over other intervals by a little more.

    A segment has a few visits more or less than planned, each of which counts r/N here. With a large drift, rates are
    up to 20 and the second deviation has no bound.
    """
    whole_segments, any_interval = largest_deviation(lambda memory: segmented_visits(memory, 25, seed=1), drift=drift)
    assert whole_segments <= 1 + 1e-4
    assert any_interval <= bound


@pytest.mark.parametrize("kind", ["independent rounding", "independent draws"])
def test_control_independent_visits_deviate_by_more(kind):
    if kind == "independent rounding":
        found = largest_deviation(lambda memory: RoundsIndependently(memory, 25, uniform_fraction=0.3, guard=False))
    else:
        found = largest_deviation(lambda memory: DrawsIndependently(memory, uniform_fraction=0.3))
    assert found[0] > 2


def test_visits_of_an_example_are_evenly_spaced_within_a_segment():
    """An example with rate 8, in a pass of one segment."""
    memory = memory_of([8.0] + [56 / 63] * 63)
    visits = segmented_visits(memory, 64, uniform_fraction=0.0)
    index = visited_examples(visits, 1)
    gaps = tensor([place for place, i in enumerate(index) if i == 0]).diff()
    assert len(gaps) == 7
    assert gaps.min() >= 6
    assert gaps.max() <= 10
