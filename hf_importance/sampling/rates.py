"""Importance and cost → sampling rate → importance weight, and statistics of them. Pure tensors.

If visits differ in cost (texts of different length), rates are proportional to q/√c instead of the importance q, where
c is the cost of a visit. The second moment of the gradient estimate is Σ q²/r and the mean cost of a visit is Σ r c.
Their product is the cost of a given precision; its minimum (Σ q √c)² is reached by r ∝ q/√c (Cauchy–Schwarz; Neyman
allocation, 1934, with costs). Texts that are equally hard per token are therefore visited equally often: their
importance, the root of a sum over tokens, is proportional to √c. Weights still follow from the rates, and gradient
estimates stay unbiased.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_costs(lengths: Tensor) -> Tensor | None:
    """Cost of a visit of each example, relative to the mean; None if all cost the same.

    Args:
        lengths: lengths of the examples `[examples]`, > 0.

    Returns:
        c float32 `[examples]`, of mean 1.

    >>> relative_costs(torch.tensor([10, 20, 60]))
    tensor([0.3333, 0.6667, 2.0000])
    """
    if bool((lengths == lengths[0]).all()):
        return None
    return (lengths / lengths.mean(dtype=torch.float64)).float()


def per_cost(importance: Tensor, cost: Tensor | None) -> Tensor:
    """Importance per root cost, q/√c, which rates are proportional to; q itself without costs.

    >>> per_cost(torch.tensor([1.0, 1.0]), torch.tensor([0.25, 4.0]))
    tensor([2.0000, 0.5000])
    """
    return importance if cost is None else importance / cost.sqrt()


@torch.no_grad()
def rates(importance: Tensor, uniform_fraction: float, max_rate: float = math.inf) -> Tensor:
    """Sampling rates: expected visits relative to uniform sampling, proportional to the importance, with a floor.

    r ∝ min((1 − f)·q/q̄ + f, max_rate) with f = `uniform_fraction` and q̄ the mean importance; 1 for all if none is known
    or all are 0. An unknown importance counts as the mean of the others.

    Args:
        importance: q `[examples]`, ≥ 0, NaN where unknown; or q/√c, see [`per_cost`].
        uniform_fraction: f in [0, 1]; no rate is below f, so no weight is above 1/f.
        max_rate: upper bound of the rates before normalisation, ≥ 1.

    Returns:
        r `[examples]`, with mean 1: the probability of each draw is p = r / N.

    >>> rates(torch.tensor([0.0, 1.0, 2.0, float("nan")]), uniform_fraction=0.5)
    tensor([0.5000, 1.0000, 1.5000, 1.0000])
    """
    mean = importance.nanmean(dtype=torch.float64).item()
    rate = unnormalised_rates(importance, mean, uniform_fraction, max_rate)
    return rate / rate.mean(dtype=torch.float64).to(rate.dtype)


@torch.no_grad()
def unnormalised_rates(
    importance: Tensor,
    mean: float,
    uniform_fraction: float | Tensor,
    max_rate: float = math.inf,
) -> Tensor:
    """[`rates`] before normalisation, for any subset of the examples, given the mean importance q̄ of all, or NaN.

    >>> unnormalised_rates(torch.tensor([0.0, 3.0]), mean=1.0, uniform_fraction=0.5, max_rate=1.5)
    tensor([0.5000, 1.5000])
    """
    rate = importance / (mean or math.nan)  # if all are 0, rates are those of unknown importances
    rate = rate * (1 - uniform_fraction) + uniform_fraction
    return rate.clamp_(max=max_rate).nan_to_num_(nan=1.0)


def weights(rate: Tensor, exponent: float = 1.0) -> Tensor:
    """Importance weights (1 / (N p))^exponent = r^−exponent; exponent 1 keeps the expected weighted loss unbiased.

    >>> weights(torch.tensor([0.5, 1.0, 2.0]))
    tensor([2.0000, 1.0000, 0.5000])
    """
    return rate.pow(-exponent)


@torch.no_grad()
def second_moments(
    remembered: Tensor, mean: float, measured: Tensor, rate: Tensor, fractions: Tensor, max_rate: float = math.inf
) -> Tensor:
    """Terms of the second moment of the gradient estimate with other floors f: Σ (1/r) q'² / r_f over visits.

    With visits drawn by p = r / N, the sum estimates Σ q'² / r_f over all examples. q' is the importance measured at
    the visit, and r_f the rate with floor f according to the remembered importance. A term is large if an example that
    seemed unimportant has become important.

    Args:
        remembered: q `[visits]` before the visits, or q/√c, NaN where unknown; unknown ones are ignored.
        mean: mean of the remembered importances of all examples.
        measured: q' `[visits]`; visits where it is not finite are ignored.
        rate: r `[visits]`, as drawn.
        fractions: f `[floors]`, each in [0, 1]; f = 1 gives the second moment of uniform sampling.
        max_rate: as for [`rates`].

    Returns:
        float64 `[visits, floors]`, 0 for ignored visits.

    >>> q, r = torch.tensor([1.0, 3.0, 3.0, 3.0]), torch.tensor([0.5, 1.5, 1.5, 1.5])  # as often as the rates say
    >>> second_moments(q, 2.0, q, r, torch.tensor([0.0, 1.0])).sum(0)
    tensor([16., 20.], dtype=torch.float64)
    """
    informative = remembered.isfinite() & measured.isfinite()
    with_floors = unnormalised_rates(remembered.double()[:, None], mean, fractions.double(), max_rate)
    terms = (measured.double().square() / rate.double())[:, None] / with_floors
    return terms.where(informative[:, None], 0.0).nan_to_num(nan=0.0)  # 0 / 0: importance and rate are both 0


@torch.no_grad()
def expected_costs(
    remembered: Tensor,
    mean: float,
    measured: Tensor,
    rate: Tensor,
    cost: Tensor,
    fractions: Tensor,
    max_rate: float = math.inf,
) -> Tensor:
    """Terms of the cost of a visit with other floors f: Σ (1/r) c r_f over visits.

    Rates are not normalised, because the product with [`second_moments`] does not depend on their scale.

    Args:
        remembered: as for [`second_moments`].
        mean: as for [`second_moments`].
        measured: as for [`second_moments`].
        rate: as for [`second_moments`].
        cost: c `[visits]`.
        fractions: as for [`second_moments`].
        max_rate: as for [`rates`].

    Returns:
        float64 `[visits, floors]`.

    >>> q, c, r = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.5]), torch.tensor([0.5, 1.5])
    >>> expected_costs(q, 2.0, q, r, c, torch.tensor([0.0, 1.0]))
    tensor([[0.5000, 1.0000],
            [1.5000, 1.0000]], dtype=torch.float64)
    """
    informative = remembered.isfinite() & measured.isfinite()
    with_floors = unnormalised_rates(remembered.double()[:, None], mean, fractions.double(), max_rate)
    terms = (cost.double() / rate.double())[:, None] * with_floors
    return terms.where(informative[:, None], 0.0)


def effective_sample_size(weight: Tensor) -> Tensor:
    """Effective sample size (Σw)² / Σw² (Kish 1965): equally weighted examples that estimate a mean as precisely.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(2.)
    """
    return weight.sum().square() / weight.square().sum()


def variance_ratio(importance: Tensor, rate: Tensor, weight: Tensor, cost: Tensor | None = None) -> Tensor:
    """Variance ratio ρ = mean(w² q²) / mean(q² / r): second moment of the gradient over that of uniform sampling.

    Below 1, importance sampling is more precise. With visits drawn by p = r/N, the numerator estimates Σ r w² q²/N and
    the denominator Σ q²/N. With costs, the ratio is taken at equal cost: ρ κ, where κ = mean(c) / mean(c / r) is the
    cost of a visit relative to uniform sampling.

    Args:
        importance: q `[visits]`, measured at the visits.
        rate: r `[visits]`.
        weight: w `[visits]`.
        cost: c `[visits]`.

    >>> variance_ratio(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), torch.tensor([2.0, 1.0]))
    tensor(1.3333)
    """
    squares = importance.square()
    ratio = (weight.square() * squares).sum() / (squares / rate).sum()
    return ratio if cost is None else ratio * cost.sum() / (cost / rate).sum()
