"""Independent draws, as in the paper."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.guard import add_in_order
from hf_importance.sampling.memory import ImportanceMemory, Update, mean_importance
from hf_importance.sampling.rates import per_cost, unnormalised_rates
from hf_importance.sampling.state import read_number, read_tensor

_MAX_CANDIDATES = 2**16  # candidates per call: bounds the memory if one rate is far above the others


class IndependentVisits:
    """Draws independently with p = r / n from the current memory (Salaün et al. 2023).

    Rejection sampling: uniform candidates are accepted with probability r / r_max, so the cost of a draw does not
    depend on n. The mean importance is fixed at the start of a pass; the sum of the rates is updated incrementally.
    Unknown importances count as the mean. If visits differ in cost, "importance" means q/√c, see the module `rates`.
    The settings are those of [`segments.SegmentedVisits`].
    """

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
        self._mean = math.nan
        self._total, self._largest = float(len(memory)), 1.0  # sum and maximum of the rates before normalisation
        self._prune(None)

    def _prune(self, pruned: Tensor | None) -> None:
        self.pruned = pruned
        self._kept = None if pruned is None else (~pruned).nonzero().flatten()  # int64 positions; None for all
        self._drawable = len(self.memory if self._kept is None else self._kept)

    @property
    def begins_pass(self) -> bool:
        """Whether the next draw is the first of a pass."""
        return self.passes == 0 or self._visits >= len(self.memory)

    def plan(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits, from as many candidates as needed on average: examples int64 and rates float64."""
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

    def rates(self, index: Tensor | slice) -> Tensor:
        """Rates of some examples, float64 `[visits]`; their mean over all that are not pruned is 1."""
        rate = self._unnormalised(self.memory.per_cost(index)).double() / (self._total / self._drawable)
        return rate if self.pruned is None else rate.masked_fill_(self.pruned[index], 0.0)

    def observe(self, update: Update, measured: Tensor, rate: Tensor) -> None:
        """Update the sum and the maximum of the rates after an update of the memory."""
        before, after = (self._unnormalised(per_cost(q, update.cost)).double() for q in (update.before, update.after))
        change = after - before
        if self.pruned is not None:
            change.masked_fill_(self.pruned[update.index], 0.0)
        change = (change / update.change.bincount(minlength=len(change)))[update.change]  # in order of the visits
        self._total = add_in_order(torch.tensor(self._total, dtype=torch.float64), change).item()
        self._largest = max([self._largest, *after.tolist()])

    def _begin_pass(self) -> None:
        if self.passes:
            self.memory.importances += self._increment
            pruned = self.memory.unimportant(self._prune_mass)
            self._prune(pruned if pruned.any() else None)
        self._mean = mean_importance(self.memory, pruned=self.pruned)
        rate = self._unnormalised(self.memory.per_cost(slice(None)))
        if self.pruned is not None:
            rate.masked_fill_(self.pruned, 0.0)
        self._total, self._largest = rate.sum(dtype=torch.float64).item(), rate.max().item()
        self._rng.manual_seed(self._seed + self.passes * self._stride)
        self.passes += 1
        self._visits = 0

    def _unnormalised(self, importance: Tensor) -> Tensor:
        return unnormalised_rates(importance, self._mean, self.floor)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            "passes": self.passes,
            "visits": self._visits,
            "mean": self._mean,
            "total": self._total,
            "largest": self._largest,
            "pruned": None if self.pruned is None else self.pruned.clone(),
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        self.passes, self._visits = (read_number(state, name, int, 0) for name in ("passes", "visits"))
        self._mean, self._total, self._largest = (read_number(state, name) for name in ("mean", "total", "largest"))
        self._prune(read_tensor(state, "pruned", [len(self.memory)], torch.bool, optional=True))
        self._rng.set_state(read_tensor(state, "rng", self._rng.get_state().shape, torch.uint8))

    def restart(self, passes: int) -> None:
        """Begin a new pass with the current memory, if the state cannot be restored exactly."""
        self.passes, self._visits = passes, len(self.memory)
