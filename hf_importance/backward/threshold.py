"""How many rows are kept: probabilities in proportion to gradient norms, and the threshold that sets their scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LEAST = 0.05
"""Smallest probability of a row with a gradient; weights are at most its inverse."""
_BATCHES = 24  # of which norms are remembered
_FIRST, _EVERY = 8, 4  # batches until the first threshold is sought, and between two
_GRID = torch.logspace(-2, 1, 61, dtype=torch.float64)  # thresholds relative to the root mean square of the norms
_WORTH = 0.95  # of cost · second moment without selection, which selection must fall below


def probabilities(norm: Tensor, threshold: float) -> Tensor:
    """Probability of each row: norm/threshold within [LEAST, 1]; 0 for rows without a gradient, 1 without threshold.

    >>> probabilities(torch.tensor([0.0, 0.01, 0.5, 2.0], dtype=torch.float64), threshold=1.0).tolist()
    [0.0, 0.05, 0.5, 1.0]
    """
    if threshold <= 0:
        return torch.ones_like(norm)
    return (norm / threshold).clamp(LEAST, 1).masked_fill(norm == 0, 0.0)


def rise(norm: Tensor, probability: Tensor) -> float:
    """Second moment of the selected gradients relative to that of all: Σ norm²/p / Σ norm²; 1 if all norms are 0.

    >>> rise(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.5]))
    1.5
    """
    square = norm.square()
    total = square.sum().item()
    return (square / probability.masked_fill(square == 0, 1)).sum().item() / total if total > 0 else 1.0


def threshold_for(norm: Tensor, number: int) -> float:
    """The threshold at which the probabilities sum to a number of rows; 0 if that is as many as have a gradient.

    >>> round(threshold_for(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64), number=2), 6)
    6.0
    """
    norms = [value for value in norm.tolist() if value > 0]  # a list is faster than tensors of a few elements
    if number >= len(norms):
        return 0.0
    low, high = 0.0, max(norms) / LEAST
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(min(max(value / middle, LEAST), 1.0) for value in norms)
        low, high = (middle, high) if total > number else (low, middle)
    return high


class Threshold:
    """The threshold of gradient norms, from past batches.

    Of all thresholds that raise the second moment of the gradient by at most the tolerance, it is the one with the
    least cost · second moment, as in efficiency-aware Russian roulette (Rath et al., EARS, 2022). It is 0, so that all
    rows are kept, unless that saves a twentieth, and until eight batches were seen.

    Args:
        tolerance: largest relative rise of the second moment, above 0.
        share: share of the cost of a step that is in proportion to the kept rows, in (0, 1).
    """

    def __init__(self, tolerance: float, share: float) -> None:
        self.tolerance, self.share = tolerance, share
        self.value = 0.0
        self.kept = 1.0  # expected share of the rows
        self._past: list[Tensor] = []
        self._batches = 0

    def observe(self, norm: Tensor) -> None:
        """Remember the norms of a batch, float64 `[rows]`, unless they overflowed, and adapt the threshold."""
        if not norm.isfinite().all():
            return
        self._past = [*self._past, norm][-_BATCHES:]
        self._batches += 1
        if self._batches >= _FIRST and self._batches % _EVERY == 0:
            self._adapt(torch.cat(self._past))

    def _adapt(self, norm: Tensor) -> None:
        self.value, self.kept = 0.0, 1.0
        square = norm.square()
        if not square.any():
            return
        thresholds = _GRID * square.mean().sqrt()
        probability = (norm / thresholds[:, None]).clamp(LEAST, 1).masked_fill(norm == 0, 1.0)
        second_moment = (square / probability).sum(1) / square.sum()
        kept = probability.masked_fill(norm == 0, 0.0).mean(1)
        product = (1 - self.share + self.share * kept) * second_moment
        best = int(product.masked_fill(second_moment > 1 + self.tolerance, torch.inf).argmin())
        if product[best] < _WORTH and second_moment[best] <= 1 + self.tolerance:
            self.value, self.kept = thresholds[best].item(), kept[best].item()

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        sizes = torch.tensor([len(norm) for norm in self._past])
        past = torch.cat(self._past) if self._past else torch.zeros(0, dtype=torch.float64)
        return {"value": self.value, "kept": self.kept, "batches": self._batches, "past": past, "sizes": sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`].

        Raises:
            ValueError: if a value is out of range.
        """
        value, kept = float(state["value"]), float(state["kept"])
        if not (0 <= value < math.inf and 0 <= kept <= 1):
            raise ValueError(f"threshold {value} or kept share {kept} is out of range")
        self.value, self.kept, self._batches = value, kept, int(state["batches"])
        self._past = list(state["past"].double().split(state["sizes"].tolist()))
