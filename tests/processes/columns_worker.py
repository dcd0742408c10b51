"""Gathers columns in one of three processes, and writes what each rank has to a file.

torchrun --nproc_per_node 3 tests/processes/columns_worker.py FOLDER
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from hf_importance.report.columns import Columns
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import OBSERVED, VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.shard import Shard

EXAMPLES = 10  # 4 + 3 + 3
BACKENDS = ("gloo", "cuda:gloo")  # the second has no group for CPU tensors, like NCCL
OPERATIONS = ("gather", "broadcast", "all_reduce", "all_gather", "new_group")


def states_of(examples):
    """Importances and record of examples: NaN for some, and visits that float32 cannot represent."""
    importance = examples / 3.0
    importance[examples % 4 == 1] = torch.nan
    seen = examples + torch.arange(len(OBSERVED))[:, None] / 7.0
    seen[:, examples % 5 == 2] = torch.nan
    visits = (2**24 + 1 + 2 * examples).int()
    record = VisitRecord(len(examples)).state_dict() | {"seen": seen, "visits": visits, "total_loss": visits * 0.3}
    return importance, record


def sampler_of(shard):
    importance, state = states_of(torch.arange(EXAMPLES) if shard.index is None else shard.index)
    memory, record = ImportanceMemory(len(shard)), VisitRecord(len(shard))
    memory.load_state_dict({"importance": importance})
    record.load_state_dict(state)
    return ImportanceBatchSampler(memory, 2, shard=shard, record=record)


def counted(name, calls):
    """A function of `torch.distributed` that adds its name and the number of elements that it sends to a list."""
    original = getattr(dist, name)

    def call(*args, **kwargs):
        calls.append((name, *((x.numel(), x.device.type) for x in args[:1])))
        return original(*args, **kwargs)

    return call


def results_of(backend):
    """What a rank has before and after it gathers twice, and what it sends."""
    dist.init_process_group(backend)
    rank, ranks, calls = dist.get_rank(), dist.get_world_size(), []
    sampler = sampler_of(Shard.of(EXAMPLES, rank, ranks, seed=0))
    columns = Columns(sampler, rank == 0)
    before = columns.all_columns()
    with patch.multiple(dist, **{name: counted(name, calls) for name in OPERATIONS}):
        columns.gather(timeout=60)
        columns.gather(timeout=60)
    dist.destroy_process_group()
    results = {"columns": columns.all_columns(), "importances": columns.importances}
    results["for_another_training"] = columns.for_another_training
    return results | {"before": before, "index": sampler.shard.index, "calls": calls}


def main(folder):
    results = {backend: results_of(backend) for backend in BACKENDS}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
