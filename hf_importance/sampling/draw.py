"""What is drawn, and which examples a process may draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """One drawn batch. It travels with the batch, as by the time of the loss the memory has moved on.

    Args:
        number: counts the draws from 0.
        index: positions in the training data `[batch]`.
        rate: expected visits of each relative to uniform sampling `[batch]`, at the draw.
        weight: of the loss of each visit `[batch]`, fixed at the draw.
        lengths: of the examples in tokens `[batch]`, where the collator has put all of them into one row.
    """

    number: int
    index: list[int]
    rate: list[float]
    weight: list[float]
    lengths: list[int] | None = None

    def to(self, *_: Any, **__: Any) -> Draw:
        """Stays where it is when a batch is sent to a device."""
        return self


SKIPPED = Draw(-1, [], [], [])
"""Stands for a draw that was used before an interruption."""


@dataclass(frozen=True)
class Shard:
    """The examples that one rank owns: it alone draws, measures and remembers them.

    Args:
        length: of the whole training data.
        ranks: among which it was divided.
        index: positions of the examples in the training data, int64, ascending; None for all of them.
    """

    length: int
    ranks: int = 1
    index: Tensor | None = None

    @classmethod
    def of(cls, length: int, rank: int, ranks: int, seed: int) -> Shard:
        """A random part of the data, of the same size for all ranks within one example; `seed` is that of all ranks.

        >>> sorted(torch.cat([Shard.of(5, rank, ranks=2, seed=0).index for rank in (0, 1)]).tolist())
        [0, 1, 2, 3, 4]
        """
        if ranks == 1:
            return cls(length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        return cls(length, ranks, order[rank::ranks].sort().values)

    def __len__(self) -> int:
        return self.length if self.index is None else len(self.index)

    @property
    def weight(self) -> float:
        """Factor n R / N of all weights, so that the mean over the ranks of means over n is the mean over all N."""
        return len(self) * self.ranks / self.length

    def positions(self, local: Tensor) -> Tensor:
        """From positions in the shard to positions in the training data."""
        return local if self.index is None else self.index[local]

    def local(self, positions: Tensor) -> Tensor:
        """From positions in the training data to positions in the shard."""
        return positions if self.index is None else torch.searchsorted(self.index, positions)
