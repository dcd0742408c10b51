"""Groups visits of texts of similar length, so batches have little padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.state import read_tensor

_MAX_BATCHES = 50
_MIN_PARTS = 4
"""Mega-batches per pass, at least; both limits as in transformers."""


class LengthGroups:
    """Reorders planned visits like the `LengthGroupedSampler` of transformers; which examples are drawn is unchanged.

    Mega-batches of about 50 batches (a quarter of a pass for small data) are taken in planned order and sorted by
    length, longest first. The first one of a segment also gets the longest example of the segment, so that running out
    of memory happens early. Visits that do not fill a batch are kept and come first in the next segment.

    Args:
        length: lengths of the examples, `[examples]`.
        batch_size: visits per batch.
        batches: batches per step.
        examples: number of examples on all processes, to size the mega-batches as transformers does.

    >>> groups = LengthGroups(torch.tensor([5, 1, 4, 2, 3]), batch_size=2, batches=1, examples=16)
    >>> groups.add(torch.arange(5), torch.ones(5))
    >>> groups.take(2)[0], groups.take(2)[0], len(groups)
    (tensor([0, 2]), tensor([3, 1]), 1)
    """

    def __init__(self, length: Tensor, batch_size: int, batches: int, examples: int) -> None:
        step = batch_size * batches
        self.size = step * max(1, min(_MAX_BATCHES, examples // (_MIN_PARTS * step)))
        self._length = length
        self._batch_size = batch_size
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        self._waiting, self._sorted = nothing, nothing  # examples and rates

    def __len__(self) -> int:
        """Number of visits held."""
        return len(self._waiting[0]) + len(self._sorted[0])

    def add(self, index: Tensor, rate: Tensor) -> None:
        """Add the planned visits of a segment: examples int64 `[visits]` and rates float `[visits]`."""
        index, rate = join(self._waiting, (index, rate.double()))
        if not len(index):  # a segment of few visits may have none
            return
        length = self._length[index]
        pair = torch.stack([length[: self.size].argmax(), length.argmax()])
        index[pair], rate[pair] = index[pair.flip(0)], rate[pair.flip(0)]
        self._waiting = index, rate

    def take(self, size: int) -> tuple[Tensor, Tensor]:
        """Take the next `size` visits, which must be held: examples int64 and rates float64, `[size]`."""
        if len(self._sorted[0]) < size:
            self._sort(size)
        taken, self._sorted = split(self._sorted, size)
        return taken

    def _sort(self, least: int) -> None:
        """Sort the next mega-batch together with the rest of the last: whole batches, but at least `least` visits.

        The visits are divided evenly, so no mega-batch is smaller than `size` if there are enough.
        """
        parts = max(1, len(self) // self.size)
        whole = -(-len(self) // parts) // self._batch_size * self._batch_size
        part, self._waiting = split(self._waiting, max(least, whole) - len(self._sorted[0]))
        index, rate = join(self._sorted, part)
        order = self._length[index].sort(descending=True, stable=True).indices
        self._sorted = index[order], rate[order]

    def state_dict(self) -> dict[str, Any]:
        """The visits held, as tensors."""
        (index, rate), (sorted_index, sorted_rate) = self._waiting, self._sorted
        state = {"index": index, "rate": rate, "sorted_index": sorted_index, "sorted_rate": sorted_rate}
        return {name: values.clone() for name, values in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        pairs = []
        for prefix in ("", "sorted_"):
            index = read_tensor(state, f"{prefix}index", [None], torch.int64, below=len(self._length))
            pairs.append((index, read_tensor(state, f"{prefix}rate", [len(index)], torch.float64)))
        self._waiting, self._sorted = pairs


def join(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Visits one after the other: examples and rates, `[visits]` each."""
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def split(visits: tuple[Tensor, Tensor], size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first `size` visits, or all if there are fewer, and the rest."""
    index, rate = visits
    return (index[:size], rate[:size]), (index[size:], rate[size:])
