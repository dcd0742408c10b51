"""Groups visits of texts of similar length, so batches have little padding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.state import read_tensor

_MAX_BATCHES = 50
_MIN_PARTS = 4  # mega-batches per pass, at least; both limits as in transformers


class LengthGroups:
    """Reorders planned visits like the `LengthGroupedSampler` of transformers; which examples are drawn is unchanged.

    Mega-batches of about 50 batches (a quarter of a pass for small data) are taken in planned order and sorted by
    length, longest first. The first one of a segment also gets the longest example of the segment, so that running out
    of memory happens early. Visits that do not fill a batch are kept and come first in the next segment. To size the
    mega-batches as transformers does, it needs `batches` per step and the number of `examples` on all processes.

    >>> groups = LengthGroups(torch.tensor([5, 1, 4, 2, 3]), batch_size=2, batches=1, examples=16)
    >>> groups.add(torch.arange(5), torch.ones(5))
    >>> groups.next_sorted(*no_visits(), least=2)[0], len(groups)
    (tensor([0, 2, 3, 1]), 1)
    """

    def __init__(self, length: Tensor, batch_size: int, batches: int, examples: int) -> None:
        step = batch_size * batches
        self.size = step * max(1, min(_MAX_BATCHES, examples // (_MIN_PARTS * step)))
        self._length, self._batch_size = length, batch_size
        self._index, self._rate = no_visits()  # not yet sorted

    def __len__(self) -> int:
        """Number of visits that are not yet sorted."""
        return len(self._index)

    def add(self, index: Tensor, rate: Tensor) -> None:
        """Add the planned visits of a segment: examples and rates, `[visits]` each."""
        self._index, self._rate = torch.cat([self._index, index]), torch.cat([self._rate, rate])
        if len(self):  # a segment of few visits may have none
            length = self._length[self._index]
            pair = torch.stack([length[: self.size].argmax(), length.argmax()])
            for column in (self._index, self._rate):
                column[pair] = column[pair.flip(0)]

    def next_sorted(self, index: Tensor, rate: Tensor, least: int) -> tuple[Tensor, Tensor]:
        """Sort the next mega-batch together with the rest of the last: whole batches, but at least `least` visits.

        The visits are divided evenly, so no mega-batch is smaller than `size` if there are enough.
        """
        held = len(self) + len(index)
        parts = max(1, held // self.size)
        whole = -(-held // parts) // self._batch_size * self._batch_size
        taken = max(least, whole) - len(index)
        index, self._index = torch.cat([index, self._index[:taken]]), self._index[taken:]
        rate, self._rate = torch.cat([rate, self._rate[:taken]]), self._rate[taken:]
        order = self._length[index].sort(descending=True, stable=True).indices
        return index[order], rate[order]

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
