"""Independent draws, as in the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.memory import ImportanceMemory, Update, mean_importance
from hf_importance.sampling.rates import per_cost, unnormalised_rates
from hf_importance.sampling.state import read_number, read_tensor

_MAX_CANDIDATES = 2**16
"""Candidates per call: bounds the memory if one rate is far above the others."""
_COUNTERS = ("passes", "visits", "mean", "total", "largest")


class IndependentVisits:
    """Draws independently with p = r / n from the current memory (Salaün et al. 2023).

    Rejection sampling: uniform candidates are accepted with probability r / r_max, so the cost of a draw does not
    depend on n. The mean importance is fixed at the start of a pass; the sum of the rates is updated incrementally.
    Unknown importances count as the mean. If visits differ in cost, "importance" means q/√c, see the module `rates`.

    Args:
        memory: memory of the examples. It is read at every draw.
        uniform_fraction: floor of the rates, in [0, 1].
        prune_mass: as for [`segments.SegmentedVisits`].
        increment: as for [`segments.SegmentedVisits`].
        seed: seed of the first pass.
        stride: added to the seed after each pass.
    """

    planned = 0

    def __init__(
        self,
        memory: ImportanceMemory,
        *,
        uniform_fraction: float = 0.0,
        prune_mass: float = 0.0,
        increment: float = 0.0,
        seed: int = 0,
        stride: int = 1,
    ) -> None:
        self.memory = memory
        self.floor = uniform_fraction
        self.pruned: Tensor | None = None  # bool [examples]
        self.passes = 0
        self._visits = 0  # in this pass
        self._prune_mass, self._increment = prune_mass, increment
        self._seed, self._stride = seed, stride
        self._rng = torch.Generator()
        self._kept: Tensor | None = None  # int64 positions of the examples that are not pruned; None for all
        self._drawable = len(memory)
        self._mean = math.nan
        self._total, self._largest = float(len(memory)), 1.0  # sum and maximum of the rates before normalisation

    @property
    def begins_pass(self) -> bool:
        """Whether the next draw is the first of a pass."""
        return self.passes == 0 or self._visits >= len(self.memory)

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits, from as many candidates as needed on average: examples and rates."""
        if self.begins_pass:
            self._begin_pass()
        largest = self._largest / (self._total / self._drawable)
        candidates = min(_MAX_CANDIDATES, math.ceil(size * largest))
        index = torch.randint(self._drawable, (candidates,), generator=self._rng)
        index = index if self._kept is None else self._kept[index]
        rate = self.rates(index)
        accepted = torch.rand(candidates, dtype=torch.float64, generator=self._rng) * largest < rate
        index, rate = index[accepted][:size], rate[accepted][:size]
        self._visits += len(index)
        return index, rate

    def rates(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Rates of some examples, by default all, float64 `[visits]`; their mean over unpruned examples is 1."""
        rate = self._unnormalised(self.memory.per_cost(index)).double() / (self._total / self._drawable)
        return rate if self.pruned is None else rate.masked_fill_(self.pruned[index], 0.0)

    def observe(self, update: Update, measured: Tensor, rate: Tensor) -> None:
        """Update the sum and the maximum of the rates after an update of the memory."""
        before, after = (self._unnormalised(per_cost(q, update.cost)).double() for q in (update.before, update.after))
        change = (
            after - before if self.pruned is None else (after - before).masked_fill_(self.pruned[update.index], 0.0)
        )
        change = (change / update.change.bincount(minlength=len(change)))[update.change]  # in order of the visits
        self._total = torch.cat([torch.tensor([self._total], dtype=torch.float64), change]).cumsum(0)[-1].item()
        self._largest = max([self._largest, *after.tolist()])

    def _begin_pass(self) -> None:
        if self.passes:
            if self._increment:
                self.memory.increase(self._increment)
            pruned = self.memory.unimportant(self._prune_mass)
            self.pruned = pruned if pruned.any() else None
        self._measure()
        self._rng.manual_seed(self._seed + self.passes * self._stride)
        self.passes += 1
        self._visits = 0

    def _measure(self) -> None:
        self._kept = None if self.pruned is None else (~self.pruned).nonzero().flatten()
        self._drawable = len(self.memory) if self._kept is None else len(self._kept)
        self._mean = mean_importance(self.memory, pruned=self.pruned)
        self._total, self._largest = 0.0, 0.0
        for part in self.memory.chunks():
            rate = self._unnormalised(self.memory.per_cost(part))
            rate = rate if self.pruned is None else rate.masked_fill_(self.pruned[part], 0.0)
            self._total += rate.sum(dtype=torch.float64).item()
            self._largest = max(self._largest, rate.max().item())

    def _unnormalised(self, importance: Tensor) -> Tensor:
        return unnormalised_rates(importance, self._mean, self.floor)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            **{name: getattr(self, name, getattr(self, f"_{name}", None)) for name in _COUNTERS},
            "pruned": None if self.pruned is None else self.pruned.clone(),
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        self.passes = read_number(state, "passes", int, 0)
        self.pruned = read_tensor(state, "pruned", [len(self.memory)], torch.bool, optional=True)
        for name in ("visits", "mean", "total", "largest"):
            setattr(self, f"_{name}", read_number(state, name, least=0))
        self._kept = None if self.pruned is None else (~self.pruned).nonzero().flatten()
        self._drawable = len(self.memory) if self._kept is None else len(self._kept)
        self._rng.set_state(read_tensor(state, "rng", self._rng.get_state().shape, torch.uint8))

    def restart(self, passes: int) -> None:
        """Begin a new pass with the current memory, if the state cannot be restored exactly."""
        self.passes, self._visits = passes, len(self.memory)
