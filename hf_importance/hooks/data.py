"""The hooks for the training data: dataloader, sampler, and the schedule that follows them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hf_importance.config import ImportanceConfig
from hf_importance.data.dataset import LABEL_COLUMNS, mean_over_examples
from hf_importance.data.fingerprint import fingerprint
from hf_importance.data.lengths import Lengths, find_lengths, name_of_tokens
from hf_importance.data.loader import PreviewLoader, training_loader
from hf_importance.report.columns import Columns
from hf_importance.report.training import Training
from hf_importance.run.overrides import refuse_loader
from hf_importance.run.schedule import EffectiveEpochs, follow, unwrapped
from hf_importance.run.step import StepDraws
from hf_importance.run.validation import seed_of
from hf_importance.sampling.draw import Shard
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.suspects import SuspectWeights


class DataMixin:
    """The part of [`trainer.ImportanceTrainerMixin`] for the training data."""

    importance_config: ImportanceConfig
    _effective: EffectiveEpochs | None

    def _start_data(self) -> None:
        """Reset the state of a training run."""
        self._sampler: ImportanceBatchSampler | None = None
        self._loop_wants_loader = False
        self._loop_loader: DataLoader | None = None
        self._columns: Columns | None = None
        self._reported: Training | None = None
        self._lengths: Lengths | None = None
        self._data_fingerprint: dict[str, Any] | None = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._loop_wants_loader, self._loop_loader = True, None
        return super()._inner_training_loop(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The training dataloader. Outside of the training loop, a preview that does not affect training."""
        if self._loop_loader is not None and self._loop_wants_loader:  # an override calls it twice
            return self._loop_loader
        base = self._base_loader()
        if not self._loop_wants_loader:
            return PreviewLoader(base, partial(self._new_sampler, records=False), self.args.device)
        self._step = StepDraws([])
        self._sampler = self._new_sampler(self._sampler)
        self._mean_over_examples = partial(mean_over_examples, base.dataset, base.collate_fn)
        self._columns = Columns(self._sampler, self.is_world_process_zero())
        has_lengths = self._lengths.length is not None
        self._reported = Training(self._sampler, self._columns, self._effective, has_lengths, self._token_losses)
        if self.args.save_strategy != "no":
            self._fingerprint()  # before `set_epoch` or others change the dataset
        self._loop_loader = training_loader(base, self._sampler, self.accelerator)
        return self._loop_loader

    def _preview_loader(self) -> DataLoader:
        """A preview dataloader for callbacks, see [`TrainingWatch`]. Called once the training loop has its own."""
        if self._sampler is None:
            raise ValueError(
                "The training loop uses a dataloader that ImportanceTrainer.get_train_dataloader() did not create for "
                "this call of train(): an override must call super().get_train_dataloader() every time."
            )
        self._loop_wants_loader, self._loop_loader = False, None
        return PreviewLoader(self._base_loader(), partial(self._new_sampler, records=False), self.args.device)

    def _base_loader(self) -> DataLoader:
        """The dataloader of `Trainer`, which provides dataset, collator and settings."""
        args, loaders = self.args, self.accelerator._dataloaders
        strategy, args.train_sampling_strategy = args.train_sampling_strategy, "random"  # our sampler groups
        try:
            base = super().get_train_dataloader()
        finally:
            args.train_sampling_strategy = strategy
        loaders[:] = [loader for loader in loaders if loader is not base]
        refuse_loader(base, type(self), self._train_batch_size, args.dataloader_drop_last, len(self.train_dataset))
        if self._lengths is None:
            self._lengths = self._find_lengths(base)
        return base

    @property
    def _groups_by_length(self) -> bool:
        return self.args.train_sampling_strategy == "group_by_length"

    def _find_lengths(self, base: DataLoader) -> Lengths:
        args, config = self.args, getattr(self.model, "config", None)
        return find_lengths(
            self.train_dataset,
            base,
            (args.length_column_name, name_of_tokens(self.processing_class)),
            labels=self.label_names or ["labels"],
            is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
            grouped=self._groups_by_length,
            own_loss=self.per_example_loss_func is not None,
            prunes=self.importance_config.prune_mass > 0,
            quiet=args.disable_tqdm or not self.is_world_process_zero(),
        )

    def _new_sampler(
        self, before: ImportanceBatchSampler | None = None, records: bool = True
    ) -> ImportanceBatchSampler:
        """Create a sampler, with the memory of the one `before` it in an earlier attempt of `auto_find_batch_size`."""
        config, args = self.importance_config, self.args
        seed = seed_of(config, args)
        shard = Shard.of(len(self.train_dataset), args.process_index, args.world_size, seed)
        if before is None:
            cost = None if config.metric == "uniform" else self._lengths.cost(shard)
            memory = ImportanceMemory(len(shard), config.memory_momentum, cost, self._lengths.tokens_of(shard))
            record = VisitRecord(len(shard)) if config.record and records else None
        else:
            memory, record = before.memory, before.record
            if before.suspects is not None:
                memory.scale(before.suspects.flagged, torch.nan)
        suspects = None
        if record is not None and config.suspect_weight < 1:
            classes = getattr(getattr(self.model, "config", None), "num_labels", None)
            given = (config.suspect_weight, config.suspects_from, self._effective_epochs, classes)
            suspects = SuspectWeights(len(shard), *given)
        groups = None
        if self._groups_by_length:
            groups = self._lengths.groups(shard, self._train_batch_size, args.gradient_accumulation_steps)
        sampler = ImportanceBatchSampler(
            memory,
            self._train_batch_size,
            shard=shard,
            rank=args.process_index,
            sampling=config.sampling,
            weight_exponent=config.weight_exponent,
            budget=1.0 if config.budget == "auto" else config.budget,
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
                f"dataloader_drop_last=True leaves no batch: a process has {sampler.visits_per_epoch} visits per "
                f"epoch, fewer than the batch size {sampler.batch_size}. Reduce the batch size, or set it to False."
            )
        return sampler

    def _effective_epochs(self) -> float:
        """Effective epochs so far, or epochs if all steps count as one."""
        progress = None if self._effective is None else self._effective.progress
        return self.state.global_step / self._steps_per_epoch if progress is None else progress.epochs

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._sampler) // self.args.gradient_accumulation_steps)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the schedule like `Trainer`; with `budget="auto"` it follows the effective steps."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._effective is not None and self._sampler is not None:
            self._effective.start(self.model, self._sampler, num_training_steps, self._steps_per_epoch)
            follow(unwrapped(scheduler), self._effective)
        return scheduler

    def _fingerprint(self) -> dict[str, Any]:
        if self._data_fingerprint is None:
            self._data_fingerprint = fingerprint(self.train_dataset, {*LABEL_COLUMNS, *self.label_names})
        return self._data_fingerprint
