"""Examples whose label is probably wrong count for less, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.record import VisitRecord, loss_of_chance, suspects
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.state import read_tensor


class SuspectWeights:
    """The share s with which the loss of each example counts: `weight` for suspects, else 1.

    What is minimised then is the mean of s·ℓ. The importance of an example is s·q, which is remembered and to which its
    rate is proportional: a suspect that is left out is visited as often as the floor of the rates says. At each visit
    its loss is recorded all the same. It is suspect while its label got less probability than chance both in the mean
    and at the last visit, so that it comes back once the model believes the label. Suspects are looked for whenever a
    segment is planned, among examples that were visited twice or more. None of them is pruned.

    Args:
        length: number of examples.
        weight: s of suspects, in [0, 1).
        start: effective epochs, from which on there are any.
        epochs: how many were learnt.
        classes: how many there are; None: as many as there are labels.
    """

    def __init__(
        self, length: int, weight: float, start: float, epochs: Callable[[], float], classes: int | None = None
    ) -> None:
        self.flagged = torch.zeros(length, dtype=torch.bool)
        self._weight, self._start, self._epochs, self._classes = weight, start, epochs, classes

    def of(self, index: Tensor) -> Tensor:
        """s, float64 `[visits]`."""
        return torch.where(self.flagged[index], self._weight, 1.0).double()

    def recheck(self, record: VisitRecord, memory: ImportanceMemory) -> None:
        """Look for suspects anew; what is remembered of those that are new, or no more, is scaled."""
        if self._epochs() < self._start:
            return
        columns = record.columns()
        found = suspects(columns, self._classes) & (columns["loss"] > loss_of_chance(columns, self._classes))
        found &= columns["visits"] > 1
        memory.scale(found & ~self.flagged, self._weight)
        memory.scale(self.flagged & ~found, 1 / self._weight if self._weight else torch.nan)
        self.flagged = memory.spared = found

    def state_dict(self) -> dict[str, Any]:
        """Which are suspects."""
        return {"flagged": self.flagged.clone()}

    def load_state_dict(self, state: Mapping[str, Any], memory: ImportanceMemory) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        self.flagged = memory.spared = read_tensor(state, "flagged", [len(self.flagged)], torch.bool).clone()
