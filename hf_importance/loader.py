"""Loaders of the training data: one for the training loop, which carries draws, and one to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Sampler

from hf_importance.data import DRAW_KEY, ImportanceCollator, ImportanceDataset
from hf_importance.randomness import isolated_randomness
from hf_importance.sampling.draw import Draw
from hf_importance.sampling.sampler import ImportanceBatchSampler

_WORKER_SETTINGS = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "multiprocessing_context",
    "prefetch_factor",
    "in_order",
    "timeout",
    "worker_init_fn",
)


class _LazySampler(Sampler[Draw]):
    """Makes a sampler where it is iterated, so that a loader to look at holds nothing of all examples."""

    def __init__(self, make: Callable[[], ImportanceBatchSampler]) -> None:
        self._make, self._length = make, len(make())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Draw]:
        return iter(self._make())


class PreviewLoader(DataLoader):
    """Batches as the first pass draws them, without their draws. To look at them changes nothing in training.

    Args:
        base: the loader whose data and settings it has.
        new_sampler: makes one that training does not use.
        device: to which the batches are sent.
    """

    def __init__(
        self, base: DataLoader, new_sampler: Callable[[], ImportanceBatchSampler], device: torch.device
    ) -> None:
        super().__init__(**_settings(base, _LazySampler(new_sampler)), generator=torch.Generator().manual_seed(0))
        self._device = device
        self.total_batch_size = getattr(base, "total_batch_size", base.batch_size)  # of all processes
        self.total_dataset_length = len(base.dataset)

    def __iter__(self) -> Iterator[Any]:
        """An epoch."""
        iterator, number = super().__iter__(), 0
        while True:
            with isolated_randomness(seed=number, owners=(self.dataset, self.collate_fn)):
                batch = next(iterator, None)
            if batch is None:
                return
            batch.pop(DRAW_KEY)
            yield send_to_device(batch, self._device)
            number += 1


def training_loader(base: DataLoader, sampler: ImportanceBatchSampler, accelerator: Accelerator) -> DataLoader:
    """The loader of `Trainer` with our sampler, its data set and collator wrapped to carry the draws."""
    generator = _generator_of_worker_seeds() if base.persistent_workers else None
    loader = prepare_data_loader(  # `accelerator.prepare` would deal out the draws of one process to all of them
        DataLoader(**_settings(base, sampler), generator=generator),
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=None,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )
    accelerator._dataloaders.append(loader)
    return loader


def _settings(base: DataLoader, sampler: Sampler[Draw]) -> dict[str, Any]:
    return {
        "dataset": ImportanceDataset(base.dataset),
        "batch_sampler": sampler,
        "collate_fn": ImportanceCollator(base.collate_fn),
        **{name: getattr(base, name) for name in _WORKER_SETTINGS},
    }


def _generator_of_worker_seeds() -> torch.Generator:
    """For persistent workers, which are seeded once, by a random number that is taken at the first iteration.

    A resumed run has that in another epoch, and would be one number of the global generator off from there on.
    """
    return torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
