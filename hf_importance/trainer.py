"""The hooks into `Trainer`: draws in, importances out. Everything else is unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_importance.adapters.base import ComputeLoss, LossAdapter
from hf_importance.adapters.known import adapted_class, adapter_of
from hf_importance.checkpoint import explaining_errors, load_states, newest_complete, resume, save_state
from hf_importance.columns import Columns
from hf_importance.config import ImportanceConfig
from hf_importance.data import LABEL_COLUMNS, mean_over_examples, refuse_texts_as_labels
from hf_importance.fingerprint import fingerprint
from hf_importance.lengths import Lengths, find_lengths, name_of_tokens
from hf_importance.loader import PreviewLoader, training_loader
from hf_importance.losses.first_batch import without_peft
from hf_importance.losses.heads import Labels, PerExampleLoss
from hf_importance.losses.objective import Measured, Objective
from hf_importance.randomness import isolated_randomness
from hf_importance.record import VisitRecord, suspects
from hf_importance.report.hooks import ReportMixin
from hf_importance.report.logs import limit_console_logs
from hf_importance.report.tokens import Token, token_losses
from hf_importance.report.training import Training
from hf_importance.sampling.draw import Draw, Shard
from hf_importance.sampling.memory import ImportanceMemory, unimportant
from hf_importance.sampling.rates import per_cost
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.suspects import SuspectWeights
from hf_importance.schedule import EffectiveEpochs, EffectiveProgress, follow, unwrapped
from hf_importance.step import StepDraws
from hf_importance.support import (
    TrainingWatch,
    refuse_arguments,
    refuse_loader,
    refuse_overrides,
    refuse_training,
    refuse_version,
    seed_of,
    unmeasured,
)

logger = logging.get_logger(__name__)

refuse_version()


class ImportanceTrainerMixin(ReportMixin):
    """Online importance sampling for a subclass of `Trainer`. It must come first in the bases.

    Args:
        importance: the settings, available as `importance_config`; by default `ImportanceConfig()`.
        per_example_loss_func: `f(outputs, labels) -> Tensor[batch]`, for a loss other than the usual cross-entropy,
            binary cross-entropy or squared error of a classification or regression head. It must be computed from the
            outputs of the model, such as `outputs["logits"]`, independently for each example. `labels` are the collated
            labels, a dict if the model has several label names, or the inputs of the model if there are none. If the
            function has a third argument without a default, or an argument `inputs`, it also gets the inputs of the
            model, without the labels. It is also used in evaluation. Its mean is over all examples of a batch,
            including those with loss 0.
        report_examples_to_hub: whether `push_to_hub` may upload the full report, which shows training examples with
            their labels and predictions; by default, only importances and plots are uploaded.
        *args, **kwargs: as for `Trainer`.

    Raises:
        ValueError: for unsupported arguments, at construction or, if necessary, at the first step. The message names
            the cause and the fix.
    """

    def __init__(
        self,
        *args: Any,
        importance: ImportanceConfig | None = None,
        per_example_loss_func: PerExampleLoss | None = None,
        report_examples_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        adapted = adapted_class(type(self))
        self._start_measuring()
        super().__init__(*args, **kwargs)
        self.importance_config = ImportanceConfig() if importance is None else importance
        self.per_example_loss_func = per_example_loss_func
        self.report_examples_to_hub = report_examples_to_hub
        self.loss_is_scaled_for_ga = False  # the loss is a mean over the micro-batch
        self._schedule_passed = self.lr_scheduler  # passed in `optimizers`
        self._adapter: LossAdapter | None = None
        refuse_arguments(self)
        if adapted is not None and self.train_dataset is not None:
            self._adapter = adapter_of(self, adapted)  # before general checks: its messages are more specific
        self._refuse_unsupported()
        if per_example_loss_func is not None and not self.label_names:
            self._find_label_names()
        self.callback_handler.callbacks.insert(0, TrainingWatch(self, ImportanceTrainerMixin))
        self._effective: EffectiveEpochs | None = None
        if self.importance_config.budget == "auto":
            self._effective = EffectiveEpochs(self._sum_over_processes, self._say)
            self.add_callback(self._effective)
            for bar in list(self.callback_handler.callbacks):
                if type(bar) is ProgressCallback:  # subclasses, written by users, are kept
                    self.remove_callback(bar)
                    self.add_callback(EffectiveProgress(self._effective))
        limit_console_logs(self.callback_handler.callbacks, EffectiveProgress)

    def _refuse_unsupported(self) -> None:
        refuse_arguments(self)
        if self.train_dataset is not None:
            refuse_training(self, self._schedule_passed)
            refuse_overrides(type(self), ImportanceTrainerMixin, self.per_example_loss_func is not None)

    def _find_label_names(self) -> None:
        """Set `label_names` for a model whose `forward` has no labels, if the data has labels for the loss function."""
        data = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        with isolated_randomness(owners=(data,)):
            example = data[0] if hasattr(data, "__getitem__") and not isinstance(data, dict) and len(data) else {}
        if isinstance(example, Mapping) and set(LABEL_COLUMNS) & set(example):
            self.label_names = ["labels"]
        else:
            self.can_return_loss = True  # otherwise `Trainer` does not evaluate the loss

    def _start_measuring(self) -> None:
        self._examples_to_show = None
        self._sampler: ImportanceBatchSampler | None = None
        self._objective: Objective | LossAdapter | None = None
        self._loop_wants_loader = False
        self._loop_loader: DataLoader | None = None
        self._trained: nn.Module | None = None  # the model of the current step
        self._step = StepDraws([])
        self._mean_over_examples: Callable[..., float] | None = None
        self._mean_positions: float | None = None
        self._columns: Columns | None = None
        self._reported: Training | None = None
        self._draw: Draw | None = None  # of the current batch
        self._data_fingerprint: dict[str, Any] | None = None  # see `_fingerprint`
        self._lengths: Lengths | None = None

    # ---- the training data -------------------------------------------------------------------------------------------

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

    # ---- the training step -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train like `Trainer.train`. Every call starts with an empty memory, or with that of the checkpoint.

        `resume_from_checkpoint=True` selects the newest complete checkpoint. `ignore_data_skip` has no effect, because
        skipping batches does not load any data.
        """
        self._refuse_unsupported()
        self._start_measuring()
        if self._effective is not None:
            self._effective.progress = None
        ignored, self.args.ignore_data_skip = self.args.ignore_data_skip, False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = ignored
            self._step, self._loop_wants_loader, self._loop_loader = StepDraws([]), False, None
            if self._sampler is not None:
                self._sampler.flush(everything=True)
            if self._objective is not None:
                self._objective.close()
        self._columns.gather(self._sum_on_device)
        self._summarise()
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Get the batches of a step like `Trainer`, and separate the draws from them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = StepDraws(batches)
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a training step like `Trainer`, for the batch of a draw."""
        self._draw, self._trained = self._step.of(inputs, self._sampler.is_outstanding), model
        self._sampler.mark_used(self._draw)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
            if not self._step.has_measured(self._draw):
                raise unmeasured(type(self), ImportanceTrainerMixin)
            return loss
        finally:
            self._draw = self._trained = None

    def _has_measured(self) -> bool:
        """Whether any batch of this step was measured; for [`TrainingWatch`]."""
        return self._step.has_measured()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """In a training step, the mean of weight · loss over the batch.

        Elsewhere, the mean of `per_example_loss_func`, or `Trainer.compute_loss` if there is none.
        """
        if self._draw is None and self.per_example_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._draw is None:
            inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}  # Liger: keep logits
            loss, outputs = self._get_objective().evaluate(model, inputs, self._pop_labels(inputs))
        else:
            measured = self._measure(partial(super().compute_loss, return_outputs=return_outputs), model, dict(inputs))
            again = self._step.has_measured(self._draw)
            if model is self._trained and not again:  # not a teacher model in distillation
                self._store_measurement(self._draw, measured)
            weight = torch.tensor(self._draw.weight, dtype=measured.losses.dtype)
            weight = weight.to(measured.losses.device, non_blocking=True)
            if measured.are_sums:
                loss = self._loss_of_sums(measured, weight, *self._labels_in(inputs))
            else:
                loss = measured.weighted_mean(weight)
            outputs = measured.outputs
        return (loss, outputs) if return_outputs else loss

    def _measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]) -> Measured:
        """Measure a batch of a training step. `compute_loss` is that of the next class in the MRO."""
        objective = self._get_objective()
        if isinstance(objective, LossAdapter):
            return objective(compute_loss, model, inputs, self._draw)
        labels = self._pop_labels(inputs)
        return objective(model, inputs, labels, len(self._draw.index))

    def _loss_of_sums(self, measured: Measured, weight: Tensor, label: str) -> Tensor:
        """Loss over the tokens or pixels of the whole step, or over their mean n̄ if batches have no labels."""
        positions = self._positions_of_step(label)
        self.loss_is_scaled_for_ga = positions is not None
        if self.loss_is_scaled_for_ga:
            return measured.weighted_mean(weight, positions, 1 / len(self._step))
        if len(self._step) > 1:
            if self._mean_positions is None:
                self._mean_positions = self._mean_over_examples(label, self._get_objective().count)
            positions = torch.tensor(self._mean_positions * len(weight))
        return measured.weighted_mean(weight, positions)

    def _positions_of_step(self, label: str) -> Tensor | None:
        """See [`StepDraws.positions`]; averaged over processes if `average_tokens_across_devices`, as in `Trainer`."""
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1

        def mean(total: Tensor) -> Tensor:
            return self._sum_over_processes(total.to(self.args.device)) / processes

        return self._step.positions(label, self._get_objective().count, mean if processes > 1 else None)

    def _get_objective(self) -> Objective | LossAdapter:
        """Created at its first use, when the engine has wrapped the model."""
        if self._objective is None:
            self._objective = self._new_objective()
        return self._objective

    def _new_objective(self) -> Objective | LossAdapter:
        if self._adapter is not None:
            self._adapter.start()
            return self._adapter
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        classes = type(without_peft(self.model)).__mro__  # FSDP2 inserts a class before that of the model
        names = {cls.__name__ for cls in classes}
        causal = not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        return Objective(
            self.model,
            self.importance_config.metric,
            smoothing,
            self.per_example_loss_func,
            causal or (not smoothing and self._loss_shifts_labels),  # with smoothing, `Trainer` only checks the former
        )

    def _labels_in(self, inputs: dict[str, Any]) -> list[str]:
        return [name for name in self.label_names or ["labels"] if name in inputs]

    def _pop_labels(self, inputs: dict[str, Any]) -> Labels:
        names = self._labels_in(inputs)
        if not names and (self.per_example_loss_func is None or self.label_names):
            refuse_texts_as_labels(self.train_dataset[0])
            raise ValueError(
                f"The batch must have {self.label_names or ['labels']}, but only has {list(inputs)}: rename the label "
                "column or set label_names in TrainingArguments, and keep the labels in the batch in overrides. For a "
                "model that is trained without labels, pass per_example_loss_func=f with f(outputs, inputs) -> "
                "Tensor[batch]."
            )
        labels = {name: inputs.pop(name) for name in names}
        if not any(isinstance(value, Tensor) for value in inputs.values()):
            inputs.update(labels)  # inputs that the model reconstructs, as in masked image modelling
        return labels

    # ---- importances -------------------------------------------------------------------------------------------------

    @property
    def importances(self) -> Tensor:
        """Importances of `train_dataset`, float32 `[examples]`, NaN where unknown; suspects times `suspect_weight`.

        With several processes, those of other processes are as of the last checkpoint or the end of training, so that
        reading them requires no communication. During training on a GPU they lag one step behind.

        Raises:
            ValueError: if there is no training data.
        """
        if self.train_dataset is None:
            raise ValueError("importances requires train_dataset, but it is None: pass it to ImportanceTrainer.")
        if self._sampler is None:
            return torch.full((len(self.train_dataset),), torch.nan)
        return self._columns.importances

    @property
    def kept_indices(self) -> Tensor:
        """Indices into `train_dataset` for `dataset.select`, without the least important examples; int64, ascending.

        It excludes the examples that together hold less than `prune_mass` of the `importances`; per token, if losses
        are sums over tokens.
        """
        tokens = None if self._lengths is None or self._lengths.tokens is None else self._lengths.tokens.float()
        importance = per_cost(self.importances, tokens)
        if self._sampler is not None and self._sampler.suspects is not None:  # their importance was scaled
            importance[self._reported.columns()["down_weighted"]] = torch.nan
        return (~unimportant(importance, self.importance_config.prune_mass)).nonzero().flatten()

    @property
    def suspects(self) -> Tensor:
        """Indices of the examples of `train_dataset` whose label is probably wrong, int64 `[suspects]`, ascending.

        With several processes, the main process has those of all, as of the last checkpoint or the end of training.

        Raises:
            ValueError: before training, and with `record=False`.
        """
        if self._reported is None or not self._reported.has_record:
            raise ValueError(
                "suspects requires train() with ImportanceConfig(record=True), but no visits were recorded."
            )
        return suspects(self._reported.columns()).nonzero().flatten()

    def _training(self) -> Training | None:
        return self._reported

    def _token_losses(self, index: list[int]) -> dict[int, list[Token]]:
        """See [`token_losses`]. Empty with several processes, because forward passes need all of them."""
        if self.args.world_size > 1 or not hasattr(self.processing_class, "decode"):
            return {}
        base, shifts = self._base_loader(), self._get_objective().shifts
        given = (self.model, base.dataset, base.collate_fn, self._prepare_inputs, self.processing_class, shifts)
        return token_losses(*given, index)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _sum_on_device(self, values: Tensor) -> Tensor:
        """Sum CPU tensors over processes on the device, because not every backend supports the CPU."""
        return self._sum_over_processes(values.to(self.accelerator.device)).cpu()

    def _store_measurement(self, draw: Draw, measured: Measured) -> None:
        """Pass the measurements of a batch to the sampler, asynchronously from a GPU.

        They are one tensor, `[1, batch]` or `[5, batch]`: the importances, and the rows to be recorded.
        """
        self._step.mark_measured(draw)
        rows = measured.importance.float()[None]
        if self.importance_config.record:
            rows = torch.cat([rows, measured.observed])
        arrived = None
        if rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self._sampler.update(draw, rows.cpu(), arrived)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """Also save the importance state of every rank, before `Trainer` marks the checkpoint as complete."""
        super()._save_rng_state(output_dir)
        if self._sampler is None:
            return
        state = {
            "settings": self._settings(),
            "data": self._fingerprint(),
            "sampler": self._sampler.state_dict(),
            "effective": None if self._effective is None else self._effective.state_dict(),
            "objective": self._get_objective().state_dict(),
            "reported": self._reported.state_dict(),
        }
        save_state(output_dir, self.args.process_index, self.args.world_size, state)
        self._columns.gather(self._sum_on_device)
        self.accelerator.wait_for_everyone()

    def _settings(self) -> dict[str, Any]:
        """Settings that must be equal to resume exactly."""
        settings = asdict(self.importance_config) | {"seed": seed_of(self.importance_config, self.args)}
        settings["budget"] = 1.0 if self.importance_config.budget == "auto" else self.importance_config.budget
        return {name: value for name, value in settings.items() if name != "record"}

    def _fingerprint(self) -> dict[str, Any]:
        if self._data_fingerprint is None:
            self._data_fingerprint = fingerprint(self.train_dataset, {*LABEL_COLUMNS, *self.label_names})
        return self._data_fingerprint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also load the importance state; at this point the sampler exists, but nothing was drawn."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        accumulation = self.args.gradient_accumulation_steps
        done = self.state.global_step
        skip = done % self._steps_per_epoch * accumulation  # `Trainer` skips these batches later
        states = load_states(checkpoint)
        rank, data = self.args.process_index, self._fingerprint()
        with explaining_errors(checkpoint):
            dropped = resume(self._sampler, states, rank, skip, data, self._settings())
            if dropped is None:
                self._reported.load_state_dict(states[rank]["reported"])
                self._get_objective().load_state_dict(states[rank]["objective"])
            if self._effective is not None:
                self._resume_effective(states, done, exactly=dropped is None)
        if dropped:
            logger.warning(f"{checkpoint} {dropped}")

    def _resume_effective(self, states: list[dict[str, Any]], done: int, exactly: bool) -> None:
        rank = self.args.process_index if exactly else 0
        if states and states[rank]["effective"] is not None:
            self._effective.load_state_dict(states[rank]["effective"], exactly)
            if not exactly:  # steps may differ in size: count at least those of `Trainer`
                self._effective.progress.value = max(self._effective.progress.value, float(done))
        else:  # without budget="auto", each step counted as one
            self._effective.progress.value = float(done)
        if self._effective.progress.finished:
            self._sampler.end()

    def _newest_checkpoint(self) -> str | bool:
        newest = newest_complete(self.args.output_dir)
        if newest is not None:
            return str(newest)
        if get_last_checkpoint(self.args.output_dir) is None:
            return True  # no checkpoint at all: `Trainer` raises an error
        logger.warning(f"{self.args.output_dir} has no complete checkpoint: training starts from scratch.")
        return False


class ImportanceTrainer(ImportanceTrainerMixin, Trainer):
    """`Trainer` with online importance sampling. It takes the arguments of both, see [`ImportanceTrainerMixin`]."""
