"""Per-example columns of this process, and gathered from all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from hf_importance.sampling.draw import Shard
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

    def gather(self, timeout: float) -> None:
        """Update the columns of the other processes. A collective operation of all processes, on the CPU.

        Each process sends the columns of its own examples to the main process, and receives all importances from it.

        Args:
            timeout: seconds that processes wait for each other, if a process group for CPU tensors must be created.
        """
        shard, mine = self._sampler.shard, self._local_columns()
        if shard.index is None:
            return
        group, sent = _cpu_group(timeout), _packed(shard, mine)
        received = [torch.empty_like(sent) for _ in range(shard.ranks)] if self._first else None
        dist.gather(sent, received, dst=0, group=group)
        self._gathered = _unpacked(received, mine, shard.length) if self._first else {}
        importance = self._gathered.setdefault("importance", torch.empty(shard.length))
        dist.broadcast(importance, src=0, group=group)

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


def _packed(shard: Shard, columns: Mapping[str, Tensor]) -> Tensor:
    """Positions and columns of the examples of a shard, int32 `[1 + columns, examples]`.

    The bits of float32 are kept, as sums would not keep NaN. Shards have the same size, with positions −1 at the end.
    """
    rows = torch.stack([_bits(column) for column in (shard.index, *columns.values())])
    missing = -(-shard.length // shard.ranks) - len(shard)
    return torch.nn.functional.pad(rows, (0, missing), value=-1)


def _unpacked(shards: Sequence[Tensor], columns: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Columns of all examples, from the result of [`_packed`] for each shard; `columns` has the types."""
    rows = torch.cat(shards, 1)
    rows = rows[:, rows[0] >= 0]
    whole = torch.empty(len(columns), length, dtype=torch.int32)
    whole[:, rows[0].long()] = rows[1:]
    return {
        name: row.view(column.dtype) if column.is_floating_point() else row.to(column.dtype)
        for row, (name, column) in zip(whole, columns.items(), strict=True)
    }


def _bits(column: Tensor) -> Tensor:
    return column.view(torch.int32) if column.is_floating_point() else column.int()


def _cpu_group(timeout: float) -> dist.ProcessGroup:
    """A group of all processes for CPU tensors: the default one, or another beside it if that is of NCCL."""
    return dist.group.WORLD if "cpu:" in dist.get_backend_config() else _gloo_group(dist.group.WORLD, timeout)


@lru_cache(maxsize=1)
def _gloo_group(world: dist.ProcessGroup, timeout: float) -> dist.ProcessGroup:
    """Created once for each default group: groups keep connections between all processes."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
