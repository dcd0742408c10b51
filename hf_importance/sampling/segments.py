"""Visits in strata, as evenly spaced as with reshuffling, with rates that are updated every segment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_importance.sampling.guard import Guard
from hf_importance.sampling.memory import ImportanceMemory, Update, mean_importance
from hf_importance.sampling.rates import per_cost, unnormalised_rates
from hf_importance.sampling.state import read_number, read_tensor
from hf_importance.sampling.strata import Strata

SEGMENTS = 8  # segments per pass; a pass is the time of as many visits as there are examples
_LARGEST_RATE = 64.0  # upper bound of the rates, before normalisation
_PLACES = 2**31
"""Added to the seed of a permutation for that of the places, so that the two are independent; generators of the CPU
read the lowest 32 bits of a seed."""


class SegmentedVisits:
    """Plans visits one segment (an eighth of a pass) at a time.

    As long as all importances are equal or unknown, a pass is a permutation, the one that `Trainer` draws from the same
    seed. So is the first. At the first pass that begins with different importances, every example begins its first
    [`Strata`], in which the time of each goes on at its own rate from then on.

    All rates are determined when a segment is planned, so that they sum to its visits: in the strata that examples are
    in, from the importances with which these began; in those that begin within the segment, from what the memory has.
    Doubted examples count as unknown there, so they have rate 1.
    If visits differ in cost, "importance" means q/√c throughout, see the module `rates`.

    An unknown importance counts as the mean; with a `prior`, the importances of another training, as that of the prior,
    times what the known ones are relative to theirs. This holds throughout the first stratum of an example: what its
    visit measures takes effect with the next, as always. In the first segment rates are 1, so that the [`Guard`] can
    judge the prior.

    At the start of each pass, the examples are pruned that together hold less than a share `prune_mass` of the
    importance with which their strata began; their time stands still, and the others have rates with mean 1.

    Args:
        memory: memory of the examples. It is read when a segment is planned.
        batch_size: minimum size of a segment.
        uniform_fraction: floor of the rates, in [0, 1], which the [`Guard`] may raise if `guard` is True.
        prune_mass: in [0, 1).
        increment: added to every known importance at the end of each pass.
        seed: seed of the permutation of the first pass; `stride` is added to it after each pass.
        first: example that the permutation of the first pass begins with, if any.
    """

    def __init__(
        self,
        memory: ImportanceMemory,
        batch_size: int,
        *,
        uniform_fraction: float = 0.3,
        prune_mass: float = 0.0,
        increment: float = 0.0,
        seed: int = 0,
        stride: int = 1,
        guard: bool = True,
        first: int | None = None,
    ) -> None:
        self.memory = memory
        self.floor = uniform_fraction
        self.pruned: Tensor | None = None  # bool [examples]
        self.passes = 0
        self._segments = max(1, min(SEGMENTS, len(memory) // batch_size))
        self._segment = 0  # index of the next segment
        self._prune_mass, self._increment = prune_mass, increment
        self._seed, self._stride, self._first = seed, stride, first
        self._guard = Guard(uniform_fraction) if guard else None
        self._mean = math.nan  # mean importance (per root cost) when the segment was planned
        self.prior: Tensor | None = None  # float32 [examples], ≥ 0, NaN where unknown
        self._scale = 1.0  # of the prior, when the segment was planned
        self._order: Tensor | None = None  # permutation of this pass, if all rates are 1
        self._strata: Strata | None = None  # otherwise

    @property
    def begins_pass(self) -> bool:
        """Whether the next segment is the first of a pass."""
        return self._segment == 0

    def observe(self, update: Update, measured: Tensor, rate: Tensor) -> None:
        """Show the guard how reliable importances are: the measured ones and the drawn rates, `[visits]` each."""
        if self._guard is not None:
            cost = None if update.cost is None else update.cost[update.change]
            before = per_cost(self._assumed(update.before, update.index)[update.change], cost)
            self._guard.observe(before, self._mean, measured, rate, _LARGEST_RATE, cost)

    # ---- planning: O(examples), once per segment ---------------------------------------------------------------------

    def plan(self, size: int = 0) -> tuple[Tensor, Tensor]:
        """The visits of the next segment in order, whatever `size` is wanted: examples int32 and rates float32."""
        if self._guard is not None:
            self.floor = self._guard.next_floor()
        if self.prior is not None and self.memory.doubted is not None:
            self.prior[self.memory.doubted] = torch.nan  # they are unknown in the sense of rate 1
        self._scale = self._scale_of_prior()
        if self.begins_pass:
            self._begin_pass()
        if self.prior is not None and self._guard is not None and self.passes == 1 and not self._segment:
            self.floor = 1.0  # the guard has not seen yet whether the prior holds
        length = len(self.memory)
        start, end = (length * segment // self._segments for segment in (self._segment, self._segment + 1))
        self._segment = (self._segment + 1) % self._segments
        if self._strata is None:
            return self._order[start:end], torch.ones(end - start, dtype=torch.float32)
        return self._plan_visits(end - start)

    def _begin_pass(self) -> None:
        if self.passes and self._increment:
            self.memory.importances += self._increment  # so no example is forgotten (Salaün et al. 2023)
            if self._strata is not None:  # pruned examples also return
                self._strata.importance += self._increment
        # same seed, and so same permutation, as the sampler of accelerate in this pass
        seed = self._seed + self.passes * self._stride
        if self._strata is None:
            rates = self._rates(self.memory.trusted)
            self._mean = rates.mean
            if rates.relative.min() == rates.relative.max():
                rng = torch.Generator().manual_seed(seed)
                self._order = torch.randperm(len(self.memory), generator=rng, dtype=torch.int32)
                if not self.passes and self._first is not None:
                    exchanged = [0, (self._order == self._first).nonzero().item()]
                    self._order[exchanged] = self._order[exchanged[::-1]]
            else:
                self._order, self._strata = None, Strata(self.memory.trusted, seed + _PLACES)
        if self._strata is not None and self.passes:
            pruned = self.memory.unimportant(self._prune_mass, self._strata.importance)
            self.pruned = pruned if pruned.any() else None
        self.passes += 1

    def _plan_visits(self, visits: int) -> tuple[Tensor, Tensor]:
        """Let the time of about this many visits pass; return the visits in order."""
        trusted = self.memory.trusted
        current, following = self._rates(self._strata.importance), self._rates(trusted)
        self._mean, time = current.mean, visits / self._drawable
        expected = self._strata.visits(slice(None), time, *(r.relative * r.factor for r in (current, following)))
        rate, next_rate = (r.relative * (r.factor * visits / expected) for r in (current, following))
        parts = [
            self._strata.advance(part, time, rate[part], trusted[part], next_rate[part])
            for part in self.memory.chunks()
        ]
        index, rate, when = (torch.cat(column) for column in zip(*parts, strict=True))
        order = when.sort(stable=True).indices
        return index[order].int(), rate[order]

    def _rates(self, importance: Tensor) -> _Rates:
        """The rates that follow from these importances, `[examples]`."""
        importance = self._assumed(importance)
        mean = mean_importance(self.memory, importance, self.pruned)
        rate = unnormalised_rates(self.memory.per_cost(slice(None), importance), mean, self.floor, _LARGEST_RATE)
        if self.pruned is not None:
            rate.masked_fill_(self.pruned, 0.0)
        return _Rates(mean, rate, self._drawable / rate.sum(dtype=torch.float64).item())

    def _assumed(self, importance: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """Importances of some examples, with those of the prior where they are unknown."""
        if self.prior is None:
            return importance
        return importance.where(importance.isfinite(), self._scale * self.prior[index])

    def _scale_of_prior(self) -> float:
        """The importances of the memory relative to those of the prior, over the examples that are in both."""
        if self.prior is None:
            return 1.0
        both = (self.memory.importances + self.prior).isfinite()
        now, before = (x[both].sum(dtype=torch.float64).item() for x in (self.memory.importances, self.prior))
        return now / before if before else 1.0

    @property
    def _drawable(self) -> int:
        return len(self.memory) - (0 if self.pruned is None else int(self.pruned.sum()))

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            "passes": self.passes,
            "segment": self._segment,
            "floor": self.floor,
            "mean": self._mean,
            "prior": None if self.prior is None else self.prior.clone(),
            "scale": self._scale,
            "guard": None if self._guard is None else self._guard.state_dict(),
            "order": None if self._order is None else self._order.clone(),
            "strata": None if self._strata is None else self._strata.state_dict(),
            "pruned": None if self.pruned is None else self.pruned.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        length = len(self.memory)
        self.passes, self._segment = (read_number(state, name, int, 0) for name in ("passes", "segment"))
        self.floor, self._mean = read_number(state, "floor", least=0), read_number(state, "mean")
        self.prior = read_tensor(state, "prior", [length], torch.float32, optional=True)
        self._scale = read_number(state, "scale", least=0)
        self._order = read_tensor(state, "order", [length], torch.int32, optional=True)
        self._strata = None if state["strata"] is None else Strata.from_state_dict(state["strata"], length)
        self.pruned = read_tensor(state, "pruned", [length], torch.bool, optional=True)
        if self._guard is not None:
            self._guard.load_state_dict(state["guard"])

    def restart(self, passes: int) -> None:
        """Begin a new pass with the current memory, if the state cannot be restored exactly."""
        self.passes = passes


class _Rates(NamedTuple):
    """Rates that sum to the number of examples that are not pruned."""

    mean: float  # mean importance (per root cost), NaN if none is known
    relative: Tensor  # before they are normalised, float32 [examples]; 0 for those that are pruned
    factor: float  # normalises them
