"""Reference implementations: float64 autograd one example at a time, and Python loops one visit at a time."""

import itertools
import math

import torch

# ---- loss of one example from its logits, [..., classes] or [outputs], and its label ---------------------------------


def cross_entropy(z, y, label_smoothing=0.0):
    """The label is a class, one class per position (-100: ignored), or one distribution per position."""
    y = torch.as_tensor(y)
    if y.is_floating_point():
        rows, targets = z.reshape(-1, z.shape[-1]), y.double().reshape(-1, z.shape[-1])
    else:
        kept = y.reshape(-1) != -100
        rows = z.reshape(-1, z.shape[-1])[kept]
        targets = torch.eye(z.shape[-1], dtype=torch.float64)[y.reshape(-1)[kept]]
    total = z.sum() * 0.0
    for row, target in zip(rows, targets, strict=True):
        target = (1 - label_smoothing) * target + label_smoothing / len(target)
        total = total - sum(t * (row[k] - row.logsumexp(0)) for k, t in enumerate(target) if t > 0)
    return total


def binary_cross_entropy(z, y):
    y = torch.as_tensor(y).double()
    terms = [t * torch.log1p(torch.exp(-x)) + (1 - t) * torch.log1p(torch.exp(x)) for x, t in zip(z, y, strict=True)]
    return sum(terms) / len(terms)


def squared_error(z, y):
    z, y = z.reshape(-1), torch.as_tensor(y).double().reshape(-1)
    return sum((a - b) ** 2 for a, b in zip(z, y, strict=True)) / len(y)


def value(loss, z, y, *more):
    return loss(z.detach().double(), y, *more)


def gradient_norm(loss, z, y, *more):
    z = z.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, y, *more), z)
    return gradient.norm()


# ---- rates and their moments -----------------------------------------------------------------------------------------


def rates(importance, uniform_fraction, max_rate=math.inf):
    """Rates by definition, as Python floats, one example at a time."""
    known = [q for q in importance if not math.isnan(q)]
    mean = sum(known) / len(known) if known else 0.0
    found = [unnormalised_rate(q, mean, uniform_fraction, max_rate) for q in importance]
    return [s / (sum(found) / len(found)) for s in found]


def rates_of(importance, uniform_fraction, max_rate=math.inf):
    """[`rates`] of a tensor, as a tensor of its type."""
    return torch.tensor(rates(importance.tolist(), uniform_fraction, max_rate), dtype=importance.dtype)


def unnormalised_rate(q, mean, uniform_fraction, max_rate=math.inf):
    if math.isnan(q) or math.isnan(mean) or mean == 0:
        return 1.0
    return min((1 - uniform_fraction) * q / mean + uniform_fraction, max_rate)


def assumed(importance, memory, prior):
    """Importances with those of the prior where they are unknown, times Σ known / Σ their prior in the memory."""
    both = [(q, p) for q, p in zip(memory, prior, strict=True) if not math.isnan(q + p)]
    before = sum(p for _, p in both)
    scale = sum(q for q, _ in both) / before if before else 1.0
    return [scale * p if math.isnan(q) else q for q, p in zip(importance, prior, strict=True)]


def second_moments(remembered, mean, measured, rate, fractions, max_rate=math.inf):
    """Σ (1/r) q'² / r_f over the visits whose remembered and measured importances are finite."""
    found = [0.0] * len(fractions)
    for before, now, r in zip(remembered, measured, rate, strict=True):
        if math.isfinite(before) and math.isfinite(now):
            for k, f in enumerate(fractions):
                found[k] += now**2 / r / unnormalised_rate(before, mean, f, max_rate)
    return found


def expected_costs(remembered, mean, measured, rate, cost, fractions, max_rate=math.inf):
    """Σ (1/r) c r_f over the visits whose remembered and measured importances are finite."""
    found = [0.0] * len(fractions)
    for before, now, r, c in zip(remembered, measured, rate, cost, strict=True):
        if math.isfinite(before) and math.isfinite(now):
            for k, f in enumerate(fractions):
                found[k] += c / r * unnormalised_rate(before, mean, f, max_rate)
    return found


def variance_ratio(importance, rate, weight, cost=None):
    """Variance ratio ρ = mean(w² q²) / mean(q² / r) of visits `[visits]`: second moment over that of uniform sampling.

    With costs, it is taken at equal cost: ρ κ, where κ = mean(c) / mean(c / r) is the cost of a visit relative to
    uniform sampling.
    """
    squares = importance.square()
    ratio = (weight.square() * squares).sum() / (squares / rate).sum()
    return ratio if cost is None else ratio * cost.sum() / (cost / rate).sum()


def moments_of_batches(gradients, cost, rate, batch):
    """Moments by enumeration of all batches, with examples drawn independently with p = r / N.

    Returns:
        The expected gradient estimate, its variance, and the expected cost of a batch.
    """
    n, mean, square, spent = len(rate), torch.zeros_like(gradients[0]), 0.0, 0.0
    for drawn in itertools.product(range(n), repeat=batch):
        probability = math.prod(rate[i] / n for i in drawn)
        estimate = sum(gradients[i] / rate[i] for i in drawn) / batch
        mean = mean + probability * estimate
        square += probability * estimate.square().sum().item()
        spent += probability * sum(cost[i] for i in drawn)
    return mean, square - mean.square().sum().item(), spent


# ---- memory and visits -----------------------------------------------------------------------------------------------


def remember(importance, index, measured, momentum):
    """Update a list of importances with one batch; return the importance before the update for each visit."""
    before = [importance[i] for i in index]
    for i in set(index):
        seen = [m for j, m in zip(index, measured, strict=True) if i == j]
        new = sum(seen) / len(seen)
        new = new if math.isnan(importance[i]) else momentum * importance[i] + (1 - momentum) * new
        importance[i] = new if math.isfinite(new) else math.nan
    return before


def pieces(position, rate, next_rate, time):
    """The pieces of strata that an example passes through: (rate, start, end) as positions in the stratum, and when."""
    found, now = [], 0.0
    while True:
        length = (1 - position) / rate if rate else math.inf
        found.append((rate, position, min(1.0, position + rate * (time - now)), now))
        if now + length >= time:
            return found
        now, position, rate = now + length, 0.0, next_rate


def advance(place, position, rate, next_rate, time, places):
    """One example through some time: its visits (when, rate), and its place and position afterwards.

    Args:
        places: places of the strata that begin, in their order.
    """
    visits, places = [], iter(places)
    for number, (now, start, end, begun) in enumerate(pieces(position, rate, next_rate, time)):
        place = next(places) if number else place
        if start <= place < end:
            visits.append((begun + (place - start) / now, now))
        position = end
    return visits, place, position


def in_rounds(columns):
    """Places of the strata that begin, given by example, in the order in which they are drawn: all first ones, …"""
    return [[column[k] for column in columns if k < len(column)] for k in range(max(map(len, columns), default=0))]


def by_example(begins, rand):
    """Places of the strata that begin, by example, if `rand` draws so many in the order of [`in_rounds`]."""
    columns = [[] for _ in begins]
    for k in range(max(begins, default=0)):
        drawing = [column for column, number in zip(columns, begins, strict=True) if number > k]
        for column, place in zip(drawing, rand(len(drawing)), strict=True):
            column.append(place)
    return columns


def plan_visits(begun, now, strata, visits, floor, pruned=None, cost=None, max_rate=64.0, rand=None):
    """Visits of a segment (when, example, rate) in order, and the place and position of each example afterwards.

    Args:
        begun: importances with which the current strata began.
        now: those of the memory, with which the next begin.
        strata: place and position of each example.
        visits: length of the segment.
        rand: draws this many places.
    """
    n = len(begun)
    pruned, cost = pruned or [False] * n, cost or [1.0] * n
    drawable = n - sum(pruned)
    time = visits / drawable
    both = []
    for importance in (begun, now):
        importance = [q / c**0.5 for q, c in zip(importance, cost, strict=True)]
        drawn = iter(rates([q for q, gone in zip(importance, pruned, strict=True) if not gone], floor, max_rate))
        both.append([0.0 if gone else next(drawn) for gone in pruned])
    passed = [pieces(strata[i][1], both[0][i], both[1][i], time) for i in range(n)]
    expected = sum(end - start for of_one in passed for _, start, end, _ in of_one)
    scale = visits / expected
    both = [[scale * r for r in column] for column in both]
    begins = [len(pieces(strata[i][1], both[0][i], both[1][i], time)) - 1 for i in range(n)]
    places = by_example(begins, rand)
    found, after = [], []
    for i in range(n):
        seen, *left = advance(*strata[i], both[0][i], both[1][i], time, places[i])
        found += [(when, i, rate) for when, rate in seen]
        after.append((*left, begins[i] > 0))
    return sorted(found), after
