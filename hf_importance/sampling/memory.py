"""What is remembered of every example: its importance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.rates import per_cost
from hf_importance.state import read_tensor

CHUNK = 2**20
"""Examples at a time, where all of them are gone through."""


@dataclass(frozen=True)
class Update:
    """What an update of the memory changed: each example once for each batch that visited it.

    Args:
        index: int64 `[changes]`.
        before: float32 `[changes]`, NaN where the example was unknown.
        after: likewise.
        change: int64 `[visits]`: the change that each visit was part of.
        cost: float32 `[changes]`, c of the examples; None where all cost the same.
    """

    index: Tensor
    before: Tensor
    after: Tensor
    change: Tensor
    cost: Tensor | None = None


class ImportanceMemory:
    """The importances of all examples. It only remembers; what follows from them is decided elsewhere.

    Args:
        length: number of examples.
        momentum: share of the old importance in the new one, in [0, 1); α of Salaün et al. 2023.
        cost: c float32 `[examples]` of a visit of each, see [`rates.relative_costs`]; None: all cost the same.
        tokens: float32 `[examples]`, how many of each have a loss, where its loss is a sum over them; else None.

    >>> memory = ImportanceMemory(3, momentum=0.0)
    >>> _ = memory.update(torch.tensor([0, 2]), torch.tensor([0.5, 1.5]))
    >>> memory.importances
    tensor([0.5000,    nan, 1.5000])
    """

    def __init__(
        self, length: int, momentum: float = 0.2, cost: Tensor | None = None, tokens: Tensor | None = None
    ) -> None:
        self.importances = torch.full((length,), torch.nan)  # float32 [examples], NaN = unknown
        self.momentum = momentum
        self.cost, self.tokens = cost, tokens
        self.spared: Tensor | None = None  # bool [examples]: not to be pruned
        self.known = 0

    def __len__(self) -> int:
        return len(self.importances)

    @torch.no_grad()
    def update(self, index: Tensor, importance: Tensor, batch: Tensor | None = None) -> Update:
        """Remember what was measured: q ← α·q + (1 − α)·measured, or the measurement itself where q was unknown.

        Many batches at once cost hardly more than one, and give what they would have given one after the other.

        Args:
            index: int64 `[visits]`. Visits of one example in one batch count as one, with their mean.
            importance: `[visits]`, ≥ 0. Where it is not finite, the example becomes unknown again.
            batch: int64 `[visits]`, ascending from 0: the batch of each visit; by default all are of one.
        """
        batch = torch.zeros_like(index) if batch is None else batch
        batches = int(batch[-1]) + 1 if len(batch) else 1
        once, change, count = (index * batches + batch).unique(return_inverse=True, return_counts=True)
        measured = torch.zeros(len(once)).index_add_(0, change, importance.float()).div_(count)
        index = once // batches
        before, after = torch.empty_like(measured), torch.empty_like(measured)
        for turn in _turns(index):
            before[turn] = self.importances[index[turn]]
            unknown = before[turn].isnan()
            new = torch.where(unknown, measured[turn], measured[turn].lerp(before[turn], self.momentum))
            after[turn] = new.masked_fill_(~new.isfinite(), torch.nan)
            self.importances[index[turn]] = new
            self.known += int(unknown.sum()) - int(new.isnan().sum())
        return Update(index, before, after, change, None if self.cost is None else self.cost[index])

    def per_cost(self, index: Tensor | slice) -> Tensor:
        """What the rates of some examples are proportional to, see [`rates.per_cost`]; not to be changed."""
        return per_cost(self.importances[index], None if self.cost is None else self.cost[index])

    def unimportant(self, mass: float) -> Tensor:
        """See [`unimportant`]. Of losses that are sums it goes by the root mean square over their n tokens, q/√n.

        Else short texts would be left out, however hard they are, and nothing makes up for what is left out.
        """
        importance = per_cost(self.importances, self.tokens)
        if self.spared is not None:
            importance = importance.masked_fill(self.spared, torch.nan)
        return unimportant(importance, mass)

    def increase(self, increment: float) -> None:
        """Add ε to every known importance: no example is forgotten (Salaün et al. 2023, the end of their epochs)."""
        self.importances += increment

    def scale(self, which: Tensor, factor: float) -> None:
        """Multiply what is remembered of some examples; NaN makes them unknown.

        Args:
            which: bool `[examples]`.
            factor: ≥ 0 or NaN.
        """
        self.importances[which] *= factor
        self.known = int(self.importances.isfinite().sum())

    def chunks(self) -> Iterator[slice]:
        """Of all examples, so that going through them takes little memory."""
        return (slice(start, start + CHUNK) for start in range(0, len(self), CHUNK))

    def least_variance_ratio(self) -> float:
        """The least [`rates.variance_ratio`] that importances like these allow: (mean q)² / mean q² = 1/(1 + CV²).

        It is reached where every visit finds what was remembered. 1 where all are alike, or nothing is known. With
        costs it is (mean q√c)² / (mean q² · mean c), and 1 where all q/√c are alike.

        >>> memory = ImportanceMemory(2)
        >>> _ = memory.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
        >>> memory.least_variance_ratio()
        0.8
        """
        total, squares, cost = 0.0, 0.0, 0.0
        for chunk in self.chunks():
            known = self.importances[chunk].nan_to_num(nan=0.0).double()
            squares += known.square().sum().item()
            if self.cost is not None:
                costs = self.cost[chunk].double()
                known *= costs.sqrt()
                cost += costs[self.importances[chunk].isfinite()].sum().item()
            total += known.sum().item()
        return total**2 / ((self.known if self.cost is None else cost) * squares) if squares else 1.0

    def state_dict(self) -> dict[str, Any]:
        """All that training changed, as tensors and plain values."""
        return {"importance": self.importances.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        self.importances.copy_(read_tensor(state, "importance", [len(self)], torch.float32))
        self.known = int(self.importances.isfinite().sum())


def _turns(index: Tensor) -> Iterator[Tensor]:
    """Positions in a sorted index, in turns within which no example comes twice: of all the first, the second, …"""
    place = torch.arange(len(index))
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    turn = place - place.where(first, 0).cummax(0).values
    for number in range(int(turn.max()) + 1 if len(index) else 0):
        yield (turn == number).nonzero().flatten()


def unimportant(importance: Tensor, mass: float) -> Tensor:
    """Which examples together hold less than this share of the importance of all; bool `[examples]`.

    The smallest ones, of equal ones the first; no unknown ones, and none that is as important as the mean: where all
    are equally important there is nothing to leave out.

    >>> unimportant(torch.tensor([3.0, 0.1, torch.nan, 1.0]), mass=0.1).tolist()
    [False, True, False, False]
    """
    found = torch.zeros(len(importance), dtype=torch.bool)
    if mass > 0:
        importance, order = importance.sort(stable=True)  # NaN comes last
        small = importance < importance.nanmean(dtype=torch.float64)
        cumulated = importance.nan_to_num_(nan=0.0).cumsum(0, dtype=torch.float64)
        found[order[small & (cumulated < mass * cumulated[-1])]] = True
    return found


def mean_importance(memory: ImportanceMemory, fresh: float = math.nan, pruned: Tensor | None = None) -> float:
    """Mean importance (per cost) of those that are not pruned, those unknown counted as `fresh`; NaN: nothing is known.

    Args:
        memory: of the examples.
        fresh: importance of an example that is seen for the first time; NaN leaves the unknown ones out.
        pruned: bool `[examples]`; None for none.
    """
    total, counted = 0.0, 0
    for chunk in memory.chunks():
        values = memory.per_cost(chunk).nan_to_num(nan=fresh)
        if pruned is not None:
            values.masked_fill_(pruned[chunk], torch.nan)
        total += values.nansum(dtype=torch.float64).item()
        counted += len(values) - int(values.isnan().sum())
    return total / counted if counted else math.nan
