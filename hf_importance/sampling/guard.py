"""Chooses the floor of the rates by how reliable the remembered importances are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.rates import expected_costs, second_moments
from hf_importance.sampling.state import read_tensor

_FLOORS = 8  # number of steps between the lowest floor and 1
_TOLERANCE = 1.01  # the lowest floor within 1 % of the smallest second moment is chosen
_MAX_RELATIVE_SPENDING = 0.9
"""With different costs, sampling is uniform unless it saves a tenth; smaller savings did not pay off in training."""
_DECAY = 0.9  # decay of the evidence per segment: about one half per pass


class Guard:
    """Chooses the floor of the rates that minimises the second moment of the gradient estimate.

    Every visit compares the remembered importance of an example with its current one, which gives the second moment
    with any other floor ([`rates.second_moments`]). If importances are not informative, the best floor is 1, uniform
    sampling.

    If visits differ in cost, second moments are compared at equal cost: a visit with second moment M and cost C yields
    M/n after n visits at cost n C, so M C is minimised. M itself must not exceed that of uniform sampling, or a step
    would make less progress than a uniform one. Sampling is uniform unless a tenth of M C is saved: at equal cost the
    importances of texts differ little, and preferring hard texts for 3 to 5 % of the variance overfits to them.
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
        """Add visits, with arguments of [`rates.expected_costs`]. The split into calls has no effect, bit for bit."""
        terms = second_moments(remembered, mean, measured, rate, self._floors, max_rate)
        self._second_moments = add_in_order(self._second_moments, terms)
        if cost is not None:
            terms = expected_costs(remembered, mean, measured, rate, cost, self._floors, max_rate)
            self._costs = add_in_order(self._costs, terms)

    def next_floor(self) -> float:
        """The floor for the next segment; call it once per segment, as the evidence decays with each call."""
        acceptable = self._second_moments <= _TOLERANCE * self._second_moments[-1]
        costs = bool(self._costs.any())
        spent = self._second_moments * self._costs if costs else self._second_moments
        least = spent[acceptable].min()
        enough = acceptable & (spent <= _TOLERANCE * least)
        if costs and least > _MAX_RELATIVE_SPENDING * spent[-1]:
            enough = self._floors == 1
        self._second_moments *= _DECAY
        self._costs *= _DECAY
        return self._floors[enough][0].item()  # the lowest without evidence, because all are 0

    def state_dict(self) -> dict[str, Any]:
        """The evidence so far, as tensors."""
        return {"second_moments": self._second_moments.clone(), "costs": self._costs.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        shape = self._floors.shape
        self._second_moments = read_tensor(state, "second_moments", shape, torch.float64)
        self._costs = read_tensor(state, "costs", shape, torch.float64)


def add_in_order(total: Tensor, terms: Tensor) -> Tensor:
    """Add the terms `[visits, …]` to a total one after the other, so that their split into calls has no effect."""
    return torch.cat([total[None], terms]).cumsum(0)[-1]
