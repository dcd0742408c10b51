"""The guard: the variance of the gradient with constructed importances, and the floor chosen for given visits.

The gradient norm of an example at a visit is what is measured there. The variance ratio is the second moment of the
gradient estimate relative to uniform sampling. Its mean over 12 passes and 3 seeds must not exceed 1.05.
"""

import math

import oracles
import pytest
import torch
from sampling_helpers import used
from torch import tensor

from hf_importance.sampling.guard import Guard
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.rates import weights
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits

PASSES = 12


def variance_ratios(case, guard=True, examples=2000, batch=50, seed=0, weight_exponent=1.0):
    """Variance ratio of each epoch with weights 1/r, and the sampler at the end."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size, scale):
        return torch.exp(scale * torch.randn(size, generator=generator, dtype=torch.float64))

    memory = ImportanceMemory(examples, momentum=0.2)
    settings = {"uniform_fraction": 0.3, "guard": guard, "weight_exponent": weight_exponent}
    sampler = ImportanceBatchSampler(memory, batch, seed=seed, **settings)
    norm, found = noise(examples, 1.0), []
    for _ in range(PASSES):
        ours = uniform = 0.0
        for draw in used(sampler):
            if case == "drifting":
                norm = norm * noise(examples, 0.05)
            index, rate = tensor(draw.index), tensor(draw.rate, dtype=torch.float64)
            measured = norm[index] * noise(len(index), {"noisy": 1.5, "slightly noisy": 0.5}.get(case, 0.0))
            ours += (measured / rate).square().sum().item()
            uniform += (measured.square() / rate).sum().item()
            sampler.mark_used(draw)
            sampler.update(draw, measured.float()[None])
            if case == "shuffled" and draw.number % 5 == 4:  # 8 times a pass
                importance = sampler.memory.importances
                importance[:] = importance[torch.randperm(examples, generator=generator)]
        found.append(ours / uniform)
    return found, sampler


def mean_variance_ratio(*args, **kwargs):
    runs = [variance_ratios(*args, seed=seed, **kwargs)[0] for seed in range(3)]
    return sum(map(sum, runs)) / len(runs) / PASSES


@pytest.mark.parametrize("case", ["constant", "slightly noisy", "noisy", "shuffled", "drifting"])
def test_variance_is_not_above_that_of_uniform_sampling(case):
    assert mean_variance_ratio(case) <= 1.05


def test_guard_takes_effect_by_the_second_pass():
    """With evidence from its first segments: in the first pass, nothing is known that visits could be compared with."""
    guarded, unguarded = (
        torch.tensor([variance_ratios("shuffled", seed=seed, guard=guard)[0][:3] for seed in range(3)]).mean(0).tolist()
        for guard in (True, False)
    )
    assert guarded[0] == unguarded[0] == pytest.approx(1.0), "uniform"
    assert max(guarded) <= 1.05
    assert unguarded[1] > 1.1, "control: the second pass begins with what the first has measured"
    assert unguarded[2] > 1.2, "control"


@pytest.mark.parametrize("case", ["constant", "slightly noisy", "drifting"])
def test_guard_keeps_the_gain_of_informative_importances(case):
    guarded, unguarded = mean_variance_ratio(case), mean_variance_ratio(case, guard=False)
    assert guarded <= 1.02 * unguarded
    assert unguarded < 0.85, "premise: importances are informative"


@pytest.mark.parametrize("weight_exponent", [0.0, 0.5, 1.0])
def test_control_uninformative_importances_increase_variance_without_guard(weight_exponent):
    """With the guard, they raise the floor; informative importances do not."""
    assert mean_variance_ratio("shuffled", guard=False, weight_exponent=weight_exponent) > 1.1
    assert variance_ratios("shuffled", weight_exponent=weight_exponent)[1].visits.floor > 0.6
    assert variance_ratios("constant", weight_exponent=weight_exponent)[1].visits.floor == pytest.approx(0.3)


def test_evidence_does_not_depend_on_the_weights(monkeypatch):
    """It depends on the drawn rates only, bit for bit."""

    def evidence(weight_exponent):
        visits = variance_ratios("noisy", examples=500, weight_exponent=weight_exponent)[1].visits
        return visits.state_dict()["guard"]["second_moments"]

    assert torch.equal(evidence(0.0), evidence(1.0))
    assert torch.equal(evidence(0.5), evidence(1.0))
    assert evidence(1.0).min() > 0, "premise: there is evidence"
    observe = SegmentedVisits.observe
    right = evidence(1.0)
    monkeypatch.setattr(SegmentedVisits, "observe", lambda self, a, b, rate: observe(self, a, b, torch.ones_like(rate)))
    assert not torch.allclose(evidence(0.0), right, rtol=1e-2), "control: rates replaced by 1"


def test_floor_returns_when_importances_become_informative():
    """Importances are shuffled during four passes, and exact afterwards."""
    sampler = ImportanceBatchSampler(ImportanceMemory(1000, momentum=0.0), 25, uniform_fraction=0.3)
    norm, floors = torch.linspace(0.1, 3.0, 1000), []
    for epoch in range(16):
        for draw in used(sampler):
            sampler.update(draw, norm[draw.index][None])
            if epoch < 4 and draw.number % 5 == 4:
                importance = sampler.memory.importances
                importance[:] = importance[torch.randperm(1000)]
        floors.append(sampler.visits.floor)
    assert max(floors[:5]) > 0.5
    assert floors[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("measured", [0.0, 0.7])
def test_equal_importances_have_rate_one(measured):
    sampler = ImportanceBatchSampler(ImportanceMemory(500), 20, uniform_fraction=0.3)
    for _ in range(3):
        for draw in used(sampler):
            sampler.update(draw, torch.full((1, len(draw.index)), measured))
            assert set(draw.rate) == {1.0}


# ---- the floor for given visits --------------------------------------------------------------------------------------


def uniform_visits(n=400, seed=0, noise=0.0):
    """One visit of each example: remembered importances, their mean, measured importances, and rates of 1."""
    g = torch.Generator().manual_seed(seed)
    q = torch.exp(torch.randn(n, generator=g))
    measured = q * torch.exp(noise * torch.randn(n, generator=g))
    mean = q.mean(dtype=torch.float64).item()
    return q, mean, measured, torch.ones(n, dtype=torch.float64)


def second_moments(guard):
    return guard.state_dict()["second_moments"]


def test_floor_is_the_lowest_within_one_percent_of_the_minimum():
    for seed in range(4):
        for noise in (0.0, 0.3, 0.7, 1.0, 1.5, 3.0):
            remembered, mean, measured, rate = uniform_visits(seed=seed, noise=noise)
            guard = Guard(0.2)
            guard.observe(remembered, mean, measured, rate, math.inf)
            floors = [0.2 + 0.1 * k for k in range(9)]
            lists = remembered.tolist(), mean, measured.tolist(), rate.tolist()
            moments = oracles.second_moments(*lists, floors)
            wanted = next(f for f, m in zip(floors, moments, strict=True) if m <= 1.01 * min(moments))
            assert guard.next_floor() == pytest.approx(wanted)


def test_evidence_is_of_capped_rates():
    """A few very important examples would otherwise seem to be visited far more often than they are."""
    remembered, mean, measured, rate = uniform_visits(noise=0.5)
    cost = torch.linspace(0.5, 1.5, 400)
    floors = [0.2 + 0.1 * k for k in range(9)]
    lists = remembered.tolist(), mean, measured.tolist(), rate.tolist()
    states = {}
    for cap in (1.5, math.inf):
        guard = Guard(0.2)
        guard.observe(remembered, mean, measured, rate, cap, cost)
        states[cap] = state = guard.state_dict()
        moments = oracles.second_moments(*lists, floors, cap)
        costs = oracles.expected_costs(*lists, cost.tolist(), floors, cap)
        assert state["second_moments"].tolist() == pytest.approx(moments)
        assert state["costs"].tolist() == pytest.approx(costs)
    for name in ("second_moments", "costs"):
        capped, free = states[1.5][name], states[math.inf][name]
        assert (capped[0] / free[0] - 1).abs() > 0.05, "control: rates above the cap change the evidence"
        assert capped[-1] == free[-1], "control: uniform rates are below it"


def test_floor_rises_with_noise():
    floors = []
    for noise in (0.0, 0.7, 1.5, 3.0):
        guard = Guard(0.1)
        guard.observe(*uniform_visits(n=20_000, noise=noise), math.inf)
        floors.append(guard.next_floor())
    assert floors == sorted(floors)
    assert floors[0] == pytest.approx(0.1)
    assert floors[-1] > 0.8


def test_floor_without_evidence_is_the_uniform_fraction():
    guard = Guard(0.3)
    assert guard.next_floor() == pytest.approx(0.3)
    guard.observe(torch.full((3,), math.nan), math.nan, torch.ones(3), torch.ones(3), 64.0)
    assert guard.next_floor() == pytest.approx(0.3), "visits of examples with unknown importance are no evidence"
    assert Guard(1.0).next_floor() == 1.0
    assert Guard(0.0).next_floor() == 0.0


def test_evidence_decays():
    guard, visits = Guard(0.3), uniform_visits(noise=2.0)
    guard.observe(*visits, 64.0)
    high = guard.next_floor()
    before = second_moments(guard)
    guard.next_floor()
    assert torch.equal(second_moments(guard), 0.9 * before)
    for _ in range(60):
        guard.observe(*uniform_visits(seed=1), 64.0)
        last = guard.next_floor()
    assert high > last == pytest.approx(0.3)


@pytest.mark.parametrize("size", [1, 7, 399])
def test_evidence_does_not_depend_on_the_split_into_calls(size):
    """Bit for bit, also with importances that are not finite."""
    remembered, mean, measured, rate = uniform_visits(noise=1.0)
    remembered[::7], measured[::11] = math.nan, math.nan
    rate = rate + torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, parts, other = Guard(0.3), Guard(0.3), Guard(0.3)
    whole.observe(remembered, mean, measured, rate, 64.0)
    for start in range(0, 400, size):
        part = slice(start, start + size)
        parts.observe(remembered[part], mean, measured[part], rate[part], 64.0)
    assert torch.equal(second_moments(whole), second_moments(parts))
    other.observe(remembered[1:], mean, measured[1:], rate[1:].roll(1), 64.0)
    assert not torch.allclose(second_moments(whole), second_moments(other)), "control: other rates"


def test_guard_state_dict_restores_exactly_and_is_a_copy():
    guard = Guard(0.3)
    guard.observe(*uniform_visits(noise=2.0), 64.0)
    state, again = guard.state_dict(), Guard(0.3)
    again.load_state_dict(state)
    for _ in range(3):
        again.observe(*uniform_visits(seed=2), 64.0)
        guard.observe(*uniform_visits(seed=2), 64.0)
        assert again.next_floor() == guard.next_floor()
    third = Guard(0.3)
    third.load_state_dict(state)
    assert third.next_floor() != pytest.approx(Guard(0.3).next_floor()), "control: the state has an effect"


def test_relative_second_moment_is_the_variance_ratio():
    """The second moment with a floor, relative to floor 1, is the variance ratio of visits drawn with that floor."""
    q, mean, measured, _ = uniform_visits(noise=0.5)
    rate = 0.7 * q.double() / mean + 0.3
    visits = torch.repeat_interleave((1000 * rate).round().long())
    guard = Guard(0.3)
    guard.observe(q[visits], mean, measured[visits], rate[visits], math.inf)
    moments = second_moments(guard)
    wanted = oracles.variance_ratio(measured[visits].double(), rate[visits], weights(rate[visits]))
    assert (moments[0] / moments[-1]).item() == pytest.approx(wanted.item(), rel=1e-5)
