"""Smaller weights in the loss for examples whose label is probably wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord, loss_of_chance, suspects
from hf_importance.sampling.state import read_tensor


class SuspectWeights:
    """Factor s of the loss ℓ of each example: `weight` for suspects, else 1.

    Training then minimises the mean of s·ℓ. The remembered importance of an example is s·q, so a suspect with s = 0 is
    visited at the floor of the rates. Its unscaled loss is still recorded at each visit. An example is suspect while
    its label has less probability than chance both on average and at the last visit; it recovers once the model agrees
    with the label. Suspects are updated whenever a segment is planned, among examples with at least two visits. They
    are never pruned.

    Args:
        length: number of examples.
        weight: s of suspects, in [0, 1).
        start: effective epochs before the first update.
        epochs: returns the current effective epochs.
        classes: number of classes; None for the number of distinct labels.
    """

    def __init__(
        self, length: int, weight: float, start: float, epochs: Callable[[], float], classes: int | None = None
    ) -> None:
        self.flagged = torch.zeros(length, dtype=torch.bool)
        self._weight, self._start, self._epochs, self._classes = weight, start, epochs, classes

    def of(self, index: Tensor) -> Tensor:
        """Factors s of some examples, float64 `[visits]`."""
        return torch.where(self.flagged[index], self._weight, 1.0).double()

    def recheck(self, record: VisitRecord, memory: ImportanceMemory) -> None:
        """Update the suspects, and rescale the remembered importance of those that changed."""
        if self._epochs() < self._start:
            return
        columns = record.columns()
        found = suspects(columns, self._classes) & (columns["loss"] > loss_of_chance(columns, self._classes))
        found &= columns["visits"] > 1
        memory.scale(found & ~self.flagged, self._weight)
        memory.scale(self.flagged & ~found, 1 / self._weight if self._weight else torch.nan)
        self.flagged = memory.spared = found

    def state_dict(self) -> dict[str, Any]:
        """The suspects, as tensors."""
        return {"flagged": self.flagged.clone()}

    def load_state_dict(self, state: Mapping[str, Any], memory: ImportanceMemory) -> None:
        """Restore a [`state_dict`] exactly."""
        self.flagged = memory.spared = read_tensor(state, "flagged", [len(self.flagged)], torch.bool).clone()
