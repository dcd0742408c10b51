"""Slow and obvious: one example at a time, in float64, by autograd; and every outcome of a random choice in turn."""

import itertools
import math

import torch

# ---- losses of one example: logits [..., classes] or [outputs], and its label ----------------------------------------


def cross_entropy(z, y, label_smoothing=0.0):
    """The label is a class, a class per position (-100: none), or a distribution per position."""
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


# ---- importance → rate -----------------------------------------------------------------------------------------------


def rates(importance, uniform_fraction, max_rate):
    """Section by section as it is defined: floats, one example at a time."""
    known = [q for q in importance if not math.isnan(q)]
    mean = sum(known) / len(known) if known else 0.0

    def unnormalised(q):
        if math.isnan(q) or mean == 0:
            return 1.0
        return min((1 - uniform_fraction) * q / mean + uniform_fraction, max_rate)

    found = [unnormalised(q) for q in importance]
    return [s / (sum(found) / len(found)) for s in found]


def outcomes(probabilities):
    """Every outcome of independent events, with its probability."""
    for happened in itertools.product([False, True], repeat=len(probabilities)):
        yield happened, math.prod(p if h else 1 - p for p, h in zip(probabilities, happened, strict=True))
