"""The guard: measured variance of the gradient, against uniform sampling, on constructed importances.

The gradient norm of an example at a visit is what is measured there. Over 12 passes the mean of the second moment of
the gradient estimate over that of uniform sampling must not exceed 1.05, in the mean of 3 seeds.
"""

import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling.guard import Guard
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.rates import variance_ratio, weights
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits

PASSES = 12


def ratios(case, guard=True, examples=2000, batch=50, seed=0, weight_exponent=1.0):
    """Variance ratio in each epoch with weights 1/r, and the sampler at the end."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size, scale):
        return torch.exp(scale * torch.randn(size, generator=generator, dtype=torch.float64))

    memory = ImportanceMemory(examples, momentum=0.2)
    settings = {"uniform_fraction": 0.3, "guard": guard, "weight_exponent": weight_exponent}
    sampler = ImportanceBatchSampler(memory, batch, seed=seed, **settings)
    norm, found = noise(examples, 1.0), []
    for _ in range(PASSES):
        ours = uniform = 0.0
        for draw in sampler:
            if case == "drifting":
                norm = norm * noise(examples, 0.05)
            index, rate = tensor(draw.index), tensor(draw.rate, dtype=torch.float64)
            measured = norm[index] * noise(len(index), {"noisy": 1.5, "a little noisy": 0.5}.get(case, 0.0))
            ours += (measured / rate).square().sum().item()
            uniform += (measured.square() / rate).sum().item()
            sampler.mark_used(draw)
            sampler.update(draw, measured.float()[None])
            if case == "shuffled" and draw.number % 5 == 4:  # 8 times a pass
                importance = sampler.importances
                importance[:] = importance[torch.randperm(examples, generator=generator)]
        found.append(ours / uniform)
    return found, sampler


def mean_ratio(*args, **kwargs):
    runs = [ratios(*args, seed=seed, **kwargs)[0] for seed in range(3)]
    return sum(map(sum, runs)) / len(runs) / PASSES


@pytest.mark.parametrize("case", ["constant", "a little noisy", "noisy", "shuffled", "drifting"])
def test_never_worse_than_uniform(case):
    assert mean_ratio(case) <= 1.05


def test_soon():
    """Including the second pass."""
    second = [ratios("shuffled", seed=seed)[0][1] for seed in range(3)]
    assert sum(second) / 3 <= 1.05
    careless = [ratios("shuffled", seed=seed, guard=False)[0][1] for seed in range(3)]
    assert sum(careless) / 3 > 1.2, "control"


@pytest.mark.parametrize("case", ["constant", "a little noisy", "drifting"])
def test_a_good_case_loses_nothing(case):
    guarded, careless = mean_ratio(case), mean_ratio(case, guard=False)
    assert guarded <= 1.02 * careless
    assert careless < 0.85, "control: it is a good case"


@pytest.mark.parametrize("weight_exponent", [0.0, 0.5, 1.0])
def test_it_matters(weight_exponent):
    """Control: without the guard, uninformative importances are worse than none."""
    assert mean_ratio("shuffled", guard=False, weight_exponent=weight_exponent) > 1.1
    assert ratios("shuffled", weight_exponent=weight_exponent)[1].visits.floor > 0.6
    assert ratios("constant", weight_exponent=weight_exponent)[1].visits.floor == pytest.approx(0.3)


def test_the_evidence_does_not_depend_on_the_weights(monkeypatch):
    """It depends on the drawn rate only, bit for bit."""

    def evidence(weight_exponent):
        visits = ratios("noisy", examples=500, weight_exponent=weight_exponent)[1].visits
        return visits.state_dict()["guard"]["second_moments"]

    assert torch.equal(evidence(0.0), evidence(1.0))
    assert torch.equal(evidence(0.5), evidence(1.0))
    assert evidence(1.0).min() > 0, "premise: there is some"
    observe = SegmentedVisits.observe
    right = evidence(1.0)
    monkeypatch.setattr(SegmentedVisits, "observe", lambda self, a, b, rate: observe(self, a, b, torch.ones_like(rate)))
    assert not torch.allclose(evidence(0.0), right, rtol=1e-2), "control: by weights of 1"


def test_the_floor_returns():
    """Importances that are uninformative for four passes, and exact afterwards."""
    sampler = ImportanceBatchSampler(ImportanceMemory(1000, momentum=0.0), 25, uniform_fraction=0.3)
    norm, floors = torch.linspace(0.1, 3.0, 1000), []
    for epoch in range(16):
        for draw in sampler:
            sampler.update(draw, norm[draw.index][None])
            if epoch < 4 and draw.number % 5 == 4:
                importance = sampler.importances
                importance[:] = importance[torch.randperm(1000)]
        floors.append(sampler.visits.floor)
    assert max(floors[:5]) > 0.5
    assert floors[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("measured", [0.0, 0.7])
def test_equal_importances_are_visited_alike(measured):
    sampler = ImportanceBatchSampler(ImportanceMemory(500), 20, uniform_fraction=0.3)
    for _ in range(3):
        for draw in sampler:
            sampler.update(draw, torch.full((1, len(draw.index)), measured))
            assert set(draw.rate) == {1.0}


# ---- the figures that it decides by ----------------------------------------------------------------------------------


def evidence(n=400, seed=0, noise=0.0):
    """Visits in proportion to the rates: remembered importances, their mean, measurements and rates."""
    g = torch.Generator().manual_seed(seed)
    q = torch.exp(torch.randn(n, generator=g))
    measured = q * torch.exp(noise * torch.randn(n, generator=g))
    mean = q.mean(dtype=torch.float64).item()
    return q, mean, measured, torch.ones(n, dtype=torch.float64)


def test_it_takes_the_lowest_floor_that_is_good_enough():
    for seed in range(4):
        for noise in (0.0, 0.3, 0.7, 1.0, 1.5, 3.0):
            remembered, mean, measured, rate = evidence(seed=seed, noise=noise)
            guard = Guard(0.2)
            guard.observe(remembered, mean, measured, rate, math.inf)
            floors = [0.2 + 0.1 * k for k in range(9)]
            lists = remembered.tolist(), mean, measured.tolist(), rate.tolist()
            moments = oracles.second_moments(*lists, floors)
            wanted = next(f for f, m in zip(floors, moments, strict=True) if m <= 1.01 * min(moments))
            assert guard.floor() == pytest.approx(wanted)


def test_the_more_noise_the_higher_the_floor():
    floors = []
    for noise in (0.0, 0.7, 1.5, 3.0):
        guard = Guard(0.1)
        guard.observe(*evidence(n=20_000, noise=noise), math.inf)
        floors.append(guard.floor())
    assert floors == sorted(floors)
    assert floors[0] == pytest.approx(0.1)
    assert floors[-1] > 0.8


def test_without_evidence_the_floor_is_the_lowest():
    for guard in (Guard(0.3), Guard(0.3)):
        assert guard.floor() == pytest.approx(0.3)
    guard.observe(torch.full((3,), math.nan), math.nan, torch.ones(3), torch.ones(3), 64.0)
    assert guard.floor() == pytest.approx(0.3), "of unknown examples nothing is learnt"
    assert Guard(1.0).floor() == 1.0
    assert Guard(0.0).floor() == 0.0


def test_evidence_is_forgotten():
    guard, remembered = Guard(0.3), evidence(noise=2.0)
    guard.observe(*remembered, 64.0)
    high = guard.floor()
    before = guard.state_dict()["second_moments"]
    guard.floor()
    assert torch.equal(guard.state_dict()["second_moments"], 0.9 * before)
    for _ in range(60):
        guard.observe(*evidence(seed=1), 64.0)
        last = guard.floor()
    assert high > last == pytest.approx(0.3)


@pytest.mark.parametrize("size", [1, 7, 399])
def test_evidence_is_the_same_in_any_division(size):
    """Bit for bit, also with uninformative visits."""
    remembered, mean, measured, rate = evidence(noise=1.0)
    remembered[::7], measured[::11] = math.nan, math.nan
    rate = rate + torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, parts, other = Guard(0.3), Guard(0.3), Guard(0.3)
    whole.observe(remembered, mean, measured, rate, 64.0)
    for start in range(0, 400, size):
        part = slice(start, start + size)
        parts.observe(remembered[part], mean, measured[part], rate[part], 64.0)
    assert torch.equal(whole.state_dict()["second_moments"], parts.state_dict()["second_moments"])
    other.observe(remembered[1:], mean, measured[1:], rate[1:].roll(1), 64.0)
    assert not torch.allclose(whole.state_dict()["second_moments"], other.state_dict()["second_moments"]), "control"


def test_state():
    guard = Guard(0.3)
    guard.observe(*evidence(noise=2.0), 64.0)
    state, again = guard.state_dict(), Guard(0.3)
    again.load_state_dict(state)
    for _ in range(3):
        again.observe(*evidence(seed=2), 64.0)
        guard.observe(*evidence(seed=2), 64.0)
        assert again.floor() == guard.floor()
    third = Guard(0.3)
    third.load_state_dict(state)
    assert third.floor() != pytest.approx(Guard(0.3).floor()), "a state stays what it was, and counts"


def test_a_rate_of_full_weight_has_the_ratio_that_the_guard_reckons_with():
    """The second moment of a floor relative to that of floor 1 is the variance ratio of draws with that floor."""
    q, mean, measured, _ = evidence(noise=0.5)
    rate = 0.7 * q.double() / mean + 0.3
    visits = torch.repeat_interleave((1000 * rate).round().long())
    guard = Guard(0.3)
    guard.observe(q[visits], mean, measured[visits], rate[visits], math.inf)
    moments = guard.state_dict()["second_moments"]
    wanted = variance_ratio(measured[visits].double(), rate[visits], weights(rate[visits]))
    assert (moments[0] / moments[-1]).item() == pytest.approx(wanted.item(), rel=1e-5)
