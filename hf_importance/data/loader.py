"""The dataloader of the training loop."""

from collections.abc import Collection
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from hf_importance.data.dataset import ImportanceCollator, ImportanceDataset
from hf_importance.errors import UnweightedError

logger = logging.get_logger(__name__)
_OF_WORKERS = ("num_workers", "persistent_workers", "multiprocessing_context", "prefetch_factor", "worker_init_fn")
_SETTINGS = (*_OF_WORKERS, "pin_memory", "in_order", "timeout")
_REPLACED = (RandomSampler, SeedableRandomSampler, LengthGroupedSampler)
"""Samplers of `Trainer`, which ours takes the place of."""


def training_loader(
    base: DataLoader, sampler: Sampler, accelerator: Any, label_names: Collection[str] | None = None
) -> DataLoaderShard:
    """The dataloader of the training loop: that of `Trainer` with another sampler, and batches that carry their draws.

    The dataloader of `Trainer` itself is unchanged: callbacks and other code of users see their own dataset, collator
    and batch sampler in it. What they change there holds from the next epoch on, see [`take_over`]. The names of the
    labels are for [`ImportanceCollator`].
    """
    generator = None
    if base.persistent_workers:
        # They are seeded once, with a random number drawn at the first iteration. A resumed run has its first iteration
        # in another epoch; without a generator of their own, its global generator would be one draw off.
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    loader = DataLoader(
        ImportanceDataset(base.dataset),
        batch_sampler=sampler,
        collate_fn=ImportanceCollator(base.collate_fn, label_names),
        generator=generator,
        **{name: getattr(base, name) for name in _SETTINGS},
    )
    return prepare_data_loader(  # `accelerator.prepare` would distribute the draws of one process over all of them
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=None,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def take_over(loader: DataLoader, base: DataLoader) -> None:
    """Take over dataset and collator of the dataloader of `Trainer`, which users may have replaced."""
    loader.dataset.dataset, loader.collate_fn.collate = base.dataset, base.collate_fn


def validate_length(dataset: Any, length: int) -> None:
    """Check that a dataset that users may change between epochs has as many examples as when training started.

    Raises:
        ValueError: if it has fewer. More are told in a warning.
    """
    now = len(dataset)
    if now != length:
        message = (
            f"train_dataset had {length:,} examples when training started, and has {now:,} now, but the same examples "
            "are drawn from throughout a training: call train() again with the new data, or use Trainer."
        )
        if now < length:
            raise ValueError(message)
        logger.warning(f"{message} Those that are new are not drawn.")


def sampler_of(loader: DataLoader) -> Any:
    """The sampler of a dataloader of `Trainer`, inside the shards of accelerate."""
    batches = getattr(loader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)
    return getattr(batches, "sampler", batches)


def validate_loader(loader: Any, overrides: list[str], batch_size: int, drop_last: bool, length: int) -> None:
    """Check that the loader has no sampler, batches or iteration of its own, which ours would replace."""
    batches = getattr(loader, "batch_sampler", None)
    batches, sampler = getattr(batches, "batch_sampler", batches), sampler_of(loader)
    is_usual = isinstance(loader, DataLoader) and getattr(type(batches), "__iter__", None) is BatchSampler.__iter__
    if not is_usual or type(sampler) not in _REPLACED or getattr(sampler, "replacement", False):
        problem = f"uses the sampler {type(sampler).__name__}"
    elif len(sampler) != length or len(loader.dataset) != length:
        problem = f"draws {len(sampler)} of {len(loader.dataset)} examples, while train_dataset has {length}"
    elif (batches.batch_size, batches.drop_last) != (batch_size, drop_last):
        problem = f"has batches of {batches.batch_size} (drop_last={batches.drop_last}), unlike TrainingArguments"
    elif type(loader).__iter__.__module__.split(".")[0] not in ("torch", "accelerate"):
        problem = f"iterates with {type(loader).__name__}.__iter__"
    else:
        return
    raise UnweightedError(
        f"{' or '.join(overrides) or 'The training dataloader'} {problem}, which importance sampling would replace: "
        "change the dataset, the collator or TrainingArguments instead, or use Trainer."
    )
