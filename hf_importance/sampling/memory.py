"""The remembered importance of every example."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.rates import per_cost
from hf_importance.sampling.state import read_tensor

CHUNK = 2**20  # examples whose visits are planned at a time


@dataclass(frozen=True)
class Update:
    """The changes made by an update of the memory: one per example and batch."""

    index: Tensor  # the examples, int64 [changes]
    before: Tensor  # importances, float32 [changes], NaN where unknown
    after: Tensor
    change: Tensor  # the change that each visit belongs to, int64 [visits]
    cost: Tensor | None = None  # of the examples, float32 [changes]; None if all cost the same


class ImportanceMemory:
    """Stores the importances of all examples, as moving averages of the measurements.

    Args:
        length: number of examples.
        momentum: weight of the old importance in the new one, in [0, 1); α of Salaün et al. 2023.
        cost: cost c of a visit, float32 `[examples]`, see [`rates.relative_costs`]; None if all cost the same.
        tokens: number of tokens with a loss, float32 `[examples]`, if the loss of an example is a sum; else None.

    >>> memory = ImportanceMemory(3, momentum=0.0)
    >>> _ = memory.update(torch.tensor([0, 2]), torch.tensor([0.5, 1.5]))
    >>> memory.importances
    tensor([0.5000,    nan, 1.5000])
    """

    def __init__(
        self, length: int, momentum: float = 0.2, cost: Tensor | None = None, tokens: Tensor | None = None
    ) -> None:
        self.importances = torch.full((length,), torch.nan, dtype=torch.float32)  # float32 [examples], NaN = unknown
        self.momentum = momentum
        self.cost, self.tokens = cost, tokens
        self.spared: Tensor | None = None  # bool [examples]: not to be pruned
        self.doubted: Tensor | None = None  # bool [examples]: not to be sampled by importance
        self.known = 0

    def __len__(self) -> int:
        return len(self.importances)

    @property
    def trusted(self) -> Tensor:
        """Importances that rates follow, float32 `[examples]`: those remembered, unknown where doubted."""
        return self.importances if self.doubted is None else self.importances.masked_fill(self.doubted, torch.nan)

    @torch.no_grad()
    def update(self, index: Tensor, importance: Tensor, batch: Tensor | None = None) -> Update:
        """Update the moving averages: q ← α·q + (1 − α)·measured, or the measurement itself if q was unknown.

        `batch` numbers the batch of each visit, ascending from 0, by default a single one: many in one call give the
        same as one call per batch, at hardly more than the cost of one. Visits of an example in the same batch are
        averaged. An example becomes unknown again if a measurement is not finite.
        """
        batch = torch.zeros_like(index) if batch is None else batch
        batches = int(batch[-1]) + 1 if len(batch) else 1
        once, change, count = (index * batches + batch).unique(return_inverse=True, return_counts=True)
        measured = torch.zeros(len(once), dtype=torch.float32).index_add_(0, change, importance.float()).div_(count)
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

    def per_cost(self, part: Tensor | slice, importance: Tensor | None = None) -> Tensor:
        """Importances per root cost of some examples, see [`rates.per_cost`]; must not be modified.

        They are those remembered, unless importances of all examples are passed.
        """
        importance = self.importances if importance is None else importance
        return per_cost(importance[part], None if self.cost is None else self.cost[part])

    def unimportant(self, mass: float, importance: Tensor | None = None) -> Tensor:
        """[`unimportant`] examples but those that are spared, by default by the remembered importances.

        For losses that are sums over n tokens, the importance per token q/√n is used. Otherwise short texts would be
        pruned however hard they are.
        """
        importance = per_cost(self.importances if importance is None else importance, self.tokens)
        return unimportant(importance if self.spared is None else importance.masked_fill(self.spared, torch.nan), mass)

    def scale(self, which: Tensor, factor: float) -> None:
        """Multiply the importances where a mask is set by a factor ≥ 0, or NaN to make them unknown."""
        self.importances[which] *= factor
        self.known = int(self.importances.isfinite().sum())

    def chunks(self) -> Iterator[slice]:
        """Slices that cover all examples, to plan their visits with little memory."""
        return (slice(start, start + CHUNK) for start in range(0, len(self), CHUNK))

    def least_variance_ratio(self) -> float:
        """[`least_variance_ratio`] of the remembered importances.

        >>> memory = ImportanceMemory(2)
        >>> _ = memory.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
        >>> memory.least_variance_ratio()
        0.8
        """
        return least_variance_ratio(self.importances, self.cost)

    def state_dict(self) -> dict[str, Any]:
        """The importances, as tensors."""
        return {"importance": self.importances.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        self.importances.copy_(read_tensor(state, "importance", [len(self)], torch.float32))
        self.known = int(self.importances.isfinite().sum())


def _turns(index: Tensor) -> Iterator[Tensor]:
    """Groups of positions in a sorted index: first occurrences, second occurrences, … of all examples."""
    place = torch.arange(len(index))
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    turn = place - place.where(first, 0).cummax(0).values
    for number in range(int(turn.max()) + 1 if len(index) else 0):
        yield (turn == number).nonzero().flatten()


def unimportant(importance: Tensor, mass: float) -> Tensor:
    """Mask of the least important examples that together hold less than a share `mass` of the importance, `[examples]`.

    Ties are broken by position. Unknown examples are never included, nor those at least as important as the mean, so if
    all are equally important there are none.

    >>> unimportant(torch.tensor([3.0, 0.1, torch.nan, 1.0]), mass=0.1).tolist()
    [False, True, False, False]
    """
    mask = torch.zeros(len(importance), dtype=torch.bool)
    if mass > 0:
        importance, order = importance.sort(stable=True)  # NaN comes last
        small = importance < importance.nanmean(dtype=torch.float64)
        cumulated = importance.nan_to_num_(nan=0.0).cumsum(0, dtype=torch.float64)
        mask[order[small & (cumulated < mass * cumulated[-1])]] = True
    return mask


def least_variance_ratio(importance: Tensor, cost: Tensor | None = None) -> float:
    """The smallest variance ratio ρ with these importances: (mean q)² / mean q² = 1/(1 + CV²), NaN left out.

    It is reached if every visit measures the remembered importance. It is 1 if all are equal or none is known. With
    costs it is (mean q√c)² / (mean q² · mean c), and 1 if all q/√c are equal.
    """
    known = importance.isfinite()
    q = importance[known].double()
    c = torch.ones_like(q) if cost is None else cost[known].double()
    second_moment = q.square().sum() * c.sum()
    return ((q * c.sqrt()).sum().square() / second_moment).item() if second_moment else 1.0


def mean_importance(memory: ImportanceMemory, importance: Tensor | None = None, pruned: Tensor | None = None) -> float:
    """Mean of the known importances (per root cost) of the examples that are not pruned; NaN if none is known."""
    values = memory.per_cost(slice(None), importance)
    values = values if pruned is None else values.masked_fill(pruned, torch.nan)
    return values.nanmean(dtype=torch.float64).item()
