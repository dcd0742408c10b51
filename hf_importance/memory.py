"""What is remembered of every example: its importance. The one array that training changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance import functional
from hf_importance.record import VisitRecord

_FLOORS = 8
"""Steps from `uniform_fraction` to 1 that the guard chooses from."""
_GOOD_ENOUGH = 1.01
"""The guard takes the lowest floor whose second moment is within 1 % of the least."""
_FORGET = 0.5
"""Share of the evidence that the guard keeps from pass to pass."""
CHUNK = 2**20
"""Examples at a time, where all of them are gone through."""
_MOST_WAITING = 64
"""Batches that wait to be written down, all at once, which costs hardly more than one."""
_COUNTS = ("known", "mean", "sum", "peak", "drawable", "revisit_rate")


class ImportanceMemory:
    """The importances of all examples, and the rates that follow from them.

    The floor of the rates needs the mean importance, and their normalisation a sum over all examples. Both are taken
    afresh once per pass ([`begin_pass`]), so that an update costs the batch and not the data set. Draws between passes
    need a sum that is right at any time: with `follow_updates` it follows each update by its difference.

    Preference is for what is still to be learnt. As the mean importance falls to a small share of what it was when the
    examples were new, the floor rises to 1 and nothing is pruned any more ([`functional.preference`]).

    Updates wait until somebody asks, or many have come. Importances are then as if each had been made at once.

    The guard: every visit tells what was remembered of an example and what it has become, from which follows how large
    the gradient estimate would be with another floor ([`functional.second_moments`]). The next pass gets the floor that
    makes it smallest: 1, which is uniform sampling, where the importances tell nothing.

    Args:
        length: number of examples.
        momentum: share of the old importance in the new one, in [0, 1); α of Salaün et al. 2023.
        uniform_fraction: lowest floor of the rates, in [0, 1].
        max_rate: cap of the rates before normalisation, ≥ 1.
        guard: whether the floor may rise.
        revisit_pruned: share of the visits that go to pruned examples, in [0, 1).
        uniform_below: see [`functional.preference`].
        record: what is taken down beside the importances, None for nothing.

    >>> memory = ImportanceMemory(3, momentum=0.0)
    >>> memory.update(torch.tensor([0, 2]), torch.tensor([0.5, 1.5]))
    >>> memory.importance
    tensor([0.5000,    nan, 1.5000])
    """

    def __init__(
        self,
        length: int,
        momentum: float = 0.2,
        uniform_fraction: float = 0.3,
        max_rate: float = 64.0,
        guard: bool = False,
        revisit_pruned: float = 0.0,
        uniform_below: float = 0.0,
        record: VisitRecord | None = None,
    ) -> None:
        self._importance = torch.full((length,), torch.nan)  # float32 [examples], NaN = unknown
        self.pruned = torch.zeros(length, dtype=torch.bool)
        self._record = record
        self.follow_updates = False
        self.momentum = momentum
        self.max_rate = max_rate
        self.floor = uniform_fraction
        self.left_out = 0.0  # share of the examples that are pruned
        self._floors = torch.linspace(uniform_fraction, 1.0, _FLOORS + 1, dtype=torch.float64)
        self._second_moments = torch.zeros_like(self._floors)
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []  # arguments of `update`
        self._guard = guard and uniform_fraction < 1
        self._revisit_pruned = revisit_pruned
        self._uniform_below = uniform_below
        self._revisit_rate = 0.0  # before normalisation, as below
        self._known = 0
        self._measure()

    def __len__(self) -> int:
        return len(self._importance)

    @property
    def importance(self) -> Tensor:
        """float32 `[examples]`, NaN where unknown."""
        self._write_down()
        return self._importance

    @property
    def record(self) -> VisitRecord | None:
        """What was taken down beside the importances."""
        self._write_down()
        return self._record

    @property
    def seen(self) -> float:
        """Share of the examples whose importance is known."""
        self._write_down()
        return self._known / len(self)

    def update(
        self, index: Tensor, importance: Tensor, inverse_rate: Tensor | None = None, seen: Tensor | None = None
    ) -> None:
        """Remember what was measured: q ← α·q + (1 − α)·measured, or the measurement itself where q was unknown.

        The tensors are kept for a while: they must not change.

        Args:
            index: int64 `[visits]`. Visits of one example in one batch count as one, with their mean.
            importance: `[visits]`, ≥ 0. Where it is not finite, the example becomes unknown again.
            inverse_rate: `[visits]`, as drawn; for the guard, which learns nothing without. For all batches or none.
            seen: for the record, see [`VisitRecord.update`]; likewise.
        """
        self._waiting.append((index, importance, inverse_rate, seen))
        if len(self._waiting) == _MOST_WAITING:
            self._write_down()

    @torch.no_grad()
    def _write_down(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        indices, importances, inverse_rates, seen = zip(*waiting, strict=True)
        index, importance = torch.cat(indices), torch.cat(importances).float()
        batch = torch.arange(len(waiting)).repeat_interleave(torch.tensor([len(index) for index in indices]))
        once, place, count = (index * len(waiting) + batch).unique(return_inverse=True, return_counts=True)
        measured = torch.zeros(len(once)).index_add_(0, place, importance).div_(count)
        remembered = torch.empty_like(measured)
        for turn in _turns(once // len(waiting)):
            remembered[turn] = self._mix_in(once[turn] // len(waiting), measured[turn])
        if self._guard and inverse_rates[0] is not None:
            self._second_moments += functional.second_moments(
                remembered[place], self._mean, importance, torch.cat(inverse_rates), self._floors, self.max_rate
            )
        if self._record is not None and seen[0] is not None:
            self._record.update(index, torch.cat(seen, 1))

    def _mix_in(self, index: Tensor, measured: Tensor) -> Tensor:
        """Of examples that differ; returns what was remembered before."""
        old = self._importance[index]
        unknown = old.isnan()
        new = torch.where(unknown, measured, measured.lerp(old, self.momentum))
        new.masked_fill_(~new.isfinite(), torch.nan)
        self._known += int(unknown.sum()) - int(new.isnan().sum())
        if self.follow_updates:
            self._follow(self._unnormalised(old, index), self._unnormalised(new, index))
        self._importance[index] = new
        return old

    def _follow(self, old_rate: Tensor, new_rate: Tensor) -> None:
        self._sum += (new_rate.double() - old_rate.double()).sum().item()
        self._peak = max(self._peak, new_rate.max().item())

    def begin_pass(self, increment: float = 0.0, prune_mass: float = 0.0, fresh: float = math.nan) -> None:
        """Choose the floor, prune, and take the mean and the sum afresh, O(examples).

        Args:
            increment: ε added to every known importance, so that no example is forgotten (Salaün et al. 2023, the last
                line of their algorithm).
            prune_mass: prune this share of the importance, less where there is less to prefer: see [`prunable`]. All
                others are drawn (again).
            fresh: mean importance of examples that are new to the model, for [`functional.preference`]; NaN if that is
                not known.
        """
        self._write_down()
        if increment:
            self._importance += increment
        self.pruned.zero_()  # so that the mean is that of all
        preference = functional.preference(self._mean_importance(), fresh, self._uniform_below)
        self.pruned.copy_(self.prunable(prune_mass * preference))
        self._choose_floor(preference)
        self._measure()

    def _measure(self) -> None:
        pruned = int(self.pruned.sum())
        self.left_out = pruned / len(self)
        self._drawable = len(self) - pruned
        self._mean = self._mean_importance()
        self._sum, self._peak, least = self._measure_rates() if self._known else (float(self._drawable), 1.0, 1.0)
        self.alike = least == self._peak and not pruned
        skips = self.follow_updates and pruned and not self._revisit_pruned
        self._kept = (~self.pruned).nonzero().flatten() if skips else None
        if pruned and self._revisit_pruned:
            share = self._revisit_pruned / (1 - self._revisit_pruned)
            self._revisit_rate = share * self._sum / pruned
            self._sum, self._peak = self._sum * (1 + share), max(self._peak, self._revisit_rate)
            self._drawable = len(self)

    def prunable(self, mass: float) -> Tensor:
        """Which examples together hold less than a share of the importance of all, as it is remembered.

        The smallest ones, of equal ones the first; no unknown ones, and none that is as important as the mean: where
        all are equally important there is nothing to leave out. Bool `[examples]`.
        """
        found = torch.zeros_like(self.pruned)
        if mass > 0:
            importance, order = self.importance.sort(stable=True)  # NaN comes last
            unimportant = importance < importance.nanmean(dtype=torch.float64)
            cumulated = importance.nan_to_num_(nan=0.0).cumsum(0, dtype=torch.float64)
            found[order[unimportant & (cumulated < mass * cumulated[-1])]] = True
        return found

    @property
    def awaits_evidence(self) -> bool:
        """Whether the guard has not yet seen an example for the second time, though importances differ."""
        self._write_down()
        return self._guard and self._known > 0 and not self._second_moments.any()

    def candidates(self, number: int, rng: torch.Generator) -> Tensor:
        """int64 `[number]`: drawn uniformly from the examples that can be drawn."""
        chosen = torch.randint(self._drawable, (number,), generator=rng)
        return chosen if self._kept is None else self._kept[chosen]

    def rates(self, index: Tensor | slice = slice(None)) -> Tensor:
        """float64 `[visits]`: the rates of some examples, by default of all; their mean over the drawable ones is 1."""
        self._write_down()
        return self._unnormalised(self._importance[index], index).double() / (self._sum / self._drawable)

    @property
    def largest_rate(self) -> float:
        """No rate is above it. It is reached at the start of a pass, and may be above all rates later."""
        self._write_down()
        return self._peak / (self._sum / self._drawable)

    def state_dict(self) -> dict[str, Any]:
        """All that training changed, as tensors and plain values."""
        self._write_down()
        return {
            "importance": self._importance.clone(),
            "pruned": self.pruned.clone(),
            "record": None if self._record is None else self._record.state_dict(),
            "floor": self.floor,
            "second_moments": self._second_moments.clone(),
            **{name: getattr(self, f"_{name}") for name in _COUNTS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        self.remember(state["importance"], state["pruned"], state["record"])
        self.floor = state["floor"]
        self._second_moments.copy_(state["second_moments"])
        for name in _COUNTS:
            setattr(self, f"_{name}", state[name])

    def remember(self, importance: Tensor, pruned: Tensor, record: Mapping[str, Any] | None = None) -> None:
        """Take over what was measured elsewhere: float32 and bool `[examples]`, and the state of a record."""
        self._waiting.clear()
        if self._record is not None and record is not None:
            self._record.load_state_dict(record)
        self._importance.copy_(importance)
        self.pruned.copy_(pruned)
        self._known = int(self._importance.isfinite().sum())
        self._measure()

    def _unnormalised(self, importance: Tensor, index: Tensor | slice) -> Tensor:
        rate = functional.unnormalised_rates(importance, self._mean, self.floor, self.max_rate)
        return rate.masked_fill_(self.pruned[index], self._revisit_rate)

    def _chunks(self) -> Iterator[slice]:
        """Of all examples, so that going through them takes little memory."""
        return (slice(start, start + CHUNK) for start in range(0, len(self), CHUNK))

    def _mean_importance(self) -> float:
        """Of the examples that are known and not pruned; NaN without any."""
        if not self._known:
            return torch.nan
        total, known = 0.0, 0
        for chunk in self._chunks():
            kept = self._importance[chunk].masked_fill(self.pruned[chunk], torch.nan)
            total += kept.nansum(dtype=torch.float64).item()
            known += len(kept) - int(kept.isnan().sum())
        return total / known if known else torch.nan

    def _measure_rates(self) -> tuple[float, float, float]:
        """Their sum, the largest and the smallest, before normalisation, of the examples that are not pruned."""
        total, largest, least = 0.0, 0.0, math.inf
        for chunk in self._chunks():
            pruned = self.pruned[chunk]
            rate = functional.unnormalised_rates(self._importance[chunk], self._mean, self.floor, self.max_rate)
            total += rate.masked_fill(pruned, 0.0).sum(dtype=torch.float64).item()
            largest = max(largest, rate.masked_fill(pruned, 0.0).max().item())
            least = min(least, rate.masked_fill(pruned, math.inf).min().item())
        return total, largest, least

    def _choose_floor(self, preference: float) -> None:
        lowest = self._floors[0].item()
        wanted = lowest + (1 - lowest) * (1 - preference)
        if self._guard:
            enough = self._second_moments <= _GOOD_ENOUGH * self._second_moments.min()
            wanted = max(wanted, self._floors[enough][0].item())  # the lowest where nothing is known: all are 0
            self._second_moments *= _FORGET
        self.floor = wanted


def _turns(index: Tensor) -> Iterator[Tensor]:
    """Positions in a sorted index, in turns within which no example comes twice: of all the first, the second, …"""
    place = torch.arange(len(index))
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    turn = place - place.where(first, 0).cummax(0).values
    for number in range(int(turn.max()) + 1 if len(index) else 0):
        yield (turn == number).nonzero().flatten()
