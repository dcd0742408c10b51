"""A drawn batch, and the examples that a process draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Draw:
    """One drawn batch. It travels with the batch, because the memory has changed by the time the loss is computed."""

    number: int  # of the draw, from 0
    index: list[int]  # positions in the training data
    rate: list[float]  # expected visits relative to uniform sampling, when drawn
    weight: list[float]  # of each loss, fixed when drawn
    lengths: list[int] | None = None  # tokens of each example, if the collator has concatenated them into one row

    def to(self, *_: Any, **__: Any) -> Draw:
        """Return the draw unchanged; called when a batch is moved to a device."""
        return self


SKIPPED = Draw(-1, [], [], [])  # placeholder for a draw that was used before training was interrupted
