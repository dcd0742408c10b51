"""A drawn batch, and the examples that a process draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """One drawn batch. It travels with the batch, because the memory has changed by the time the loss is computed.

    Args:
        number: number of the draw, from 0.
        index: positions in the training data `[batch]`.
        rate: expected number of visits relative to uniform sampling `[batch]`, when drawn.
        weight: importance weight of each loss `[batch]`, fixed when drawn.
        lengths: number of tokens of each example `[batch]`, if the collator has concatenated them into one row.
    """

    number: int
    index: list[int]
    rate: list[float]
    weight: list[float]
    lengths: list[int] | None = None

    def to(self, *_: Any, **__: Any) -> Draw:
        """Return the draw unchanged; called when a batch is moved to a device."""
        return self


SKIPPED = Draw(-1, [], [], [])
"""Placeholder for a draw that was used before training was interrupted."""


@dataclass(frozen=True)
class Shard:
    """The examples that one rank owns: only this rank draws, measures and remembers them.

    Args:
        length: number of examples in the whole training data.
        ranks: number of ranks (the world size).
        index: positions of the examples in the training data, int64, ascending; None for all of them.
    """

    length: int
    ranks: int = 1
    index: Tensor | None = None

    @classmethod
    def of(cls, length: int, rank: int, ranks: int, seed: int) -> Shard:
        """A random part of the data; sizes differ by at most one between ranks, which all pass the same `seed`.

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
        """Factor n R / N of all weights: the mean over R ranks of means over n examples is the mean over all N."""
        return len(self) * self.ranks / self.length

    def positions(self, local: Tensor) -> Tensor:
        """Map positions in the shard to positions in the training data."""
        return local if self.index is None else self.index[local]

    def local(self, positions: Tensor) -> Tensor:
        """Map positions in the training data to positions in the shard."""
        return positions if self.index is None else torch.searchsorted(self.index, positions)
