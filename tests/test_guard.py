"""The guard: measured variance of the gradient, against uniform sampling, on constructed importances.

The gradient norm of an example at a visit is what is measured there. Over 12 passes the mean of the second moment of
the gradient estimate over that of uniform sampling must not exceed 1.05, in the mean of 3 seeds.
"""

import math

import pytest
import torch
from torch import tensor

from hf_importance import functional
from hf_importance.memory import ImportanceMemory
from hf_importance.sampler import ImportanceBatchSampler

PASSES = 12


def ratios(case, sampling="reshuffled", guard=True, examples=2000, batch=50, seed=0):
    """Second moment over that of uniform sampling in each epoch, and the floor at the end."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size, scale):
        return torch.exp(scale * torch.randn(size, generator=generator, dtype=torch.float64))

    memory = ImportanceMemory(examples, momentum=0.2, uniform_fraction=0.3, guard=guard)
    sampler = ImportanceBatchSampler(memory, batch, sampling=sampling, seed=seed)
    norm, found = noise(examples, 1.0), []
    for _ in range(PASSES):
        ours = uniform = 0.0
        for draw in sampler:
            if case == "drifting":
                norm = norm * noise(examples, 0.05)
            index, weight = tensor(draw.index), tensor(draw.weight, dtype=torch.float64)
            measured = norm[index] * noise(len(index), {"noisy": 1.5, "a little noisy": 0.5}.get(case, 0.0))
            ours += (weight.square() * measured.square()).sum().item()
            uniform += (weight * measured.square()).sum().item()
            sampler.use(draw)
            sampler.update(draw, measured)
        if case == "shuffled":
            memory.importance[:] = memory.importance[torch.randperm(examples, generator=generator)]
        found.append(ours / uniform)
    return found, memory.floor


def mean_ratio(*args, **kwargs):
    runs = [ratios(*args, seed=seed, **kwargs)[0] for seed in range(3)]
    return sum(map(sum, runs)) / len(runs) / PASSES


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
@pytest.mark.parametrize("case", ["constant", "a little noisy", "noisy", "shuffled", "drifting"])
def test_never_worse_than_uniform(case, sampling):
    assert mean_ratio(case, sampling) <= 1.05


def test_soon():
    """Also the second pass: the guard learns from a short one that goes before it."""
    second = [ratios("shuffled", examples=8000, seed=seed)[0][1] for seed in range(3)]
    assert sum(second) / 3 <= 1.05
    careless = [ratios("shuffled", examples=8000, seed=seed, guard=False)[0][1] for seed in range(3)]
    assert sum(careless) / 3 > 1.2, "control"


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
@pytest.mark.parametrize("case", ["constant", "a little noisy", "drifting"])
def test_a_good_case_loses_nothing(case, sampling):
    guarded, careless = mean_ratio(case, sampling), mean_ratio(case, sampling, guard=False)
    assert guarded <= 1.02 * careless
    assert careless < 0.8, "control: it is a good case"


def test_it_matters():
    """The control of all of this: without the guard, importances that tell nothing are worse than none."""
    assert mean_ratio("shuffled", guard=False) > 1.1
    assert ratios("shuffled")[1] > 0.6
    assert ratios("constant")[1] == 0.3


def test_the_floor_returns(monkeypatch):
    """Importances that tell nothing for four passes, and everything from then on."""
    memory = ImportanceMemory(1000, momentum=0.0, uniform_fraction=0.3, guard=True)
    sampler = ImportanceBatchSampler(memory, 50)
    norm, floors = torch.linspace(0.1, 3.0, 1000), []
    for epoch in range(12):
        for draw in sampler:
            sampler.update(draw, norm[draw.index])
        floors.append(memory.floor)
        if epoch < 4:
            memory.importance[:] = memory.importance[torch.randperm(1000)]
    assert max(floors[:5]) > 0.5
    assert floors[-1] == pytest.approx(0.3)


# ---- the figures that it decides by ----------------------------------------------------------------------------------


def test_second_moments_are_those_of_every_floor():
    """With visits as often as the rates say they are Σ q'² / r_f, by hand."""
    remembered, measured = [0.5, 1.0, 2.5], [1.0, 0.8, 2.0]
    rate, visits = [0.5, 1.0, 1.5], [0, 1, 1, 2, 2, 2]
    fractions = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    found = functional.second_moments(
        tensor(remembered)[visits], 4 / 3, tensor(measured)[visits], 1 / tensor(rate)[visits], fractions, math.inf
    )
    for fraction, moment in zip(fractions.tolist(), found.tolist(), strict=True):
        floors = [(1 - fraction) * q / (4 / 3) + fraction for q in remembered]
        by_hand = sum(2 * q**2 / r for q, r in zip(measured, floors, strict=True))
        assert moment == pytest.approx(by_hand, rel=1e-6)


def test_visits_that_tell_nothing_are_left_out():
    q = tensor([math.nan, 1.0, 1.0, 2.0])
    measured = tensor([1.0, math.nan, math.inf, 3.0])
    fractions = tensor([0.3, 1.0])
    found = functional.second_moments(q, 2.0, measured, torch.ones(4), fractions, 64.0)
    assert found.tolist() == pytest.approx([9.0, 9.0])
    assert functional.second_moments(q[:2], 2.0, measured[:2], torch.ones(2), fractions, 64.0).tolist() == [0.0, 0.0]


def test_equal_importances_need_no_short_pass():
    memory = ImportanceMemory(5000, guard=True)
    sampler = ImportanceBatchSampler(memory, 100)
    for _ in range(3):
        seen = [i for draw in sampler for i in draw.index]
        assert sorted(seen) == list(range(5000))
        memory.update(torch.arange(5000), torch.full((5000,), 0.7))


def test_short_passes_are_unbiased():
    """Each example is visited with its share of its rate, and the weights are those of the rate."""
    counts = torch.zeros(4000)
    for seed in range(200):
        memory = ImportanceMemory(4000, guard=True)
        memory.update(torch.arange(4000), torch.linspace(0.1, 2.0, 4000))
        sampler = ImportanceBatchSampler(memory, 1, seed=seed)
        index, rate = sampler._next_reshuffled(10_000)
        assert abs(len(index) - 256) < 80
        torch.testing.assert_close(rate, memory.rates(index))
        counts[index] += 1
    expected = 200 * 256 / 4000 * memory.rates()
    assert counts.sum().item() == pytest.approx(expected.sum().item(), rel=0.02)
    for part in range(4):
        slices = slice(1000 * part, 1000 * part + 1000)
        assert counts[slices].sum().item() == pytest.approx(expected[slices].sum().item(), rel=0.05)
