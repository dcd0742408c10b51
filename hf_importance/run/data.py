"""What a run makes of its data: the sampler, the lengths of texts; the check of the collator."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_importance.data.combining import is_known, problem_of
from hf_importance.data.lengths import Lengths, has_token_losses, labels_of, lengths_of
from hf_importance.data.loader import sampler_of
from hf_importance.errors import UnweightedError
from hf_importance.run.validation import seed_of
from hf_importance.sampling.groups import LengthGroups
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.rates import relative_costs
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.shard import Shard
from hf_importance.sampling.suspects import SuspectWeights


def validate_collator(run: Any, base: DataLoader) -> None:
    """Check, in all processes, that rows of a batch can be weighted as their examples; see [`problem_of`].

    Raises:
        UnweightedError: if they cannot.
    """
    if run.is_adapted or is_known(base.collate_fn):
        return
    problem = problem_of(base.collate_fn, base.dataset, run.trainer._train_batch_size, run.label_names)
    if not run.all_agree(not problem):
        raise UnweightedError(problem or "another process has found a problem with the collator.")


def find_lengths(run: Any, base: DataLoader) -> Lengths:
    """Lengths of the training texts, as far as they determine the cost of a visit.

    Args:
        run: an `ImportanceRun`.
        base: the dataloader of `Trainer`, which has measured them if it groups texts by length.
    """
    trainer, args, dataset = run.trainer, run.args, base.dataset
    is_encoder_decoder = bool(getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False))
    are_sums = trainer.per_example_loss_func is None and has_token_losses(
        dataset, base.collate_fn, run.label_names, is_encoder_decoder
    )
    quiet = args.disable_tqdm or not trainer.is_world_process_zero()
    if groups_by_length(run):
        length = torch.tensor(list(sampler_of(base).lengths), dtype=torch.int32).clamp_(min=1)
    elif are_sums:
        length = lengths_of(dataset, args.length_column_name, quiet=quiet)
    else:  # padded to the longest of their batch, so their own length says little about their cost
        return Lengths()
    if not (are_sums and run.config.prune_mass > 0):
        return Lengths(length)
    return Lengths(length, labels_of(dataset, length, run.label_names[0], quiet))


def groups_by_length(run: Any) -> bool:
    """Whether batches are grouped by length."""
    return run.args.train_sampling_strategy == "group_by_length"


def new_sampler(run: Any, before: ImportanceBatchSampler | None) -> ImportanceBatchSampler:
    """Make the sampler of a run, with the memory of the one `before` it in an attempt of `auto_find_batch_size`.

    Raises:
        ValueError: if an epoch has no batch.
    """
    config, args, batch_size = run.config, run.args, run.trainer._train_batch_size
    seed, length, tokens = seed_of(config, args), run.lengths.length, run.lengths.tokens
    shard = Shard.of(len(run.trainer.train_dataset), args.process_index, args.world_size, seed)
    if before is None:
        cost = None if length is None or config.metric == "uniform" else relative_costs(shard.part(length))
        tokens = None if tokens is None else shard.part(tokens).float()
        memory = ImportanceMemory(len(shard), config.memory_momentum, cost, tokens)
        record = VisitRecord(len(shard)) if config.record else None
    else:
        memory, record = before.memory, before.record
        if before.suspects is not None:
            memory.scale(before.suspects.flagged, torch.nan)
    suspects = groups = None
    if config.suspect_weight < 1:
        classes = getattr(getattr(run.trainer.model, "config", None), "num_labels", None)
        start, epochs = config.suspects_from, run.effective_epochs
        suspects = SuspectWeights(len(shard), config.suspect_weight, start, epochs, classes)
    if groups_by_length(run):
        groups = LengthGroups(shard.part(length), batch_size, args.gradient_accumulation_steps, shard.length, seed)
    sampler = ImportanceBatchSampler(
        memory,
        batch_size,
        shard=shard,
        rank=args.process_index,
        sampling=config.sampling,
        weight_exponent=config.weight_exponent,
        visits_per_epoch=config.visits_per_epoch,
        drop_last=args.dataloader_drop_last,
        seed=seed,
        record=record,
        suspects=suspects,
        groups=groups,
        uniform_fraction=config.uniform_fraction,
        prune_mass=config.prune_mass,
        increment=config.importance_increment,
    )
    if not len(sampler):
        raise ValueError(
            f"dataloader_drop_last=True leaves no batch: a process has {sampler.visits_per_epoch} visits per epoch, "
            f"fewer than the batch size {batch_size}. Reduce the batch size, or set it to False."
        )
    return sampler
