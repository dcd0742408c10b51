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
    rows: list[int] | None = None  # place in `index` of the example of each row, -1 if unknown; None if one row each

    @property
    def row_weights(self) -> list[float]:
        """Weight of each row of the batch: that of its example, or the mean if it is unknown."""
        if self.rows is None:
            return self.weight
        mean = sum(self.weight) / len(self.weight)
        return [self.weight[place] if place >= 0 else mean for place in self.rows]

    def of(self, places: list[int]) -> Draw:
        """The draw of some of the examples, with one row each."""
        columns = ([column[place] for place in places] for column in (self.index, self.rate, self.weight))
        return Draw(self.number, *columns)

    def to(self, *_: Any, **__: Any) -> Draw:
        """Return the draw unchanged; called when a batch is moved to a device."""
        return self


SKIPPED = Draw(-1, [], [], [])  # placeholder for a draw that was used before training was interrupted
