"""How far the memory can be trusted: the floor of the rates, by what visits show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.rates import second_moments
from hf_importance.state import read_tensor

_FLOORS = 8
"""Steps from the lowest floor to 1 to choose from."""
_GOOD_ENOUGH = 1.01
"""The lowest floor is taken whose second moment is within 1 % of the least."""
_FORGET = 0.9
"""Share of the evidence that is kept from segment to segment: half of it after a pass, about."""


class Guard:
    """Chooses the floor of the rates that makes the gradient estimate smallest.

    Every visit tells what was remembered of an example and what it has become, from which follows how large the
    estimate would be with another floor ([`rates.second_moments`]). Where importances tell nothing that is 1, uniform
    sampling.

    Args:
        uniform_fraction: the lowest floor, in [0, 1].
    """

    def __init__(self, uniform_fraction: float) -> None:
        self._floors = torch.linspace(uniform_fraction, 1.0, _FLOORS + 1, dtype=torch.float64)
        self._second_moments = torch.zeros_like(self._floors)

    def learn(self, remembered: Tensor, mean: float, measured: Tensor, rate: Tensor, max_rate: float) -> None:
        """Take in some visits: arguments of [`rates.second_moments`]. In any division the same, to the bit."""
        terms = second_moments(remembered, mean, measured, rate, self._floors, max_rate)
        self._second_moments = torch.cat([self._second_moments[None], terms]).cumsum(0)[-1]

    def floor(self) -> float:
        """For the next segment."""
        enough = self._second_moments <= _GOOD_ENOUGH * self._second_moments.min()
        self._second_moments *= _FORGET
        return self._floors[enough][0].item()  # the lowest where nothing is known: all are 0

    def state_dict(self) -> dict[str, Any]:
        """The evidence so far."""
        return {"second_moments": self._second_moments.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        shape = self._second_moments.shape
        self._second_moments = read_tensor(state, "second_moments", shape, torch.float64).clone()
