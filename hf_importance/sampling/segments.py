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

SEGMENTS = 8
"""Segments per pass; a pass is the time of as many visits as there are examples."""
_LARGEST_RATE = 64.0
"""Upper bound of the rates, before normalisation."""
_PLACES = 2**31
"""Added to the seed of a permutation for that of the places, so that the two are independent; generators of the CPU
read the lowest 32 bits of a seed."""
_COUNTERS = ("passes", "segment", "floor", "mean")


class SegmentedVisits:
    """Plans visits one segment (an eighth of a pass) at a time.

    As long as all importances are equal or unknown, a pass is a permutation, the one that `Trainer` draws from the same
    seed. So is the first. At the first pass that begins with different importances, every example begins its first
    [`Strata`], in which the time of each goes on at its own rate from then on.

    All rates are determined when a segment is planned, so that they sum to its visits: in the strata that examples are
    in, from the importances with which these began; in those that begin within the segment, from what the memory has.

    Visits also show how reliable importances are, see [`Guard`]. If visits differ in cost, "importance" means q/√c
    throughout, see the module `rates`.

    Args:
        memory: memory of the examples. It is read when a segment is planned.
        batch_size: minimum size of a segment.
        uniform_fraction: lowest floor of the rates, in [0, 1].
        prune_mass: at the start of each pass, prune the examples that together hold less than this share of the
            importance, in [0, 1), by the importances with which their strata began; their time stands still, and the
            others have rates with mean 1.
        increment: added to every known importance at the end of each pass.
        seed: seed of the permutation of the first pass.
        stride: added to the seed after each pass.
        guard: whether the [`Guard`] may raise the floor.
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
    ) -> None:
        self.memory = memory
        self.floor = uniform_fraction
        self.pruned: Tensor | None = None  # bool [examples]
        self.passes = 0
        self._segments = max(1, min(SEGMENTS, len(memory) // batch_size))
        self._segment = 0  # index of the next segment
        self._prune_mass, self._increment = prune_mass, increment
        self._seed, self._stride = seed, stride
        self._guard = Guard(uniform_fraction) if guard else None
        self._mean = math.nan  # mean importance (per root cost) when the segment was planned
        self._kind = torch.int32 if len(memory) < 2**31 else torch.int64
        self._order: Tensor | None = None  # permutation of this pass, if all rates are 1
        self._strata: Strata | None = None  # otherwise
        self._index = torch.empty(0, dtype=self._kind)  # remaining visits of this segment, and their rates
        self._rate = torch.empty(0)

    @property
    def planned(self) -> int:
        """Number of remaining visits of the segment. If it is 0, the next call of [`next`] reads the memory."""
        return len(self._index)

    @property
    def begins_pass(self) -> bool:
        """Whether the next planned segment is the first of a pass."""
        return self._segment == 0

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits: examples int64 `[visits]` and rates float32 `[visits]`."""
        if not len(self._index):
            self._plan()
        index, self._index = self._index[:size], self._index[size:]
        rate, self._rate = self._rate[:size], self._rate[size:]
        return index.long(), rate

    def observe(self, update: Update, measured: Tensor, rate: Tensor) -> None:
        """Observe visits: the update of the memory, the measured importances and the drawn rates, `[visits]` each."""
        if self._guard is not None:
            cost = None if update.cost is None else update.cost[update.change]
            before = per_cost(update.before[update.change], cost)
            self._guard.observe(before, self._mean, measured, rate, _LARGEST_RATE, cost)

    # ---- planning: O(examples), once per segment ---------------------------------------------------------------------

    def _plan(self) -> None:
        if self._guard is not None:
            self.floor = self._guard.next_floor()
        if self.begins_pass:
            self._begin_pass()
        length = len(self.memory)
        start, end = (length * segment // self._segments for segment in (self._segment, self._segment + 1))
        if self._strata is None:
            self._index, self._rate = self._order[start:end], torch.ones(end - start)
        else:
            self._index, self._rate = self._plan_visits(end - start)
        self._segment = (self._segment + 1) % self._segments

    def _begin_pass(self) -> None:
        if self.passes and self._increment:
            self.memory.increase(self._increment)
            if self._strata is not None:  # pruned examples also return
                self._strata.importance += self._increment
        # same seed, and so same permutation, as the sampler of accelerate in this epoch
        seed = self._seed + self.passes * self._stride
        if self._strata is None:
            scale = self._scale(self.memory.importances)
            self._mean = scale.mean
            if scale.equal:
                rng = torch.Generator().manual_seed(seed)
                self._order = torch.randperm(len(self.memory), generator=rng, dtype=self._kind)
            else:
                self._order = None
                self._strata = Strata(self.memory.importances, seed + _PLACES)
        if self._strata is not None and self.passes:
            pruned = self.memory.unimportant(self._prune_mass, self._strata.importance)
            self.pruned = pruned if pruned.any() else None
        self.passes += 1

    def _scale(self, importance: Tensor) -> _Scale:
        """How rates follow from these importances: they sum to the number of examples that are not pruned."""
        scale = _Scale(mean_importance(self.memory, importance, self.pruned))
        total, least, largest = 0.0, math.inf, 0.0
        for part in self.memory.chunks():
            rate = self._rates(part, importance, scale)
            total += rate.sum(dtype=torch.float64).item()
            least, largest = min(least, rate.min().item()), max(largest, rate.max().item())
        return _Scale(scale.mean, self._drawable / total, least == largest)

    def _rates(self, part: slice, importance: Tensor, scale: _Scale) -> Tensor:
        """Rates of a part of the examples, float32 `[part]`."""
        importance = self.memory.per_cost(part, importance)
        rate = unnormalised_rates(importance, scale.mean, self.floor, _LARGEST_RATE).mul_(scale.factor)
        return rate if self.pruned is None else rate.masked_fill_(self.pruned[part], 0.0)

    @property
    def _drawable(self) -> int:
        return len(self.memory) - (0 if self.pruned is None else int(self.pruned.sum()))

    def _plan_visits(self, visits: int) -> tuple[Tensor, Tensor]:
        """Let the time of about this many visits pass; return the visits in order."""
        scales = [self._scale(importance) for importance in (self._strata.importance, self.memory.importances)]
        self._mean = scales[0].mean
        time = visits / self._drawable
        expected = sum(
            self._strata.visits(part, time, *self._both_rates(part, scales)) for part in self.memory.chunks()
        )
        scales = [scale._replace(factor=scale.factor * visits / expected) for scale in scales]
        found = []
        for part in self.memory.chunks():
            rate, next_rate = self._both_rates(part, scales)
            found.append(self._strata.advance(part, time, rate, self.memory.importances[part], next_rate))
        index, rate, when = (torch.cat(column) for column in zip(*found, strict=True))
        order = when.sort(stable=True).indices
        return index[order].to(self._kind), rate[order]

    def _both_rates(self, part: slice, scales: list[_Scale]) -> tuple[Tensor, Tensor]:
        """Rates in the strata that some examples are in, and in those that begin within the segment."""
        current, following = scales
        return (
            self._rates(part, self._strata.importance, current),
            self._rates(part, self.memory.importances, following),
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            **{name: getattr(self, name, getattr(self, f"_{name}", None)) for name in _COUNTERS},
            "guard": None if self._guard is None else self._guard.state_dict(),
            **{name: _copy(getattr(self, f"_{name}")) for name in ("order", "index", "rate")},
            "strata": None if self._strata is None else self._strata.state_dict(),
            "pruned": _copy(self.pruned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        length = len(self.memory)
        self.passes, self.floor = read_number(state, "passes", int, 0), read_number(state, "floor", least=0)
        self.pruned = read_tensor(state, "pruned", [length], torch.bool, optional=True)
        self._segment = read_number(state, "segment", int, 0) % self._segments
        self._mean = read_number(state, "mean")
        self._order = read_tensor(state, "order", [length], self._kind, below=length, optional=True)
        strata = state["strata"]
        self._strata = None if strata is None else Strata.from_state_dict(strata, length)
        self._index = read_tensor(state, "index", [None], self._kind, below=length)
        self._rate = read_tensor(state, "rate", [len(self._index)], torch.float32)
        if self._guard is not None:
            self._guard.load_state_dict(state["guard"])

    def restart(self, passes: int) -> None:
        """Begin a new pass with the current memory, if the state cannot be restored exactly."""
        self.passes = passes


class _Scale(NamedTuple):
    """How rates follow from importances.

    Args:
        mean: mean importance (per root cost), NaN if none is known.
        factor: normalises the rates.
        equal: whether all rates are equal.
    """

    mean: float
    factor: float = 1.0
    equal: bool = True


def _copy(tensor: Tensor | None) -> Tensor | None:
    """Copy a tensor without the rest of the storage that it is a view of."""
    return None if tensor is None else tensor.clone()
