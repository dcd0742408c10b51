"""Per-example columns of this process, and gathered from all processes."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from hf_importance.sampling.sampler import ImportanceBatchSampler

_REUSED = "for_another_training"


class Columns:
    """Columns of all examples: current for those of this process, as last gathered for the others.

    Reading them requires no communication. The `first` process keeps all columns, the others only the importances.
    """

    def __init__(self, sampler: ImportanceBatchSampler, first: bool) -> None:
        self._sampler, self._first = sampler, first
        self._gathered: dict[str, Tensor] = {}

    @property
    def importances(self) -> Tensor:
        """Importances, float32 `[examples]`, NaN where unknown."""
        return self._of_all_examples("importance", self._sampler.memory.importances)

    @property
    def for_another_training(self) -> Tensor:
        """Importances to start another training with, float32 `[examples]`, NaN where unknown."""
        return self._of_all_examples(_REUSED, self._sampler.for_another_training)

    def all_columns(self) -> dict[str, Tensor]:
        """`[examples]` each: recorded columns, `importance`, `pruned`, and `down_weighted` with `suspect_weight`."""
        return {name: self._of_all_examples(name, column) for name, column in self._local_columns().items()}

    def gather(self, timeout: float) -> None:
        """Update the columns of the other processes. A collective operation of all processes, on the CPU.

        Each process sends the columns of its own examples to the main process, and receives all importances from it.
        They are sent as int32 `[1 + columns, examples]`: positions, then the columns, of which float32 keep their bits.
        Shards are padded to the same size with the position −1. `timeout` is in seconds.
        """
        shard = self._sampler.shard
        local = self._local_columns() | {_REUSED: self._sampler.for_another_training}
        if shard.index is None:
            return
        group = _cpu_group(dist.group.WORLD, timeout)
        own = (shard.index, *local.values())
        rows = [column.view(torch.int32) if column.is_floating_point() else column.int() for column in own]
        sent = pad(torch.stack(rows), (0, -(-shard.length // shard.ranks) - len(shard)), value=-1)
        received = [torch.empty_like(sent) for _ in range(shard.ranks)] if self._first else None
        dist.gather(sent, received, dst=0, group=group)
        if self._first:
            position, *columns = torch.cat(received, 1)
            shown = position >= 0
            for name, column in zip(local, columns, strict=True):
                kind, whole = local[name].dtype, torch.empty(shard.length, dtype=torch.int32)
                whole[position[shown].long()] = column[shown]
                self._gathered[name] = whole.view(kind) if kind.is_floating_point else whole.to(kind)
        importance = self._gathered.setdefault("importance", torch.empty(shard.length, dtype=torch.float32))
        dist.broadcast(importance, src=0, group=group)

    def _local_columns(self) -> dict[str, Tensor]:
        record, suspects = self._sampler.record, self._sampler.suspects
        columns = {} if record is None else record.columns()
        columns |= {"importance": self._sampler.memory.importances, "pruned": self._sampler.pruned}
        return columns if suspects is None else columns | {"down_weighted": suspects.flagged}

    def _of_all_examples(self, name: str, local: Tensor) -> Tensor:
        shard = self._sampler.shard
        if shard.index is None:
            return local.clone()
        unknown = torch.nan if local.is_floating_point() else 0
        whole = self._gathered.get(name, torch.full((shard.length,), unknown)).to(local.dtype, copy=True)
        return whole.index_copy_(0, shard.index, local)


@lru_cache(maxsize=1)  # groups keep connections between all processes
def _cpu_group(world: dist.ProcessGroup, timeout: float) -> dist.ProcessGroup:
    """A group of all processes for CPU tensors: the default one, or another beside it if that is of NCCL."""
    if "cpu:" in dist.get_backend_config():
        return world
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
