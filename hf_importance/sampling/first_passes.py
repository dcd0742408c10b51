"""What a training leaves for the next one: the mean importance of every example over its first passes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.state import read_number, read_tensor

PASSES = 3
"""Passes that count. In the first the model was untrained for a while, and in the end it has fitted the data. Early
passes also rank examples in Paul et al. 2021 (arXiv 2107.07075). See scripts/results/README.md on the difference."""


class FirstPasses:
    """Mean of the importances at the ends of the first passes; 4 bytes per example.

    >>> passes = FirstPasses(2)
    >>> passes.add(torch.tensor([1.0, torch.nan]))
    >>> passes.with_current(torch.tensor([3.0, 0.5]))
    tensor([2.0000, 0.5000])
    """

    def __init__(self, length: int) -> None:
        self._length, self._passes = length, 0
        self._mean: Tensor | None = None  # float32 [examples]; None before the first pass has ended

    def add(self, importance: Tensor) -> None:
        """Add the importances at the end of a pass, float32 `[examples]`, NaN where unknown."""
        self._mean = self.with_current(importance)
        self._passes += 1

    def with_current(self, importance: Tensor) -> Tensor:
        """The mean with those of a pass that has not ended, unless enough passes have; NaN where all are unknown."""
        if self._mean is None or self._passes >= PASSES:
            return (importance if self._mean is None else self._mean).clone()
        mean = self._mean.lerp(importance, 1 / (self._passes + 1))
        return mean.where(mean.isfinite(), importance.where(importance.isfinite(), self._mean))

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""
        return {"mean": None if self._mean is None else self._mean.clone(), "passes": self._passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        self._mean = read_tensor(state, "mean", [self._length], torch.float32, optional=True)
        self._passes = read_number(state, "passes", int, 0)
