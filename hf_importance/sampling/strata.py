"""Strata: the time of every example, cut into pieces with one visit each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.state import read_tensor


class Strata:
    """The stratum that every example is in, and the visits as time goes on.

    A stratum is a piece of the time of an example in which its rates add up to 1: it is 1/rate long. In each stratum
    the example is visited once, at a uniformly random place. The rate follows the importance with which the stratum
    began. What the visit measures takes effect with the next stratum, so given the past, the place is independent of
    all rates in the stratum, and a visit with the weight 1/rate stands for each moment of the stratum with expectation
    1, however importances change when they are measured. Summed over visits, the weights of an example follow the time
    that has passed: they cannot deviate by more than the current stratum, except where rates change within strata.

    >>> strata = Strata(torch.tensor([1.0, 2.0]), seed=0)
    >>> rate = torch.tensor([0.5, 1.5])
    >>> visits = [strata.advance(slice(0, 2), 1.0, rate, strata.importance, rate)[0].tolist() for _ in range(4)]
    >>> [sum(visits, []).count(i) for i in (0, 1)]  # in the time of 4 passes
    [2, 6]
    """

    def __init__(self, importance: Tensor, seed: int) -> None:
        self.importance = importance.clone()  # with which the strata began, float32 [examples], NaN where unknown
        self._rng = torch.Generator().manual_seed(seed)
        self._place = torch.rand(len(importance), generator=self._rng, dtype=torch.float32)  # of the visit, in [0, 1)
        self._position = torch.zeros(len(importance), dtype=torch.float32)  # of the present, in [0, 1)

    def visits(self, part: slice, time: float, rate: Tensor, next_rate: Tensor) -> float:
        """Expected number of visits if [`advance`] is called, over random places."""
        left = ((1 - self._position[part]) / rate).clamp(max=time)  # of the current strata
        return (rate * left + next_rate * (time - left)).sum(dtype=torch.float64).item()

    def advance(
        self, part: slice, time: float, rate: Tensor, next_importance: Tensor, next_rate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let some time pass, in passes, for a part of the examples.

        New strata begin with `next_importance` and have `next_rate`, which is positive where `rate` is. While `rate` is
        0, the time of an example stands still. Returns the visits, by example but in no order of time: examples int64,
        rates float32 and times float32 in [0, `time`).
        """
        importance, place, position = (column[part] for column in (self.importance, self._place, self._position))
        now = torch.arange(len(rate))  # examples whose time still goes on
        left = torch.full_like(rate, time)
        visits = []
        while len(now):
            start, reached = position[now], position[now] + rate * left
            visited = (start <= place[now]) & (place[now] < reached)
            when = time - left + (place[now] - start) / rate
            visits.append((now[visited] + part.start, rate[visited], when[visited]))
            position[now] = reached
            ended = reached >= 1
            left = (left - (1 - start) / rate)[ended].clamp_(min=0.0)
            now = now[ended]
            importance[now], rate, position[now] = next_importance[now], next_rate[now], 0.0
            place[now] = torch.rand(len(now), generator=self._rng, dtype=torch.float32)
        index, rate, when = (torch.cat(column) for column in zip(*visits, strict=True))
        return index, rate, when

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors."""
        columns = {"importance": self.importance, "place": self._place, "position": self._position}
        return {name: column.clone() for name, column in columns.items()} | {"rng": self._rng.get_state()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], length: int) -> Strata:
        """Restore a [`state_dict`] exactly."""
        strata = cls(read_tensor(state, "importance", [length], torch.float32), seed=0)
        strata._place = read_tensor(state, "place", [length], torch.float32)
        strata._position = read_tensor(state, "position", [length], torch.float32)
        strata._rng.set_state(read_tensor(state, "rng", strata._rng.get_state().shape, torch.uint8))
        return strata
