"""Groups visits of texts of similar length, so batches have little padding."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_importance.sampling.state import read_tensor

_MAX_BATCHES = 50
_MIN_PARTS = 4  # mega-batches per pass, at least


class LengthGroups:
    """Reorders planned visits into batches of similar length; which examples are drawn is unchanged.

    Mega-batches of about 50 batches (a quarter of a pass for small data) are taken in planned order, sorted by length,
    longest first, and cut into batches, whose order is random: from the longest to the shortest, as with the
    `LengthGroupedSampler` of transformers, what a model learns would drift with the length. Only the very first batch
    is the longest of its mega-batch, so that running out of memory happens early.

    The random number of a draw depends on nothing but the seed and the number of the draw. Processes with the same seed
    thus draw texts of similar length in the same step, and do not wait for each other.

    Args:
        length: of the examples, `[examples]`.
        batch_size: visits per batch.
        batches: batches per step, on this process.
        examples: on all processes.
        seed: the same on all processes.

    >>> groups = LengthGroups(torch.tensor([5, 1, 4, 2, 3]), batch_size=2, batches=1, examples=16)
    >>> groups.add(torch.arange(5), torch.ones(5))
    >>> groups.next_batches(first=2, draw=0)[0], len(groups)
    (tensor([0, 2, 3, 1]), 1)
    """

    def __init__(self, length: Tensor, batch_size: int, batches: int, examples: int, seed: int = 0) -> None:
        step = batch_size * batches
        self.size = step * max(1, min(_MAX_BATCHES, examples // (_MIN_PARTS * step)))
        self.longest = int(length.argmax())
        self._length, self._batch_size, self._seed = length, batch_size, seed % 2**32
        self._index, self._rate = no_visits()  # not yet sorted

    def __len__(self) -> int:
        """Number of visits that are not yet sorted."""
        return len(self._index)

    def add(self, index: Tensor, rate: Tensor) -> None:
        """Add planned visits, after those that are there: examples and rates, `[visits]` each."""
        self._index, self._rate = torch.cat([self._index, index]), torch.cat([self._rate, rate])

    def take_back(self, index: Tensor, rate: Tensor) -> None:
        """Add visits that were sorted, but not drawn, before those that are there."""
        self._index, self._rate = torch.cat([index, self._index]), torch.cat([rate, self._rate])

    def next_batches(self, first: int, draw: int) -> tuple[Tensor, Tensor]:
        """The visits of the next mega-batch, batch by batch: examples and rates.

        The visits are divided evenly, so no mega-batch is smaller than [`size`] if there are enough.

        Args:
            first: visits of the first batch, at most those of a batch and those that are there.
            draw: number of the draw of the first batch.
        """
        share = -(-len(self) // max(1, len(self) // self.size))
        taken = share - (share - first) % self._batch_size
        order = self._length[self._index[:taken]].sort(descending=True, stable=True).indices
        batches = 1 + (taken - first) // self._batch_size
        start = self._batch_size * (self._choice(draw, batches) if draw else 0)
        chosen = [order[start : start + first]]
        left = [*torch.cat([order[:start], order[start + first :]]).split(self._batch_size)]
        chosen += [left.pop(self._choice(draw + place, len(left))) for place in range(1, batches)]
        order = torch.cat(chosen)
        found = self._index[order], self._rate[order]
        self._index, self._rate = self._index[taken:], self._rate[taken:]
        return found

    def _choice(self, draw: int, number: int) -> int:
        """The place of one of so many batches, for this draw."""
        return int(np.random.default_rng((self._seed, draw)).random() * number)

    def state_dict(self) -> dict[str, Any]:
        """The visits that are not yet sorted, as tensors."""
        return {"index": self._index.clone(), "rate": self._rate.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        self._index = read_tensor(state, "index", [None], torch.int64)
        self._rate = read_tensor(state, "rate", self._index.shape, torch.float64)


def no_visits() -> tuple[Tensor, Tensor]:
    """No examples, int64, and no rates, float64."""
    return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
