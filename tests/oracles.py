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


def rates(importance, uniform_fraction, max_rate=math.inf, fresh=math.nan):
    """Rates by definition, as Python floats, one example at a time."""
    importance = [fresh if math.isnan(q) else q for q in importance]
    known = [q for q in importance if not math.isnan(q)]
    mean = sum(known) / len(known) if known else 0.0
    found = [unnormalised_rate(q, mean, uniform_fraction, max_rate) for q in importance]
    return [s / (sum(found) / len(found)) for s in found]


def unnormalised_rate(q, mean, uniform_fraction, max_rate=math.inf):
    if math.isnan(q) or math.isnan(mean) or mean == 0:
        return 1.0
    return min((1 - uniform_fraction) * q / mean + uniform_fraction, max_rate)


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


def first_credits(permutation):
    """Credits of all examples at the start of a pass, by their position in its permutation."""
    credit = [0.0] * len(permutation)
    for place, i in enumerate(permutation):
        credit[i] = 1 - (place + 0.5) / len(permutation)
    return credit


def spend(credit, rate, visits):
    """Visits of a segment, in the order in which credits cross 1, and the credits after it. Rate 0 means pruned."""
    drawable = sum(r > 0 for r in rate)
    passed, left = [], []
    for i, (c, r) in enumerate(zip(credit, rate, strict=True)):
        added = visits * r / drawable
        passed += [((k - c) / added, i) for k in range(1, math.floor(c + added) + 1)]
        left.append((c + added) % 1)
    return [i for _, i in sorted(passed)], left
