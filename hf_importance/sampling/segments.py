"""Visits as even as reshuffling, at rates that are never older than a segment."""

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
"""Of a pass, which is as many visits as there are examples."""
_LARGEST_RATE = 64.0
"""Before normalisation: no example is visited much more often than this many times the average."""
_BELOW_ONE = 1 - 2**-24
_COUNTERS = ("passes", "segment", "floor", "fresh", "fresh_sum", "fresh_count", "mean")


class SegmentedVisits:
    """Plans visits a segment at a time, an eighth of a pass, with the rates of that moment.

    Every example has a credit in [0, 1). A segment of n visits adds n·r_i/N to it; whole parts become visits, in the
    order in which the credits pass 1. So between any two segments of a pass an example is visited as often as its
    summed rates say, within one visit, while its rates follow what is measured. Each pass starts with the credits
    1 − (position + ½)/N in a new random permutation, the one that `Trainer` takes from the same seed: with equal rates
    the pass is that permutation. (Credits that go on from pass to pass would be more even still, but not random enough:
    examples whose rates fall or rise together at their first visit come back together, so that what training sees last
    depends on the step at which it ends.)

    Examples that nobody has seen have the mean importance of those that were seen for the first time lately, so that
    the first pass learns from itself. Visits show whether importances hold, see [`Guard`].

    Where visits cost differently, "importance" is q/√c in all of that, see [`rates`].

    Args:
        memory: of the examples. It is read where a segment is planned.
        batch_size: no segment is smaller.
        uniform_fraction: lowest floor of the rates, in [0, 1].
        prune_mass: at the start of each pass leave out the examples that together hold less than this share of the
            importance, in [0, 1); the others have rates of mean 1.
        increment: added to every known importance at the end of each pass.
        seed: of the permutation of the first pass.
        stride: what is added to the seed from pass to pass.
        guard: whether the floor may rise.
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
        self._segment = 0  # that is planned next
        self._prune_mass, self._increment = prune_mass, increment
        self._seed, self._stride = seed, stride
        self._guard = Guard(uniform_fraction) if guard else None
        self._fresh, self._fresh_sum, self._fresh_count = math.nan, 0.0, 0.0
        self._mean = math.nan  # importance (per cost), when the segment was planned
        self._kind = torch.int32 if len(memory) < 2**31 else torch.int64
        self._order: Tensor | None = None  # of this pass, as long as its rates have not differed
        self._credit: Tensor | None = None  # float32 [examples], from then on
        self._index = torch.empty(0, dtype=self._kind)  # visits left in this segment, and their rates
        self._rate = torch.empty(0)

    @property
    def planned(self) -> int:
        """Visits that are left of the segment. Without any, the next ones read the memory."""
        return len(self._index)

    @property
    def begins_pass(self) -> bool:
        """Whether what is planned next is the first segment of a pass."""
        return self._segment == 0

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """Up to `size` visits: int64 and float32 `[visits]`, their examples and rates."""
        if not len(self._index):
            self._plan()
        index, self._index = self._index[:size], self._index[size:]
        rate, self._rate = self._rate[:size], self._rate[size:]
        return index.long(), rate

    def observe(self, update: Update, measured: Tensor, rate: Tensor) -> None:
        """What visits have shown: the change of the memory; `[visits]` each, what was measured and the rates drawn."""
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
            self.floor = self._guard.floor()
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
        """First visit of a segment in its pass, and that after its last."""
        length = len(self.memory)
        return length * segment // self._segments, length * (segment + 1) // self._segments

    def _begin_pass(self) -> None:
        if self.passes:
            if self._increment:
                self.memory.increase(self._increment)
            pruned = self.memory.unimportant(self._prune_mass)
            self.pruned = pruned if pruned.any() else None
        # the seed is that of accelerate's sampler in this epoch: the same permutations
        rng = torch.Generator().manual_seed(self._seed + self.passes * self._stride)
        self._order = torch.randperm(len(self.memory), generator=rng, dtype=self._kind)
        self._credit = None
        self.passes += 1

    def _credits_after(self, visits: int) -> Tensor:
        """The credits that this pass has come to with equal rates."""
        place = torch.arange(len(self.memory), dtype=torch.float64)
        start = 1 - (place + 0.5) / len(place) + visits / len(place)
        start[:visits] -= 1
        return torch.empty(len(place)).scatter_(0, self._order.long(), start.float().clamp_(max=_BELOW_ONE))

    def _unnormalised(self, part: slice) -> Tensor:
        rate = unnormalised_rates(self.memory.per_cost(part), self._mean, self.floor, _LARGEST_RATE, self._fresh)
        return rate if self.pruned is None else rate.masked_fill_(self.pruned[part], 0.0)

    def _measure_rates(self) -> tuple[float, float, float]:
        """Their sum, the smallest and the largest, before normalisation."""
        total, least, largest = 0.0, math.inf, 0.0
        for part in self.memory.chunks():
            rate = self._unnormalised(part)
            total += rate.sum(dtype=torch.float64).item()
            least, largest = min(least, rate.min().item()), max(largest, rate.max().item())
        return total, least, largest

    def _plan_visits(self, visits: int, total: float) -> tuple[Tensor, Tensor]:
        """Add to the credits what so many visits are worth; the visits that come of it, in their order."""
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
            number = torch.ones_like(visited)  # of the visits of an example, which one it is
            number[1:] = torch.where(visited[1:] == visited[:-1], 0, 1)
            place = torch.arange(len(visited))
            number = place - place.where(number.bool(), 0).cummax(0).values + 1 if len(visited) else number
            indices.append((visited + part.start).to(self._kind))
            rates.append(rate[visited].float())
            times.append(((number - credit[visited]) / added[visited]).float())
        order = torch.cat(times).sort(stable=True).indices
        return torch.cat(indices)[order], torch.cat(rates)[order]

    # ---- going on after an interruption ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the visits are, as tensors and plain values."""
        return {
            **{name: getattr(self, name, getattr(self, f"_{name}", None)) for name in _COUNTERS},
            "guard": None if self._guard is None else self._guard.state_dict(),
            **{name: _copy(getattr(self, f"_{name}")) for name in ("order", "credit", "index", "rate")},
            "pruned": _copy(self.pruned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
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
        """Begin a new pass, with what the memory has, where it is not possible to go on exactly."""
        self.passes = passes


def _copy(tensor: Tensor | None) -> Tensor | None:
    """Of what is left, not of all that it is a view of."""
    return None if tensor is None else tensor.clone()
