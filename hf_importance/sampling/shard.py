"""The examples that one process draws from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The examples that one rank owns: only this rank draws, measures and remembers them."""

    length: int  # of the whole training data
    ranks: int = 1
    index: Tensor | None = None  # positions in the training data, int64, ascending; None for all of them

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

    def part(self, values: Tensor) -> Tensor:
        """The values of the examples of the shard, from those of all examples."""
        return values if self.index is None else values[self.index]

    def local(self, positions: Tensor) -> Tensor:
        """Map positions in the training data to positions in the shard."""
        return positions if self.index is None else torch.searchsorted(self.index, positions)
