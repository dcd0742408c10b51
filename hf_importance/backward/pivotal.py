"""Which rows are kept together: the local pivotal method (Grafström, Lundström & Schelin 2012)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDING = 1e-9


class Chance:
    """Random decisions, from a generator of their own."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._numbers: list[float] = []

    def flip(self, probability: float) -> bool:
        """True with this probability."""
        return self._next() < probability

    def choose(self, number: int) -> int:
        """One of 0 … number − 1."""
        return min(int(self._next() * number), number - 1)

    def reserve(self, number: int) -> None:
        """Draw so many numbers at once, in place of those that are left of the last time."""
        self._numbers = torch.rand(number, generator=self._generator, dtype=torch.float64).tolist()

    def _next(self) -> float:
        if not self._numbers:
            self.reserve(1)
        return self._numbers.pop()


def local_pivotal(probability: Sequence[float], similarity: Tensor, chance: Chance) -> list[int]:
    """Draw rows such that each is kept with its probability, and similar rows stand in for each other.

    Repeatedly, a random row and the undecided one most similar to it duel: one takes the probability of the other, as
    far as it goes to 1, and one of them is decided. So the number of rows is fixed, up to rounding of the sum of the
    probabilities, and so it nearly is among rows that are similar.

    Args:
        probability: of each row, in [0, 1].
        similarity: `[rows, rows]`; of a row with itself it does not matter.
        chance: random decisions.

    Returns:
        The positions of the kept rows, ascending.

    >>> chance = Chance(torch.Generator().manual_seed(0))
    >>> similarity = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    >>> kept = local_pivotal([0.5, 0.5, 0.5, 0.5], similarity, chance)
    >>> len(kept), kept[0] < 2 <= kept[1]  # one of each pair
    (2, True)
    """
    probability = list(probability)
    undecided = [row for row, p in enumerate(probability) if _ROUNDING < p < 1 - _ROUNDING]
    chance.reserve(2 * len(undecided))
    nearest = _nearest(similarity, undecided)
    is_open = dict.fromkeys(undecided, True)
    while len(undecided) > 1:
        one = undecided[chance.choose(len(undecided))]
        other = next(row for row in nearest[one] if is_open[row])
        probability[one], probability[other] = _duel(probability[one], probability[other], chance)
        for row in (one, other):
            is_open[row] = _ROUNDING < probability[row] < 1 - _ROUNDING
        undecided = [row for row in undecided if is_open[row]]
    for row in undecided:
        probability[row] = float(chance.flip(probability[row]))
    return [row for row, p in enumerate(probability) if p > 0.5]


def _nearest(similarity: Tensor, rows: list[int]) -> dict[int, list[int]]:
    """The other rows, by decreasing similarity to each row."""
    part = similarity[rows][:, rows]
    order = part.argsort(dim=1, descending=True, stable=True).tolist()
    return {row: [rows[i] for i in line if rows[i] != row] for row, line in zip(rows, order, strict=True)}


def _duel(a: float, b: float, chance: Chance) -> tuple[float, float]:
    """New probabilities with the same expectation and sum, of which one is 0 or 1."""
    together = a + b
    if together < 1:
        return (together, 0.0) if chance.flip(a / together) else (0.0, together)
    return (1.0, together - 1) if chance.flip((1 - b) / (2 - together)) else (together - 1, 1.0)
