"""Rates, weights and variance ratios: hand calculations, reference implementations, properties, extreme values."""

import math

import oracles
import pytest
import torch
from sampling_helpers import random_values
from torch import tensor

from hf_importance.sampling import rates as R

IMPORTANCES = {
    "all known": [0.5, 2.0, 0.0, 4.0],
    "some unknown": [0.5, math.nan, 3.0, math.nan],
    "outlier": [1.0, 1.0, 1000.0],
    "all unknown": [math.nan, math.nan],
    "all zero": [0.0, 0.0, 0.0],
    "zero and unknown": [0.0, math.nan],
    "single example": [0.7],
    "tiny": [1e-30, 3e-30],
}


def rates(q, uniform_fraction, max_rate=math.inf):
    """Rates of all examples, whose mean is 1."""
    rate = R.unnormalised_rates(q, q.nanmean(dtype=torch.float64).item(), uniform_fraction, max_rate)
    return rate / rate.mean()


# ---- importance → rate → weight --------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform_fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_rate", [1.0, 1.7, 64.0, math.inf])
@pytest.mark.parametrize("case", IMPORTANCES)
def test_rates_match_reference(case, uniform_fraction, max_rate):
    q = tensor(IMPORTANCES[case], dtype=torch.float64)
    before = q.clone()
    found = rates(q, uniform_fraction, max_rate)
    assert found.tolist() == pytest.approx(oracles.rates(q.tolist(), uniform_fraction, max_rate), rel=1e-12)
    assert found.mean().item() == pytest.approx(1.0, rel=1e-12)
    assert (found >= uniform_fraction * (1 - 1e-12)).all(), "no weight exceeds 1/f"
    assert torch.equal(q.nan_to_num(-1.0), before.nan_to_num(-1.0)), "the argument is not modified"


def test_rates_by_hand():
    q = tensor([1.0, 2.0, 3.0])
    assert rates(q, 0.0).tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert rates(q, 0.5).tolist() == pytest.approx([0.75, 1.0, 1.25])
    assert rates(q, 1.0).tolist() == [1.0, 1.0, 1.0]
    assert rates(torch.full((3,), 2.5), 0.3, 64.0).tolist() == [1.0, 1.0, 1.0]
    assert rates(tensor([1.0, 1.0, 10.0]), 0.0, 1.75).tolist() == pytest.approx([1 / 3, 1 / 3, 7 / 3])
    assert rates(tensor([1.0, 3.0, math.nan]), 0.0).tolist() == pytest.approx([0.5, 1.5, 1.0])


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_monotonic_and_independent_of_scale_and_order(seed):
    q = random_values(50, seed) ** 4
    found = rates(q, 0.3, 2.0)
    assert (found[q.argsort()].diff() >= 0).all()
    assert (found[q.argsort()].diff() > 0).sum() > 25, "control: rates differ"
    torch.testing.assert_close(rates(1e6 * q, 0.3, 2.0), found, rtol=1e-12, atol=0)
    torch.testing.assert_close(rates(q.flip(0), 0.3, 2.0), found.flip(0), rtol=1e-12, atol=0)
    assert (rates(q, 0.6) - 1).abs().max() < (rates(q, 0.3) - 1).abs().max(), "a higher floor is closer to uniform"
    assert rates(q, 0.3, 2.0).max() < rates(q, 0.3).max(), "premise: max_rate takes effect"


def test_unnormalised_rates_of_a_subset_equal_those_within_all_examples():
    q = random_values(20).float()
    mean = q.mean(dtype=torch.float64).item()
    whole = R.unnormalised_rates(q, mean, 0.3, 2.0)
    assert torch.equal(R.unnormalised_rates(q[3:9], mean, 0.3, 2.0), whole[3:9])
    assert not torch.equal(R.unnormalised_rates(q[3:9], q[3:9].mean().item(), 0.3, 2.0), whole[3:9]), "control"
    floors = tensor([0.0, 0.3, 1.0])
    for_each_floor = R.unnormalised_rates(q[:, None], mean, floors)
    for k, floor in enumerate(floors.tolist()):
        torch.testing.assert_close(for_each_floor[:, k], R.unnormalised_rates(q, mean, floor))


@pytest.mark.parametrize("mean", [0.0, math.nan])
def test_rates_are_equal_if_the_mean_is_zero_or_unknown(mean):
    assert R.unnormalised_rates(tensor([0.0, 0.0, math.nan]), mean, 0.3).tolist() == [1.0, 1.0, 1.0]
    assert R.unnormalised_rates(tensor([0.0, 2.0, math.nan]), 1.0, 0.5).tolist() == [0.5, 1.5, 1.0], "control"


def test_weights_are_powers_of_the_inverse_rate():
    rate = tensor([0.25, 1.0, 4.0])
    assert R.weights(rate).tolist() == [4.0, 1.0, 0.25]
    assert R.weights(rate, 0.5).tolist() == [2.0, 1.0, 0.5]
    assert R.weights(rate, 0.0).tolist() == [1.0, 1.0, 1.0]
    rate = rates(random_values(30), 0.2)
    assert (rate * R.weights(rate)).tolist() == pytest.approx([1.0] * 30), "all examples have equal expected weight"
    assert R.weights(rate).max() <= 1 / 0.2


# ---- second moments and variance ratios ------------------------------------------------------------------------------


def test_second_moments_by_hand():
    """With visits in proportion to the rates, they are Σ q'² / r_f."""
    remembered, measured = [0.5, 1.0, 2.5], [1.0, 0.8, 2.0]
    rate, visits = [0.5, 1.0, 1.5], [0, 1, 1, 2, 2, 2]
    fractions = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    found = R.second_moments(
        tensor(remembered)[visits], 4 / 3, tensor(measured)[visits], tensor(rate)[visits], fractions
    ).sum(0)
    for fraction, moment in zip(fractions.tolist(), found.tolist(), strict=True):
        with_floor = [(1 - fraction) * q / (4 / 3) + fraction for q in remembered]
        by_hand = sum(2 * q**2 / r for q, r in zip(measured, with_floor, strict=True))
        assert moment == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("max_rate", [1.3, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_second_moments_match_reference(seed, max_rate):
    remembered, measured = random_values(40, seed), random_values(40, seed + 10)
    rate = 0.3 + random_values(40, seed + 20)
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


def test_second_moment_at_the_drawn_floor_is_that_of_the_gradient_estimate():
    """Drawn with p = r / N and weighted by 1/r: Σ_i (1/r_i) q'_i² is N times the expectation of (q'/r)²."""
    remembered, measured = random_values(30), random_values(30, 1)
    rate = rates(remembered, 0.3)
    expected = (rate / 30 * (measured / rate).square()).sum().item()
    uniform = measured.square().mean().item()
    terms = R.second_moments(remembered, remembered.mean().item(), measured, rate, tensor([0.3, 1.0]))
    assert (rate * terms[:, 0]).sum().item() / 30 == pytest.approx(expected, rel=1e-6)  # Σ r: visits at these rates
    assert (rate * terms[:, 1]).sum().item() / 30 == pytest.approx(uniform, rel=1e-12), "uniform sampling at floor 1"
    assert expected != pytest.approx(uniform, rel=1e-2), "control"


def test_second_moments_ignore_non_finite_importances():
    q = tensor([math.nan, 1.0, 1.0, 2.0])
    measured = tensor([1.0, math.nan, math.inf, 3.0])
    fractions = tensor([0.3, 1.0])
    found = R.second_moments(q, 2.0, measured, torch.ones(4), fractions, 64.0)
    assert found[:3].tolist() == [[0.0, 0.0]] * 3
    assert found[3].tolist() == pytest.approx([9.0, 9.0])
    zero = R.second_moments(tensor([0.0]), 1.0, tensor([0.0]), tensor([1.0]), tensor([0.0, 1.0]))
    assert zero.tolist() == [[0.0, 0.0]], "0 / 0 counts as 0"
    assert R.second_moments(torch.empty(0), 1.0, torch.empty(0), torch.empty(0), fractions).shape == (0, 2)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rate", [[0.4, 0.7, 1.9], [1.0, 1.0, 1.0], [1.6, 0.9, 0.5]])
def test_variance_ratio_is_the_ratio_of_second_moments(rate, exponent):
    """In expectation over draws, represented by visits in proportion to the rates."""
    rate, q = tensor(rate, dtype=torch.float64), tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    visits = torch.repeat_interleave((10 * rate).round().long())
    found = oracles.variance_ratio(q[visits], rate[visits], R.weights(rate, exponent)[visits])
    pairs = list(zip(rate.tolist(), q.tolist(), strict=True))
    ours = sum(r / 3 * (r**-exponent * g) ** 2 for r, g in pairs)
    uniform = sum(1 / 3 * g**2 for g in q.tolist())
    assert found.item() == pytest.approx(ours / uniform, rel=1e-12)
    if exponent == 1:
        assert (found < 1) == (rate[2] > 1), "below 1 only if important examples have higher rates"
    if exponent < 1 and len(set(rate.tolist())) > 1:
        with_exponent_one = oracles.variance_ratio(q[visits], rate[visits], R.weights(rate)[visits])
        assert found.item() != pytest.approx(with_exponent_one.item(), rel=1e-2), "control"


def test_variance_ratio_is_smallest_for_rates_proportional_to_importance():
    """The minimum is 1/(1 + CV²)."""
    q = 0.1 + random_values(40)
    least = (q.mean().square() / q.square().mean()).item()
    expected = {}
    for floor in (0.0, 0.1, 0.3, 1.0):
        rate = rates(q, floor)
        expected[floor] = (q.square() / rate).mean().item() / q.square().mean().item()
    assert expected[0.0] == pytest.approx(least, rel=1e-9)
    assert sorted(expected.values()) == list(expected.values())
    assert expected[1.0] == pytest.approx(1.0)
