"""Dataloaders of the training data: one for the training loop, which carries draws, and one for previews."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Sampler

from hf_importance.data.dataset import DRAW_KEY, ImportanceCollator, ImportanceDataset
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
    """Creates its sampler when it is iterated, so a preview dataloader holds no per-example memory."""

    def __init__(self, make: Callable[[], ImportanceBatchSampler]) -> None:
        self._make, self._length = make, len(make())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Draw]:
        return iter(self._make())


class PreviewLoader(DataLoader):
    """Batches as in the first pass, without their draws. Iterating over them does not affect training.

    Args:
        base: dataloader that provides the data and the settings.
        new_sampler: creates a sampler that training does not use.
        device: device that the batches are sent to.
    """

    def __init__(
        self, base: DataLoader, new_sampler: Callable[[], ImportanceBatchSampler], device: torch.device
    ) -> None:
        super().__init__(**_settings(base, _LazySampler(new_sampler)), generator=torch.Generator().manual_seed(0))
        self._device = device
        self.total_batch_size = getattr(base, "total_batch_size", base.batch_size)  # over all processes
        self.total_dataset_length = len(base.dataset)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over one epoch."""
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
    """The dataloader of `Trainer` with our sampler, and dataset and collator wrapped to carry the draws."""
    generator = _generator_of_worker_seeds() if base.persistent_workers else None
    loader = prepare_data_loader(  # `accelerator.prepare` would distribute the draws of one process over all of them
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
    """Generator for persistent workers, which are seeded once, with a random number drawn at the first iteration.

    A resumed run has its first iteration in another epoch; without this its global generator would be one draw off.
    """
    return torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
