"""Visits as evenly spaced as with reshuffling, with rates that are updated every segment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.guard import Guard
from hf_importance.sampling.memory import ImportanceMemory, Update, mean_importance
from hf_importance.sampling.rates import per_cost, unnormalised_rates
from hf_importance.state import read_number, read_tensor

SEGMENTS = 8
"""Segments per pass; a pass has as many visits as there are examples."""
_LARGEST_RATE = 64.0
"""Upper bound of the rates, before normalisation."""
_BELOW_ONE = 1 - 2**-24
_COUNTERS = ("passes", "segment", "floor", "fresh", "fresh_sum", "fresh_count", "mean")


class SegmentedVisits:
    """Plans visits one segment (an eighth of a pass) at a time, with the current rates.

    Every example has a credit in [0, 1). A segment of n visits adds n·r_i/N to it; the whole part becomes visits, in
    the order in which the credits cross 1. Between any two segments of a pass, the number of visits of an example
    therefore equals its summed rates within one visit, while rates follow the measurements. Each pass starts with the
    credits 1 − (position + ½)/N in a new random permutation, the one that `Trainer` draws from the same seed: with
    equal rates the pass is that permutation. (Carrying credits over between passes would be even more regular, but not
    random enough: examples whose rates change together at their first visit would come back together, and the examples
    visited last would depend on the step at which training ends.)

    Unvisited examples are assigned the mean importance of recent first visits, so the first pass already uses its own
    measurements. Visits also show how reliable importances are, see [`Guard`].

    If visits differ in cost, "importance" means q/√c throughout, see the module `rates`.

    Args:
        memory: memory of the examples. It is read when a segment is planned.
        batch_size: minimum size of a segment.
        uniform_fraction: lowest floor of the rates, in [0, 1].
        prune_mass: at the start of each pass, prune the examples that together hold less than this share of the
            importance, in [0, 1); the others have rates with mean 1.
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
        self._fresh, self._fresh_sum, self._fresh_count = math.nan, 0.0, 0.0
        self._mean = math.nan  # mean importance (per root cost) when the segment was planned
        self._kind = torch.int32 if len(memory) < 2**31 else torch.int64
        self._order: Tensor | None = None  # permutation of this pass, until rates differ
        self._credit: Tensor | None = None  # float32 [examples], once rates differ
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
        cost = None if update.cost is None else update.cost[update.change]
        before = per_cost(update.before[update.change], cost)
        first = (before.isnan() & measured.isfinite()).double()
        new = per_cost(measured.double(), cost).nan_to_num(0.0, 0.0, 0.0)
        sums = torch.stack([first * new, first], 1)
        start = torch.tensor([[self._fresh_sum, self._fresh_count]], dtype=torch.float64)
        self._fresh_sum, self._fresh_count = torch.cat([start, sums]).cumsum(0)[-1].tolist()
        if self._guard is not None:
            self._guard.observe(before, self._mean, measured, rate, _LARGEST_RATE, cost)

    # ---- planning: O(examples), once per segment ---------------------------------------------------------------------

    def _plan(self) -> None:
        if self.begins_pass:
            self._begin_pass()
        if self._fresh_count:
            self._fresh = self._fresh_sum / self._fresh_count
            self._fresh_sum = self._fresh_count = 0.0
        if self._guard is not None:
            self.floor = self._guard.next_floor()
        self._mean = mean_importance(self.memory, self._fresh, self.pruned)
        total, least, largest = self._measure_rates()
        start, end = self._bounds(self._segment)
        if self._credit is None and least == largest and self.pruned is None:
            self._index = self._order[start:end]
            self._rate = torch.ones(end - start)
        else:
            if self._credit is None:
                self._credit = self._credits_after(start)
                self._order = None
            self._index, self._rate = self._plan_visits(end - start, total)
        self._segment = (self._segment + 1) % self._segments

    def _bounds(self, segment: int) -> tuple[int, int]:
        """First visit of a segment within its pass, and the one after its last."""
        length = len(self.memory)
        return length * segment // self._segments, length * (segment + 1) // self._segments

    def _begin_pass(self) -> None:
        if self.passes:
            if self._increment:
                self.memory.increase(self._increment)
            pruned = self.memory.unimportant(self._prune_mass)
            self.pruned = pruned if pruned.any() else None
        # same seed, and so same permutation, as the sampler of accelerate in this epoch
        rng = torch.Generator().manual_seed(self._seed + self.passes * self._stride)
        self._order = torch.randperm(len(self.memory), generator=rng, dtype=self._kind)
        self._credit = None
        self.passes += 1

    def _credits_after(self, visits: int) -> Tensor:
        """Credits after this many visits of the pass with equal rates."""
        place = torch.arange(len(self.memory), dtype=torch.float64)
        start = 1 - (place + 0.5) / len(place) + visits / len(place)
        start[:visits] -= 1
        return torch.empty(len(place)).scatter_(0, self._order.long(), start.float().clamp_(max=_BELOW_ONE))

    def _unnormalised(self, part: slice) -> Tensor:
        rate = unnormalised_rates(self.memory.per_cost(part), self._mean, self.floor, _LARGEST_RATE, self._fresh)
        return rate if self.pruned is None else rate.masked_fill_(self.pruned[part], 0.0)

    def _measure_rates(self) -> tuple[float, float, float]:
        """Sum, minimum and maximum of the rates before normalisation."""
        total, least, largest = 0.0, math.inf, 0.0
        for part in self.memory.chunks():
            rate = self._unnormalised(part)
            total += rate.sum(dtype=torch.float64).item()
            least, largest = min(least, rate.min().item()), max(largest, rate.max().item())
        return total, least, largest

    def _plan_visits(self, visits: int, total: float) -> tuple[Tensor, Tensor]:
        """Add the rates of this many visits to the credits; return the resulting visits in order."""
        drawable = len(self.memory) - (0 if self.pruned is None else int(self.pruned.sum()))
        indices, rates, times = [], [], []
        for part in self.memory.chunks():
            rate = self._unnormalised(part).double() * (drawable / total)
            added = rate * (visits / drawable)
            credit = self._credit[part].double()
            grown = credit + added
            whole = grown.floor()
            self._credit[part] = (grown - whole).float().clamp_(max=_BELOW_ONE)
            visited = whole.nonzero().flatten().repeat_interleave(whole[whole > 0].long())
            number = torch.ones_like(visited)  # counts the visits of the same example
            number[1:] = torch.where(visited[1:] == visited[:-1], 0, 1)
            place = torch.arange(len(visited))
            number = place - place.where(number.bool(), 0).cummax(0).values + 1 if len(visited) else number
            indices.append((visited + part.start).to(self._kind))
            rates.append(rate[visited].float())
            times.append(((number - credit[visited]) / added[visited]).float())
        order = torch.cat(times).sort(stable=True).indices
        return torch.cat(indices)[order], torch.cat(rates)[order]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            **{name: getattr(self, name, getattr(self, f"_{name}", None)) for name in _COUNTERS},
            "guard": None if self._guard is None else self._guard.state_dict(),
            **{name: _copy(getattr(self, f"_{name}")) for name in ("order", "credit", "index", "rate")},
            "pruned": _copy(self.pruned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        length = len(self.memory)
        self.passes, self.floor = read_number(state, "passes", int, 0), read_number(state, "floor", least=0)
        self.pruned = read_tensor(state, "pruned", [length], torch.bool, optional=True)
        self._segment = read_number(state, "segment", int, 0) % self._segments
        for name in ("fresh", "fresh_sum", "fresh_count", "mean"):
            setattr(self, f"_{name}", read_number(state, name))
        self._order = read_tensor(state, "order", [length], self._kind, below=length, optional=True)
        self._credit = _copy(read_tensor(state, "credit", [length], torch.float32, optional=True))
        self._index = read_tensor(state, "index", [None], self._kind, below=length)
        self._rate = read_tensor(state, "rate", [len(self._index)], torch.float32)
        if self._guard is not None:
            self._guard.load_state_dict(state["guard"])

    def restart(self, passes: int) -> None:
        """Begin a new pass with the current memory, if the state cannot be restored exactly."""
        self.passes = passes


def _copy(tensor: Tensor | None) -> Tensor | None:
    """Copy a tensor without the rest of the storage that it is a view of."""
    return None if tensor is None else tensor.clone()
