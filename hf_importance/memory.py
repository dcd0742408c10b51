"""What is remembered of every example: its importance. The one array that training changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance import functional

_COUNTS = ("known", "mean", "sum", "peak", "drawable")


class ImportanceMemory:
    """The importances of all examples, and the rates that follow from them.

    The floor of the rates needs the mean importance, and their normalisation a sum over all examples. Both are taken
    afresh once per pass ([`begin_pass`]), so that an update costs the batch and not the data set. Draws between passes
    need a sum that is right at any time: with `follow_updates` it follows each update by its difference.

    Args:
        length: number of examples.
        momentum: share of the old importance in the new one, in [0, 1); α of Salaün et al. 2023.
        uniform_fraction: floor of the rates, in [0, 1].
        max_rate: cap of the rates before normalisation, ≥ 1.

    >>> memory = ImportanceMemory(3, momentum=0.0)
    >>> memory.update(torch.tensor([0, 2]), torch.tensor([0.5, 1.5]))
    >>> memory.importance
    tensor([0.5000,    nan, 1.5000])
    """

    def __init__(
        self, length: int, momentum: float = 0.2, uniform_fraction: float = 0.3, max_rate: float = 64.0
    ) -> None:
        self.importance = torch.full((length,), torch.nan)  # float32 [examples], NaN = unknown
        self.pruned = torch.zeros(length, dtype=torch.bool)
        self.follow_updates = False
        self._known = 0
        self.momentum = momentum
        self.uniform_fraction = uniform_fraction
        self.max_rate = max_rate
        self.begin_pass()

    def __len__(self) -> int:
        return len(self.importance)

    @torch.no_grad()
    def update(self, index: Tensor, importance: Tensor) -> None:
        """Remember what was measured: q ← α·q + (1 − α)·measured, or the measurement itself where q was unknown.

        Args:
            index: int64 `[visits]`. Visits of one example in one batch count as one, with their mean.
            importance: `[visits]`, ≥ 0. Where it is not finite, the example becomes unknown again.
        """
        index, visit, count = index.unique(return_inverse=True, return_counts=True)
        measured = torch.zeros(len(index)).index_add_(0, visit, importance.float()).div_(count)
        old = self.importance[index]
        unknown = old.isnan()
        new = torch.where(unknown, measured, measured.lerp(old, self.momentum))
        new.masked_fill_(~new.isfinite(), torch.nan)
        self._known += int(unknown.sum()) - int(new.isnan().sum())
        if self.follow_updates and len(index):
            self._follow(self._unnormalised(old, index), self._unnormalised(new, index))
        self.importance[index] = new

    def _follow(self, old_rate: Tensor, new_rate: Tensor) -> None:
        self._sum += (new_rate.double() - old_rate.double()).sum().item()
        self._peak = max(self._peak, new_rate.max().item())

    def begin_pass(self, increment: float = 0.0, prune_mass: float = 0.0) -> None:
        """Take the mean and the sum afresh, O(examples).

        Args:
            increment: ε added to every known importance, so that no example is forgotten (Salaün et al. 2023, the last
                line of their algorithm).
            prune_mass: prune the examples that together hold less than this share of the importance of those not yet
                pruned: the smallest ones, of equal ones the first. Unknown ones stay.
        """
        self.importance += increment
        if prune_mass > 0:
            self._prune(prune_mass)
        self._mean = self._kept().nanmean(dtype=torch.float64).item()
        rate = self._unnormalised(self.importance, slice(None))
        self._sum = rate.sum(dtype=torch.float64).item()
        self._peak = rate.max().item()
        self._drawable = len(self) - int(self.pruned.sum())

    def rates(self, index: Tensor | slice = slice(None)) -> Tensor:
        """float64 `[visits]`: the rates of some examples, by default of all; their mean over the drawable ones is 1."""
        return self._unnormalised(self.importance[index], index).double() / (self._sum / self._drawable)

    @property
    def largest_rate(self) -> float:
        """No rate is above it. It is reached at the start of a pass, and may be above all rates later."""
        return self._peak / (self._sum / self._drawable)

    @property
    def seen(self) -> float:
        """Share of the examples whose importance is known."""
        return self._known / len(self)

    def state_dict(self) -> dict[str, Any]:
        """All that training changed, as tensors and plain values."""
        return {
            "importance": self.importance.clone(),
            "pruned": self.pruned.clone(),
            **{name: getattr(self, f"_{name}") for name in _COUNTS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        self.remember(state["importance"], state["pruned"])
        for name in _COUNTS:
            setattr(self, f"_{name}", state[name])

    def remember(self, importance: Tensor, pruned: Tensor) -> None:
        """Take over what was measured elsewhere: float32 and bool `[examples]`."""
        self.importance.copy_(importance)
        self.pruned.copy_(pruned)
        self._known = int(self.importance.isfinite().sum())
        self.begin_pass()

    def _unnormalised(self, importance: Tensor, index: Tensor | slice) -> Tensor:
        rate = functional.unnormalised_rates(importance, self._mean, self.uniform_fraction, self.max_rate)
        return rate.masked_fill_(self.pruned[index], 0.0)

    def _kept(self) -> Tensor:
        return torch.where(self.pruned, torch.nan, self.importance)

    def _prune(self, mass: float) -> None:
        importance, order = self._kept().sort(stable=True)  # unknown and pruned ones come last
        cumulated = importance.nan_to_num_(nan=0.0).cumsum(0, dtype=torch.float64)
        self.pruned[order[: int((cumulated < mass * cumulated[-1]).sum())]] = True
