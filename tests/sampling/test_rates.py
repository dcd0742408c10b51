"""Importance → rate → weight: values by hand, reference implementation, properties, extremes; statistics of visits."""

import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling import rates as R

IMPORTANCES = {
    "some": [0.5, 2.0, 0.0, 4.0],
    "unknown": [0.5, math.nan, 3.0, math.nan],
    "outlier": [1.0, 1.0, 1000.0],
    "none known": [math.nan, math.nan],
    "all zero": [0.0, 0.0, 0.0],
    "zero and unknown": [0.0, math.nan],
    "one": [0.7],
    "tiny": [1e-30, 3e-30],
}


def some(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- importance → rate → weight --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [math.nan, 0.0, 1.5, 40.0])
@pytest.mark.parametrize("uniform_fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_rate", [1.0, 1.7, 64.0, math.inf])
@pytest.mark.parametrize("case", IMPORTANCES)
def test_rates_are_those_of_the_oracle(case, uniform_fraction, max_rate, fresh):
    q = tensor(IMPORTANCES[case], dtype=torch.float64)
    before = q.clone()
    found = R.rates(q, uniform_fraction, max_rate, fresh)
    assert found.tolist() == pytest.approx(oracles.rates(q.tolist(), uniform_fraction, max_rate, fresh), rel=1e-12)
    assert found.mean().item() == pytest.approx(1.0, rel=1e-12)
    assert (found >= uniform_fraction * (1 - 1e-12)).all(), "no weight above 1/f"
    assert torch.equal(q.nan_to_num(-1.0), before.nan_to_num(-1.0)), "arguments are left alone"


def test_rates_by_hand():
    q = tensor([1.0, 2.0, 3.0])
    assert R.rates(q, 0.0).tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert R.rates(q, 0.5).tolist() == pytest.approx([0.75, 1.0, 1.25])
    assert R.rates(q, 1.0).tolist() == [1.0, 1.0, 1.0]
    assert R.rates(torch.full((3,), 2.5), 0.3, 64.0).tolist() == [1.0, 1.0, 1.0]
    assert R.rates(tensor([1.0, 1.0, 10.0]), 0.0, 1.75).tolist() == pytest.approx([1 / 3, 1 / 3, 7 / 3])
    assert R.rates(tensor([1.0, 3.0, math.nan]), 0.0).tolist() == pytest.approx([0.5, 1.5, 1.0])
    assert R.rates(tensor([1.0, 3.0, math.nan]), 0.0, fresh=8.0).tolist() == pytest.approx([0.25, 0.75, 2.0])


@pytest.mark.parametrize("seed", range(5))
def test_rates_have_these_properties(seed):
    """Rates depend on proportions only, are monotonic in the importance, and independent of the order."""
    q = some(50, seed) ** 4
    found = R.rates(q, 0.3, 2.0)
    assert (found[q.argsort()].diff() >= 0).all()
    assert (found[q.argsort()].diff() > 0).sum() > 25, "control: they differ"
    torch.testing.assert_close(R.rates(1e6 * q, 0.3, 2.0), found, rtol=1e-12, atol=0)
    torch.testing.assert_close(R.rates(q.flip(0), 0.3, 2.0), found.flip(0), rtol=1e-12, atol=0)
    assert (R.rates(q, 0.6) - 1).abs().max() < (R.rates(q, 0.3) - 1).abs().max(), "a higher floor prefers less"
    assert R.rates(q, 0.3, 2.0).max() < R.rates(q, 0.3).max(), "the cap is in force"


def test_a_selection_has_the_rates_that_it_has_among_all():
    q = some(20).float()
    mean = q.mean(dtype=torch.float64).item()
    whole = R.unnormalised_rates(q, mean, 0.3, 2.0)
    assert torch.equal(R.unnormalised_rates(q[3:9], mean, 0.3, 2.0), whole[3:9])
    assert not torch.equal(R.unnormalised_rates(q[3:9], q[3:9].mean().item(), 0.3, 2.0), whole[3:9]), "control"
    floors = tensor([0.0, 0.3, 1.0])
    of_every_floor = R.unnormalised_rates(q[:, None], mean, floors)
    for k, floor in enumerate(floors.tolist()):
        torch.testing.assert_close(of_every_floor[:, k], R.unnormalised_rates(q, mean, floor))


@pytest.mark.parametrize("mean", [0.0, math.nan])
def test_without_a_mean_all_are_alike(mean):
    assert R.unnormalised_rates(tensor([0.0, 0.0, math.nan]), mean, 0.3).tolist() == [1.0, 1.0, 1.0]
    assert R.unnormalised_rates(tensor([0.0, 2.0, math.nan]), 1.0, 0.5).tolist() == [0.5, 1.5, 1.0], "control"


def test_weights():
    rate = tensor([0.25, 1.0, 4.0])
    assert R.weights(rate).tolist() == [4.0, 1.0, 0.25]
    assert R.weights(rate, 0.5).tolist() == [2.0, 1.0, 0.5]
    assert R.weights(rate, 0.0).tolist() == [1.0, 1.0, 1.0]
    rate = R.rates(some(30), 0.2)
    assert (rate * R.weights(rate)).tolist() == pytest.approx([1.0] * 30), "every example counts as much as any other"
    assert R.weights(rate).max() <= 1 / 0.2


# ---- what visits tell ------------------------------------------------------------------------------------------------


def test_second_moments_by_hand():
    """With visits in proportion to the rates, they are Σ q'² / r_f."""
    remembered, measured = [0.5, 1.0, 2.5], [1.0, 0.8, 2.0]
    rate, visits = [0.5, 1.0, 1.5], [0, 1, 1, 2, 2, 2]
    fractions = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    found = R.second_moments(
        tensor(remembered)[visits], 4 / 3, tensor(measured)[visits], tensor(rate)[visits], fractions
    ).sum(0)
    for fraction, moment in zip(fractions.tolist(), found.tolist(), strict=True):
        floors = [(1 - fraction) * q / (4 / 3) + fraction for q in remembered]
        by_hand = sum(2 * q**2 / r for q, r in zip(measured, floors, strict=True))
        assert moment == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("max_rate", [1.3, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_second_moments_are_those_of_the_oracle(seed, max_rate):
    remembered, measured, rate = some(40, seed), some(40, seed + 10), 0.3 + some(40, seed + 20)
    remembered[::7], measured[::5], measured[3] = math.nan, math.nan, math.inf
    fractions = tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    arguments = remembered, 0.5, measured, rate, fractions
    found = R.second_moments(*arguments, max_rate)
    lists = [x if isinstance(x, float) else x.tolist() for x in arguments]
    wanted = oracles.second_moments(*lists, max_rate)
    assert found.shape == (40, 3)
    assert found.dtype == torch.float64
    assert found.sum(0).tolist() == pytest.approx(wanted, rel=1e-12)
    for wrong in (
        (remembered, 0.5, measured, rate.roll(1), fractions),
        (remembered.roll(1), 0.5, measured, rate, fractions),
        (remembered, 0.6, measured, rate, fractions),
    ):
        assert R.second_moments(*wrong, max_rate).sum(0).tolist() != pytest.approx(wanted, rel=1e-3), "control"


def test_the_second_moment_of_the_floor_that_was_drawn_with_is_that_of_the_estimate():
    """Drawn with p = r / N and weighted by 1/r: Σ_i (1/r_i) q'_i² is N times the expectation of (q'/r)²."""
    q, now = some(30), some(30, 1)
    rate = R.rates(q, 0.3)
    expected = (rate / 30 * (now / rate).square()).sum().item()
    terms = R.second_moments(q, q.mean().item(), now, rate, tensor([0.3, 1.0]))
    assert (rate * terms[:, 0]).sum().item() / 30 == pytest.approx(expected, rel=1e-6)  # Σ r: visits at these rates
    assert (rate * terms[:, 1]).sum().item() / 30 == pytest.approx(now.square().mean().item(), rel=1e-12), "uniform"
    assert expected != pytest.approx(now.square().mean().item(), rel=1e-2), "control"


def test_visits_that_tell_nothing_are_left_out():
    q = tensor([math.nan, 1.0, 1.0, 2.0])
    measured = tensor([1.0, math.nan, math.inf, 3.0])
    fractions = tensor([0.3, 1.0])
    found = R.second_moments(q, 2.0, measured, torch.ones(4), fractions, 64.0)
    assert found[:3].tolist() == [[0.0, 0.0]] * 3
    assert found[3].tolist() == pytest.approx([9.0, 9.0])
    nothing_there = R.second_moments(tensor([0.0]), 1.0, tensor([0.0]), tensor([1.0]), tensor([0.0, 1.0]))
    assert nothing_there.tolist() == [[0.0, 0.0]], "0 / 0"
    assert R.second_moments(torch.empty(0), 1.0, torch.empty(0), torch.empty(0), fractions).shape == (0, 2)


def test_effective_sample_size():
    assert R.effective_sample_size(torch.full((8,), 0.3)).item() == pytest.approx(8.0)
    assert R.effective_sample_size(tensor([1.0, 2.0, 3.0])).item() == pytest.approx(36 / 14)
    assert R.effective_sample_size(tensor([1.0, 0.0])).item() == 1.0


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rate", [[0.4, 0.7, 1.9], [1.0, 1.0, 1.0], [1.6, 0.9, 0.5]])
def test_variance_ratio_is_the_ratio_of_second_moments(rate, exponent):
    """In expectation over draws, represented by visits in proportion to the rates."""
    rate, q = tensor(rate, dtype=torch.float64), tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    visits = torch.repeat_interleave((10 * rate).round().long())
    found = R.variance_ratio(q[visits], rate[visits], R.weights(rate, exponent)[visits])
    pairs = list(zip(rate.tolist(), q.tolist(), strict=True))
    ours = sum(r / 3 * (r**-exponent * g) ** 2 for r, g in pairs)
    uniform = sum(1 / 3 * g**2 for g in q.tolist())
    assert found.item() == pytest.approx(ours / uniform, rel=1e-12)
    if exponent == 1:
        assert (found < 1) == (rate[2] > 1), "a gain only where the important is preferred"
    if exponent < 1 and len(set(rate.tolist())) > 1:
        as_if_full = R.variance_ratio(q[visits], rate[visits], R.weights(rate)[visits])
        assert found.item() != pytest.approx(as_if_full.item(), rel=1e-2), "control"


def test_no_rates_are_better_than_those_of_the_importance():
    """The minimum is 1/(1 + CV²)."""
    q = 0.1 + some(40)
    least = (q.mean().square() / q.square().mean()).item()
    expected = {}
    for floor in (0.0, 0.1, 0.3, 1.0):
        rate = R.rates(q, floor)
        expected[floor] = (q.square() / rate).mean().item() / q.square().mean().item()
    assert expected[0.0] == pytest.approx(least, rel=1e-9)
    assert sorted(expected.values()) == list(expected.values())
    assert expected[1.0] == pytest.approx(1.0)
