"""Visits of texts of about the same length together, so that batches have little padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.state import read_tensor

_MAX_BATCHES = 50
_MIN_PARTS = 4
"""Of a pass; both as in transformers."""


class LengthGroups:
    """Arranges planned visits as transformers' `LengthGroupedSampler` does; what was drawn, and its weights, stay.

    Mega-batches of 50 batches or a little more, of small data of a quarter of a pass, are taken in the order that was
    planned and sorted, the longest first. The first of a segment also gets the longest of all of it, so that memory
    runs out early if it does. Visits that fill no batch wait until more are planned, and then come first.

    Args:
        length: `[examples]`, of those that are visited.
        batch_size: visits of a batch.
        batches: of a step.
        examples: of all processes, by whose number mega-batches of small data are as large as those of transformers.

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
        """Visits that are there."""
        return len(self._waiting[0]) + len(self._sorted[0])

    def add(self, index: Tensor, rate: Tensor) -> None:
        """Visits of a segment, as they were planned: int64 and float `[visits]`, their examples and rates."""
        index, rate = _join(self._waiting, (index, rate.double()))
        length = self._length[index]
        pair = torch.stack([length[: self.size].argmax(), length.argmax()])
        index[pair], rate[pair] = index[pair.flip(0)], rate[pair.flip(0)]
        self._waiting = index, rate

    def take(self, size: int) -> tuple[Tensor, Tensor]:
        """The next visits, of which there must be so many: int64 and float64 `[size]`."""
        if len(self._sorted[0]) < size:
            self._sort(size)
        taken, self._sorted = _split(self._sorted, size)
        return taken

    def _sort(self, least: int) -> None:
        """Make the next mega-batch, with what is left of the last: whole batches, unless that are fewer than `least`.

        What there is is divided evenly, so that none is smaller than `size` if there is as much.
        """
        parts = max(1, len(self) // self.size)
        whole = -(-len(self) // parts) // self._batch_size * self._batch_size
        part, self._waiting = _split(self._waiting, max(least, whole) - len(self._sorted[0]))
        index, rate = _join(self._sorted, part)
        order = self._length[index].sort(descending=True, stable=True).indices
        self._sorted = index[order], rate[order]

    def state_dict(self) -> dict[str, Any]:
        """The visits that are there, as tensors."""
        (index, rate), (sorted_index, sorted_rate) = self._waiting, self._sorted
        state = {"index": index, "rate": rate, "sorted_index": sorted_index, "sorted_rate": sorted_rate}
        return {name: values.clone() for name, values in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        pairs = []
        for prefix in ("", "sorted_"):
            index = read_tensor(state, f"{prefix}index", [None], torch.int64, below=len(self._length))
            pairs.append((index, read_tensor(state, f"{prefix}rate", [len(index)], torch.float64)))
        self._waiting, self._sorted = pairs


def _join(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _split(visits: tuple[Tensor, Tensor], size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    index, rate = visits
    return (index[:size], rate[:size]), (index[size:], rate[size:])
