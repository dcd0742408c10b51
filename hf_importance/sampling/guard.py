"""How far the memory can be trusted: the floor of the rates, by what visits show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.rates import expected_costs, second_moments
from hf_importance.state import read_tensor

_FLOORS = 8
"""Steps from the lowest floor to 1 to choose from."""
_TOLERANCE = 1.01
"""The lowest floor is taken whose second moment is within 1 % of the least."""
_MAX_RELATIVE_SPENDING = 0.9
"""Where visits cost differently sampling is uniform unless it saves a tenth: less was lost again in training."""
_DECAY = 0.9
"""Share of the evidence that is kept from segment to segment: half of it after a pass, about."""


class Guard:
    """Chooses the floor of the rates that makes the gradient estimate smallest.

    Every visit tells what was remembered of an example and what it has become, from which follows how large the
    estimate would be with another floor ([`rates.second_moments`]). Where importances tell nothing that is 1, uniform
    sampling.

    Where visits cost differently, estimates are compared at equal cost: a visit of a given floor has the second moment
    M and costs C, so that n of them have M/n and cost n C, and M C is what counts. But M itself must not be above that
    of uniform sampling, or a step would teach less than a uniform one, and training take more of them than was asked.
    And where the best floor spends more than nine tenths of what uniform sampling does, sampling is uniform. Language
    models are such a case: at equal cost the importances of texts differ by little, and a training that prefers the
    hard ones for 3 to 5 % of the variance learns them by heart.

    Args:
        uniform_fraction: the lowest floor, in [0, 1].
    """

    def __init__(self, uniform_fraction: float) -> None:
        self._floors = torch.linspace(uniform_fraction, 1.0, _FLOORS + 1, dtype=torch.float64)
        self._second_moments = torch.zeros_like(self._floors)
        self._costs = torch.zeros_like(self._floors)  # 0: all visits cost the same

    def observe(
        self,
        remembered: Tensor,
        mean: float,
        measured: Tensor,
        rate: Tensor,
        max_rate: float,
        cost: Tensor | None = None,
    ) -> None:
        """Take in some visits: arguments of [`rates.expected_costs`]. In any division the same, to the bit."""
        terms = second_moments(remembered, mean, measured, rate, self._floors, max_rate)
        self._second_moments = torch.cat([self._second_moments[None], terms]).cumsum(0)[-1]
        if cost is not None:
            terms = expected_costs(remembered, mean, measured, rate, cost, self._floors, max_rate)
            self._costs = torch.cat([self._costs[None], terms]).cumsum(0)[-1]

    def floor(self) -> float:
        """For the next segment."""
        teaches = self._second_moments <= _TOLERANCE * self._second_moments[-1]
        costs = bool(self._costs.any())
        spent = self._second_moments * self._costs if costs else self._second_moments
        least = spent[teaches].min()
        enough = teaches & (spent <= _TOLERANCE * least)
        if costs and least > _MAX_RELATIVE_SPENDING * spent[-1]:
            enough = self._floors == 1
        self._second_moments *= _DECAY
        self._costs *= _DECAY
        return self._floors[enough][0].item()  # the lowest where nothing is known: all are 0

    def state_dict(self) -> dict[str, Any]:
        """The evidence so far."""
        return {"second_moments": self._second_moments.clone(), "costs": self._costs.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        shape = self._second_moments.shape
        self._second_moments = read_tensor(state, "second_moments", shape, torch.float64).clone()
        self._costs = read_tensor(state, "costs", shape, torch.float64).clone()
