"""Importance, cost → rate → weight, and what a batch tells about them. Pure tensors.

Where visits cost differently, texts by their length, a rate is proportional not to the importance q but to q/√c, with c
the cost of a visit. The second moment of the gradient estimate is Σ q²/r, and what a visit costs on average is Σ r c:
how much has to be spent for a given precision is their product, and no rates make it less than (Σ q √c)², which those
do (Cauchy–Schwarz; the allocation of Neyman 1934, under costs). So texts that are equally hard, token by token, whose
importance is √c because it is the root of a sum over tokens, are visited equally often. Weights are those of the rates
as ever, and estimates as unbiased.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_costs(lengths: Tensor) -> Tensor | None:
    """What a visit of each example costs, relative to the mean over all; None where all cost the same.

    Args:
        lengths: `[examples]`, > 0.

    Returns:
        c float32 `[examples]`, of mean 1.

    >>> relative_costs(torch.tensor([10, 20, 60]))
    tensor([0.3333, 0.6667, 2.0000])
    """
    if bool((lengths == lengths[0]).all()):
        return None
    return (lengths / lengths.mean(dtype=torch.float64)).float()


def per_cost(importance: Tensor, cost: Tensor | None) -> Tensor:
    """q/√c, which rates are proportional to; q itself where there are no costs.

    >>> per_cost(torch.tensor([1.0, 1.0]), torch.tensor([0.25, 4.0]))
    tensor([2.0000, 0.5000])
    """
    return importance if cost is None else importance / cost.sqrt()


@torch.no_grad()
def rates(importance: Tensor, uniform_fraction: float, max_rate: float = math.inf, fresh: float = math.nan) -> Tensor:
    """Expected visits relative to uniform sampling: proportional to the importance, with a floor.

    r ∝ min((1 − f)·q/q̄ + f, max_rate) with f = `uniform_fraction` and q̄ the mean importance; 1 for all where none is
    known or all are 0. An unknown importance counts as `fresh`, or as the mean of the others where that is unknown too.

    Args:
        importance: q `[examples]`, ≥ 0, NaN where unknown; or q/√c, see [`per_cost`], also for the others here.
        uniform_fraction: f in [0, 1]; no rate is below f, so no weight is above 1/f.
        max_rate: ≥ 1.
        fresh: importance of examples when they are seen for the first time, ≥ 0 or NaN.

    Returns:
        r `[examples]`, of mean 1: the probability of each draw is p = r / N.

    >>> rates(torch.tensor([0.0, 1.0, 2.0, float("nan")]), uniform_fraction=0.5)
    tensor([0.5000, 1.0000, 1.5000, 1.0000])
    >>> rates(torch.tensor([1.0, float("nan")]), uniform_fraction=0.0, fresh=3.0)
    tensor([0.5000, 1.5000])
    """
    mean = importance.nan_to_num(nan=fresh).nanmean(dtype=torch.float64).item()
    rate = unnormalised_rates(importance, mean, uniform_fraction, max_rate, fresh)
    return rate / rate.mean(dtype=torch.float64).to(rate.dtype)


@torch.no_grad()
def unnormalised_rates(
    importance: Tensor,
    mean: float,
    uniform_fraction: float | Tensor,
    max_rate: float = math.inf,
    fresh: float = math.nan,
) -> Tensor:
    """[`rates`] before normalisation, of any selection of examples, given the mean importance q̄ of all or NaN.

    >>> unnormalised_rates(torch.tensor([0.0, 3.0]), mean=1.0, uniform_fraction=0.5, max_rate=1.5)
    tensor([0.5000, 1.5000])
    """
    rate = importance.nan_to_num(nan=fresh) / (mean or math.nan)  # all 0: all alike, as if nothing were known
    rate = rate * (1 - uniform_fraction) + uniform_fraction
    return rate.clamp_(max=max_rate).nan_to_num_(nan=1.0)


def weights(rate: Tensor, exponent: float = 1.0) -> Tensor:
    """(1 / (N p))^exponent = r^−exponent; with exponent 1 the expected weighted loss is the mean over all examples.

    >>> weights(torch.tensor([0.5, 1.0, 2.0]))
    tensor([2.0000, 1.0000, 0.5000])
    """
    return rate.pow(-exponent)


@torch.no_grad()
def second_moments(
    remembered: Tensor, mean: float, measured: Tensor, rate: Tensor, fractions: Tensor, max_rate: float = math.inf
) -> Tensor:
    """What the second moment of the gradient estimate would be with other floors: Σ (1/r) q'² / r_f over some visits.

    Drawn with p = r / N, this estimates Σ q'² / r_f over all examples, where q' is the importance when an example is
    visited, and r_f the rate that what was remembered of it would have given with the floor f: large where an example
    that seemed unimportant has become important.

    Args:
        remembered: q `[visits]` before the visits, or q/√c; NaN where unknown; such visits tell nothing.
        mean: of what is remembered so.
        measured: q' `[visits]`; visits where it is not finite tell nothing.
        rate: r `[visits]`, as drawn.
        fractions: f `[floors]`, each in [0, 1]. With f = 1 it is the second moment of uniform sampling.
        max_rate: as for [`rates`].

    Returns:
        float64 `[visits, floors]`: the terms of the sum, 0 for visits that tell nothing.

    >>> q, r = torch.tensor([1.0, 3.0, 3.0, 3.0]), torch.tensor([0.5, 1.5, 1.5, 1.5])  # as often as the rates say
    >>> second_moments(q, 2.0, q, r, torch.tensor([0.0, 1.0])).sum(0)
    tensor([16., 20.], dtype=torch.float64)
    """
    informative = remembered.isfinite() & measured.isfinite()
    with_floors = unnormalised_rates(remembered.double()[:, None], mean, fractions.double(), max_rate)
    terms = (measured.double().square() / rate.double())[:, None] / with_floors
    return terms.where(informative[:, None], 0.0).nan_to_num(nan=0.0)  # 0 / 0: neither important nor drawn


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
    """What visits would cost with other floors: Σ (1/r) c r_f over the visits that tell something.

    Beside [`second_moments`]: rates need not be normalised, as the product of the two does not depend on their scale.

    Args:
        remembered: as for [`second_moments`].
        mean: likewise.
        measured: likewise.
        rate: likewise.
        cost: c `[visits]`.
        fractions: likewise.
        max_rate: likewise.

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
    """(Σw)² / Σw² (Kish 1965): the number of equally weighted examples that would estimate a mean as well.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(2.)
    """
    return weight.sum().square() / weight.square().sum()


def variance_ratio(importance: Tensor, rate: Tensor, weight: Tensor, cost: Tensor | None = None) -> Tensor:
    """ρ = mean(w² q²) / mean(q² / r): second moment of the gradient estimate over that of uniform sampling.

    Below 1 is a gain. Drawn with p = r/N, the numerator estimates Σ r w² q²/N, the denominator Σ q²/N. With costs it is
    that at equal cost, ρ κ, where κ = mean(c) / mean(c / r) is what a visit costs relative to one of uniform sampling.

    Args:
        importance: q `[visits]`, measured at the visits that the rates and weights belong to.
        rate: r `[visits]`.
        weight: w `[visits]`.
        cost: c `[visits]`.

    >>> variance_ratio(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), torch.tensor([2.0, 1.0]))
    tensor(1.3333)
    """
    squares = importance.square()
    ratio = (weight.square() * squares).sum() / (squares / rate).sum()
    return ratio if cost is None else ratio * cost.sum() / (cost / rate).sum()
