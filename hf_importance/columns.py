"""Per-example columns of this process, and gathered from all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_importance.sampling.sampler import ImportanceBatchSampler


class Columns:
    """Columns of all examples: current for those of this process, as last gathered for the others.

    Reading them requires no communication.

    Args:
        sampler: the sampler of this process.
        first: whether this is the main process, which keeps all columns; the others only keep the importances.
    """

    def __init__(self, sampler: ImportanceBatchSampler, first: bool) -> None:
        self._sampler, self._first = sampler, first
        self._gathered: dict[str, Tensor] = {}

    @property
    def importances(self) -> Tensor:
        """Importances, float32 `[examples]`, NaN where unknown."""
        return self._global_column("importance", self._sampler.importances)

    def all_columns(self) -> dict[str, Tensor]:
        """`[examples]` each: recorded columns, `importance`, `pruned`, and `down_weighted` with `suspect_weight`."""
        return {name: self._global_column(name, column) for name, column in self._local_columns().items()}

    def gather(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Update the columns of the other processes. A collective operation; `add_up` sums over processes."""
        shard, mine = self._sampler.shard, self._local_columns()
        if shard.index is None:
            return
        whole = torch.zeros(len(mine), shard.length)
        whole[:, shard.index] = torch.stack([column.float() for column in mine.values()])
        whole = add_up(whole)
        self._gathered = dict(zip(mine, whole, strict=True))
        if not self._first:
            self._gathered = {"importance": self._gathered["importance"].clone()}

    def _local_columns(self) -> dict[str, Tensor]:
        record = self._sampler.record
        recorded = {} if record is None else record.columns()
        columns = {**recorded, "importance": self._sampler.importances, "pruned": self._sampler.pruned}
        suspects = self._sampler.suspects
        return columns if suspects is None else columns | {"down_weighted": suspects.flagged}

    def _global_column(self, name: str, mine: Tensor) -> Tensor:
        shard = self._sampler.shard
        if shard.index is None:
            return mine.clone()
        unknown = torch.nan if mine.is_floating_point() else 0
        whole = self._gathered.get(name, torch.full((shard.length,), unknown)).to(mine.dtype, copy=True)
        return whole.index_copy_(0, shard.index, mine)
