"""The hooks into `Trainer`: draws in, importances out. Everything else of it stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_importance.checkpoint import load_states, newest_complete, resume, save_state
from hf_importance.config import ImportanceConfig
from hf_importance.data import DRAW_KEY, ImportanceCollator, ImportanceDataset, mean_over_examples
from hf_importance.objective import Measured, Objective, PerExampleLoss
from hf_importance.record import VisitRecord
from hf_importance.report.findings import Findings
from hf_importance.report.hooks import ReportMixin
from hf_importance.sampling.draw import Draw, Shard
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.schedule import EffectiveEpochs, EffectiveProgress, follow, refuse_schedule

logger = logging.get_logger(__name__)

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


def _generator_of_worker_seeds() -> torch.Generator:
    """For persistent workers, which are seeded once, by a random number that is taken at the first iteration.

    A resumed run has that in another epoch, and would be one number of the global generator off from there on.
    """
    return torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))


class ImportanceTrainerMixin(ReportMixin):
    """Online importance sampling for a subclass of `Trainer`; put it first among the bases.

    Args:
        importance: the settings, by default `ImportanceConfig()`.
        per_example_loss_func: `f(outputs, labels) -> Tensor[batch]`, for a loss that is not the usual cross-entropy,
            binary cross-entropy or squared error of a classification or regression head. It is computed from
            `outputs["logits"]` and does not couple the examples of a batch. `labels` is a tensor, or a dict of them if
            the model has several label names.
        report_examples_to_hub: let `push_to_hub` upload the whole report, in which training examples, their labels and
            predictions can be seen; by default only importances and plots.
        *args, **kwargs: as for `Trainer`.

    Raises:
        ValueError: for what is not supported, at construction, or at the first step where only that can tell. The
            message names what was found and what to do.
    """

    def __init__(
        self,
        *args: Any,
        importance: ImportanceConfig | None = None,
        per_example_loss_func: PerExampleLoss | None = None,
        report_examples_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        self._start_measuring()
        super().__init__(*args, **kwargs)
        self.importance = ImportanceConfig() if importance is None else importance
        self.per_example_loss_func = per_example_loss_func
        self.report_examples_to_hub = report_examples_to_hub
        self.loss_is_scaled_for_ga = False  # our loss is a mean over the micro-batch
        self._refuse_unsupported()
        self._effective: EffectiveEpochs | None = None
        if self.importance.budget == "auto":
            self._effective = EffectiveEpochs(self._sum_over_processes, self._say)
            self.add_callback(self._effective)
            for bar in list(self.callback_handler.callbacks):
                if type(bar) is ProgressCallback:  # one of the user's stays
                    self.remove_callback(bar)
                    self.add_callback(EffectiveProgress(self._effective))

    def _start_measuring(self) -> None:
        self._findings_to_push: Findings | None = None
        self._examples_to_show: Any = None
        self._sampler: ImportanceBatchSampler | None = None
        self._objective: Objective | None = None
        self._mean_over_examples: Callable[..., float] | None = None
        self._draw: Draw | None = None
        self._logged_until: dict[str, float] = {}

    # ---- the training data -------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The loader of `Trainer` with our sampler, its data set and collator wrapped to carry the draws."""
        base = super().get_train_dataloader()
        self.accelerator._dataloaders.remove(base)
        self._sampler = self._new_sampler(len(base.dataset))
        self._mean_over_examples = partial(mean_over_examples, base.dataset, base.collate_fn)
        loader = DataLoader(
            ImportanceDataset(base.dataset),
            batch_sampler=self._sampler,
            collate_fn=ImportanceCollator(base.collate_fn),
            generator=_generator_of_worker_seeds() if base.persistent_workers else None,
            **{name: getattr(base, name) for name in _WORKER_SETTINGS},
        )
        loader = prepare_data_loader(  # `accelerator.prepare` would deal out the draws of one process to all of them
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            rng_types=None,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )
        self.accelerator._dataloaders.append(loader)
        return loader

    def _new_sampler(self, length: int) -> ImportanceBatchSampler:
        config, args = self.importance, self.args
        self._logged_until = {}
        seed = next(seed for seed in (config.seed, args.data_seed, args.seed) if seed is not None)
        shard = Shard.of(length, args.process_index, args.world_size, seed)
        if self._sampler is None:
            memory = ImportanceMemory(len(shard), config.memory_momentum)
            record = VisitRecord(len(shard)) if config.record else None
        else:  # another attempt of `auto_find_batch_size`, which keeps what was learnt
            memory, record = self._sampler.memory, self._sampler.record
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
            uniform_fraction=config.uniform_fraction,
            prune_mass=config.prune_mass,
            increment=config.importance_increment,
        )
        if not len(sampler):
            raise ValueError(
                f"dataloader_drop_last leaves no batch: a process has {sampler.visits_per_epoch} visits per epoch, and "
                f"batches of {sampler.batch_size}. Make the batch smaller, or leave dataloader_drop_last out."
            )
        return sampler

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._sampler) // self.args.gradient_accumulation_steps)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As `Trainer.create_scheduler`; with `budget="auto"` it follows the effective steps."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._effective is not None and self._sampler is not None:
            self._effective.start(self.model, self._sampler, num_training_steps, self._steps_per_epoch)
            follow(scheduler, self._effective)
        return scheduler

    # ---- the training step -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. Every call starts with an empty memory, or with that of the checkpoint.

        `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end. `ignore_data_skip` has no
        effect: no data is loaded to be skipped, so that nothing is saved by not coming to the right place.
        """
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
            if self._sampler is not None:
                self._sampler.flush(everything=True)
            if self._objective is not None:
                self._objective.close()
        self._summarise()
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; takes the draw out of the batch before anything else looks at it."""
        self._draw = inputs.pop(DRAW_KEY, None)
        if self._draw is None:
            raise ValueError(
                f"The batch carries no {DRAW_KEY!r}: training data must come from get_train_dataloader() of "
                "ImportanceTrainer; to change the data, wrap the data set or the collator instead."
            )
        self._sampler.use(self._draw)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._draw = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """In a training step the mean of weight · loss over the batch; elsewhere as `Trainer.compute_loss`."""
        if self._draw is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._objective is None:
            self._objective = self._new_objective()
        inputs = dict(inputs)
        labels = self._pop_labels(inputs)
        measured = self._objective(model, inputs, labels, len(self._draw.index))
        self._send(self._draw, measured)
        losses = measured.losses
        weight = torch.tensor(self._draw.weight, dtype=losses.dtype).to(losses.device, non_blocking=True)
        loss = (weight * losses).mean() + measured.added
        return (loss, measured.outputs) if return_outputs else loss

    def _new_objective(self) -> Objective:
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # of PEFT
        causal = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return Objective(
            self.model,
            self.importance.metric,
            smoothing,
            self.per_example_loss_func,
            causal or (not smoothing and self._loss_shifts_labels),  # with smoothing `Trainer` only knows the former
            mean_over_examples=self._mean_over_examples,
        )

    def _pop_labels(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        names = [name for name in self.label_names or ["labels"] if name in inputs]
        if not names:
            raise ValueError(
                f"The training batch has no {self.label_names or ['labels']}, only {list(inputs)}: name the label "
                "column so, or set label_names in TrainingArguments."
            )
        return {name: inputs.pop(name) for name in names}

    # ---- importances -------------------------------------------------------------------------------------------------

    @property
    def importances(self) -> Tensor:
        """float32 `[examples]` of `train_dataset`, as measured last; NaN where unknown.

        With several processes a collective: all of them must ask. During training on a GPU it lags one step behind.
        """
        if self._sampler is None:
            return torch.full((len(self.train_dataset),), torch.nan)
        return self._gathered(self._sampler.importance)

    @property
    def kept_indices(self) -> Tensor:
        """int64 `[kept]`, ascending: examples of `train_dataset` to go on with, as for `dataset.select`.

        All but those that together hold less than `prune_mass` of the importance, as it is now. With several processes
        a collective.
        """
        if self._sampler is None:
            return torch.arange(len(self.train_dataset))
        unimportant = self._sampler.memory.unimportant(self.importance.prune_mass)
        return (self._gathered(unimportant.float()) == 0).nonzero().flatten()

    def _gathered(self, values: Tensor) -> Tensor:
        """From `[examples of this rank]` to those of all."""
        shard = self._sampler.shard
        if shard.index is None:
            return values.clone()
        whole = torch.zeros(shard.length, dtype=values.dtype).index_copy_(0, shard.index, values)
        return self._sum_over_processes(whole.to(self.accelerator.device)).cpu()

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _send(self, draw: Draw, measured: Measured) -> None:
        """Start the way of what was measured to the memory. From a GPU it takes a step, so that nothing waits for it.

        In one tensor, `[1, batch]` or `[5, batch]`: the importances, and what is to be taken down.
        """
        rows = measured.importance.float()[None]
        if self.importance.record:
            rows = torch.cat([rows, measured.seen])
        arrived = None
        if rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self._sampler.update(draw, rows.cpu(), arrived)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """Also ours, beside it: of every rank, before `Trainer` marks the checkpoint as complete."""
        super()._save_rng_state(output_dir)
        if self._sampler is None:
            return
        state = {
            "sampler": self._sampler.state_dict(),
            "effective": None if self._effective is None else self._effective.state_dict(),
            "logged_until": self._logged_until,
        }
        save_state(output_dir, self.args.process_index, self.args.world_size, state)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also our state: here the sampler exists, and nothing was drawn."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        accumulation = self.args.gradient_accumulation_steps
        done = self.state.global_step
        skip = done % self._steps_per_epoch * accumulation  # by `Trainer`, after this
        states = load_states(checkpoint)
        dropped = resume(self._sampler, states, self.args.process_index, skip)
        if dropped:
            logger.warning(f"{checkpoint} {dropped}")
        else:
            self._logged_until = states[self.args.process_index]["logged_until"]
        if self._effective is not None:
            self._resume_effective(states, done, exactly=dropped is None)

    def _resume_effective(self, states: list[dict[str, Any]], done: int, exactly: bool) -> None:
        rank = self.args.process_index if exactly else 0
        if states and states[rank]["effective"] is not None:
            self._effective.load_state_dict(states[rank]["effective"], exactly)
            if not exactly:  # steps may be of another size: at least those that `Trainer` counts
                self._effective.progress.value = max(self._effective.progress.value, float(done))
        else:  # of a training in which each step counted as one
            self._effective.progress.value = float(done)
        if self._effective.progress.finished:
            self._sampler.end()

    def _newest_checkpoint(self) -> str | bool:
        newest = newest_complete(self.args.output_dir)
        if newest is not None:
            return str(newest)
        if get_last_checkpoint(self.args.output_dir) is None:
            return True  # there is none at all: `Trainer` says so
        logger.warning(f"No checkpoint in {self.args.output_dir} was written to its end: training starts anew.")
        return False

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _refuse_unsupported(self) -> None:
        if not isinstance(self.importance, ImportanceConfig):
            raise TypeError(f"importance must be an ImportanceConfig, but is {type(self.importance).__name__}.")
        if not isinstance(self.report_examples_to_hub, bool):
            raise TypeError(f"report_examples_to_hub must be True or False, but is {self.report_examples_to_hub!r}.")
        if self.importance.budget == "auto" and self.train_dataset is not None:
            refuse_schedule(self.args, self.lr_scheduler, self.is_deepspeed_enabled)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func returns one number for the batch, which cannot be weighted per example: pass "
                "per_example_loss_func=f with f(outputs, labels) -> Tensor[batch] instead."
            )
        if self.args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy must be 'random', but is {self.args.train_sampling_strategy!r}: importance "
                "sampling decides the order itself. Leave it out, or use Trainer."
            )
        if max(self.get_tp_size(), self.get_cp_size(), self.get_sp_size()) > 1:
            raise ValueError(
                "parallelism_config has tensor, context or sequence parallelism, in which several processes share a "
                "batch: ImportanceTrainer only supports data parallelism (DDP, FSDP, ZeRO)."
            )
        if self.args.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config.dispatch_batches must not be True: only whole batches carry their draw."
            )
        if not (self.per_example_loss_func is None or callable(self.per_example_loss_func)):
            raise TypeError(
                "per_example_loss_func must be a function f(outputs, labels) -> Tensor[batch], but is "
                f"{type(self.per_example_loss_func).__name__}."
            )
        data = self.train_dataset
        if data is None:
            return
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"train_dataset must have a length and be indexed by position, but {type(data).__name__} is a stream, "
                "and importance sampling comes back to examples: load it without streaming, or use Trainer."
            )
        if len(data) < self.args.world_size:
            raise ValueError(
                f"train_dataset must have an example for each of {self.args.world_size} processes, but has {len(data)}."
            )


class ImportanceTrainer(ImportanceTrainerMixin, Trainer):
    """`Trainer` with online importance sampling. Its arguments, and those of [`ImportanceTrainerMixin`]."""
