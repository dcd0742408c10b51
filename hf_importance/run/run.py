"""`ImportanceRun`: one training with importance sampling, and all that it needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_importance.adapters.base import LossAdapter
from hf_importance.adapters.known import adapted_class, adapter_of
from hf_importance.data.dataset import LABEL_COLUMNS
from hf_importance.data.fingerprint import fingerprint
from hf_importance.data.lengths import Lengths
from hf_importance.data.loader import take_over, training_loader, validate_length, validate_loader
from hf_importance.errors import UnweightedError
from hf_importance.losses.objective import Objective
from hf_importance.losses.outputs import without_peft
from hf_importance.report.columns import Columns
from hf_importance.report.logs import say
from hf_importance.report.tokens import Token, token_losses
from hf_importance.report.training import Training
from hf_importance.run.backward import BackwardPass
from hf_importance.run.checkpoints import SavedStates, explaining_errors, restore_sampler, save_state
from hf_importance.run.data import find_lengths, new_sampler, validate_collator
from hf_importance.run.effective_epochs import EffectiveEpochs
from hf_importance.run.reuse import start_importances, write_importances
from hf_importance.run.step import TrainingStep
from hf_importance.run.unweighted import describe, refuse_unweighted
from hf_importance.run.validation import overrides_of, seed_of, unmeasured
from hf_importance.sampling.effective_steps import EffectiveSteps
from hf_importance.sampling.sampler import ImportanceBatchSampler

logger = logging.get_logger(__name__)
_DO_NOT_DRAW = ("record", "effective_epochs", "backward", "backward_tolerance", "start_from")
"""Settings that do not matter for what is drawn, or whose effect is in the state of the sampler."""


class ImportanceRun:
    """One training: its sampler, objective, schedule, and what was measured.

    It is made when `train()` starts, and kept for the results. The hooks of the trainer call it: [`begin`] and [`plan`]
    at the start, [`restore`] if training is resumed, [`follow`] when the schedule is made, [`on_event`] and `step` in
    the training loop, [`save`] at checkpoints, [`end`] at the end.

    Args:
        trainer: the trainer, an `ImportanceTrainer`.
        mixin: `ImportanceTrainerMixin`, one of its bases.
    """

    def __init__(self, trainer: Any, mixin: type) -> None:
        self.trainer, self.mixin = trainer, mixin
        self.resumes = False  # whether training is resumed from a checkpoint
        self.config, self.args = trainer.importance_config, trainer.args
        self.active = True
        self.unweighted = ""  # why draws are not weighted, if that shows in the first batch
        self.label_names: list[str] = trainer.label_names or ["labels"]
        self.sampler: ImportanceBatchSampler | None = None
        self.lengths: Lengths | None = None
        self.columns: Columns | None = None
        self.figures: Training | None = None
        self.schedule: EffectiveEpochs | None = None  # None if all steps are made
        self.step: TrainingStep | None = None
        self._base: DataLoader | None = None  # the dataloader of `Trainer`, in this epoch
        self._loader: DataLoader | None = None
        self._checkpoint: str | None = None  # that the objective is restored from, at its first use
        self._restored_objective: dict[str, Any] | None = None
        self._is_scaled = trainer.loss_is_scaled_for_ga
        self.ignores_data_skip = trainer.args.ignore_data_skip  # as the user has set it
        self.backward = BackwardPass(trainer, self.say)
        self.dataset = trainer.train_dataset  # users may exchange it after the training
        self.shown_examples: Any = None  # in the report, instead of `dataset`

    # ---- start -------------------------------------------------------------------------------------------------------

    def begin(self, base: DataLoader) -> DataLoader:
        """Make sampler and dataloader, again for each attempt of `auto_find_batch_size`.

        Args:
            base: the dataloader of `Trainer`, which provides dataset, collator and settings.

        Raises:
            UnweightedError: if a user's override made it in a way that importance sampling cannot honour.
            OSError, ValueError: see [`start_importances`].
        """
        trainer, args = self.trainer, self.args
        overrides = overrides_of(type(trainer), self.mixin, ("_get_train_sampler", "get_train_dataloader"))
        length = len(trainer.train_dataset)
        validate_loader(base, overrides, trainer._train_batch_size, args.dataloader_drop_last, length)
        validate_collator(self, base)
        if self.lengths is None:
            self.lengths = find_lengths(self, base)
        self.sampler = new_sampler(self, before=self.sampler)
        self.step = TrainingStep(self)
        self.columns = Columns(self.sampler, trainer.is_world_process_zero())
        if args.save_strategy != "no":
            _ = self.fingerprint  # before `set_epoch` or others change the dataset
        if not self.resumes:
            self._inherit()
        label_names = None if self.is_adapted else self.label_names
        self._loader = training_loader(base, self.sampler, trainer.accelerator, label_names)
        return self._loader

    @cached_property
    def is_adapted(self) -> bool:
        """Whether another library computes the losses, from batches of its own collators."""
        return adapted_class(type(self.trainer)) is not None

    def _inherit(self) -> None:
        """Start with importances of another training, if `start_from` is set."""
        start, length = self.config.start_from, self.sampler.shard.length
        if start is not None:
            data = {} if isinstance(start, Tensor) else self.fingerprint
            self.sampler.inherit(start_importances(start, length, data, self.config.metric))

    def plan(self, max_steps: int) -> None:
        """Set the number of uniform steps that were asked for."""
        progress = None
        if self.config.effective_epochs:
            progress = EffectiveSteps(max_steps, self._steps_per_epoch)
            handler = self.trainer.callback_handler
            self.schedule = EffectiveEpochs(
                progress,
                self.sampler,
                self.sum_over_processes,
                self.say,
                lambda: handler.callbacks,
                self.backward.take_squares,
            )
        has_lengths = self.lengths.length is not None
        self.figures = Training(self.sampler, self.columns, progress, has_lengths, self._token_losses)

    def follow(self, scheduler: LRScheduler, steps: int = 0) -> None:
        """Make the schedule of the learning rate, which has made so many steps, follow the effective steps."""
        if self.schedule is not None:
            self.schedule.follow(scheduler, self.trainer.model, steps)

    def epoch_loader(self, base: DataLoader) -> DataLoader:
        """The dataloader of an epoch of the training loop, in place of that of `Trainer`."""
        validate_length(base.dataset, self.sampler.shard.length)
        self._base = base
        take_over(self._loader, base)
        return self._loader

    def effective_epochs(self) -> float:
        """Effective epochs so far, or epochs if all steps count as one."""
        if self.schedule is not None:
            return self.schedule.progress.epochs
        return self.trainer.state.global_step / self._steps_per_epoch

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.sampler) // self.args.gradient_accumulation_steps)

    # ---- training loop -----------------------------------------------------------------------------------------------

    def on_event(self, event: str, state: TrainerState, control: TrainerControl) -> None:
        """Follow the training loop. `event` is the name of a method of `TrainerCallback`."""
        schedule = self.schedule
        if event == "on_pre_optimizer_step" and not self.unweighted:
            self.step.validate_measured()
        if event == "on_optimizer_step":
            self.backward.end_step(state.global_step + 1, self.sum_over_processes)
        if schedule is None:
            return
        if event == "on_train_begin":
            if not schedule.is_followed:  # made by an override of `create_scheduler` without `super()`
                self.follow(self.trainer.lr_scheduler, state.global_step)
            schedule.begin_training(state)
        elif event == "on_epoch_begin":
            schedule.loop.begin()
        elif event == "on_pre_optimizer_step":
            schedule.observe_gradients()
        elif event == "on_optimizer_step":
            counts = not self.trainer.accelerator.optimizer_step_was_skipped
            schedule.count_step(state.global_step + 1, counts, self.args.device, self.trainer.lr_scheduler)
        elif event == "on_step_end":
            schedule.end_step(self.args, state, control)
        elif event == "on_epoch_end":
            schedule.end_epoch(control)

    @cached_property
    def objective(self) -> Objective | LossAdapter:
        """Computes losses and importances. Made at its first use, when the engine has wrapped the model."""
        trainer, adapted = self.trainer, adapted_class(type(self.trainer))
        objective = None if adapted is None else adapter_of(trainer, adapted, self.gather)
        if objective is None:
            smoothing = 0.0 if trainer.label_smoother is None else trainer.label_smoother.epsilon
            classes = type(without_peft(trainer.model)).__mro__  # FSDP2 inserts a class before that of the model
            causal = not {cls.__name__ for cls in classes}.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
            causal |= not smoothing and trainer._loss_shifts_labels  # with smoothing, `Trainer` goes by the class only
            function, metric = trainer.per_example_loss_func, self.config.metric
            objective = Objective(trainer.model, metric, smoothing, function, causal, self.gather)
        if self._restored_objective is not None:
            with explaining_errors(self._checkpoint):
                objective.load_state_dict(self._restored_objective)
        return objective

    @property
    def needs_labels(self) -> bool:
        """Whether a batch must have labels."""
        return self.trainer.per_example_loss_func is None or bool(self.trainer.label_names)

    @property
    def share_of_visits(self) -> float:
        """Visits of this training relative to those of all steps of uniform sampling."""
        if self.schedule is not None and self.schedule.progress.steps:
            return self.trainer.state.max_steps / self.schedule.progress.steps
        return self.config.visits_per_epoch if self.args.max_steps <= 0 else 1.0

    @property
    def data_of_loader(self) -> tuple[Any, Any]:
        """Dataset and collator of the user."""
        return self._base.dataset, self._base.collate_fn

    def fall_back(self, error: UnweightedError, compute_loss: Callable[[], Any] = lambda: None) -> Any:
        """Go on with the losses of `Trainer` and equal weights, in the first batch of a training.

        Args:
            error: why the draws of this training cannot be weighted.
            compute_loss: computes the loss of this batch with `Trainer`.

        Returns:
            What `compute_loss` returns.

        Raises:
            UnweightedError: the error, if nothing would be gained because backward passes are full, if a loss of the
                user would be replaced, if draws were weighted before, or if `Trainer` cannot compute a loss, either.
        """
        self.sampler.flush(everything=True)
        refuse_unweighted(self.config, error)
        keeps_loss = self.trainer.per_example_loss_func is None
        if not keeps_loss or self.sampler.memory.known or not self.step.is_first:
            raise error
        self._go_on_without_weights(str(error))
        try:
            loss = compute_loss()
        except Exception as of_trainer:  # a model or data that `Trainer` does not train, either
            raise error from of_trainer
        self.say(describe(self.unweighted))
        return loss

    def _go_on_without_weights(self, reason: str) -> None:
        self.unweighted, self.trainer.loss_is_scaled_for_ga = reason, self._is_scaled
        if self.schedule is not None:
            self.schedule.says_forecast = False

    def unmeasured(self) -> UnweightedError:
        """The error for a training step without measured importances."""
        return unmeasured(type(self.trainer), self.mixin)

    def end(self) -> None:
        """End the training loop, also after an error."""
        self.active, self.trainer.loss_is_scaled_for_ga = False, self._is_scaled
        self.backward.end()
        if self.sampler is not None:
            self.sampler.flush(everything=True)
        if "objective" in vars(self):
            self.objective.close()

    # ---- results -----------------------------------------------------------------------------------------------------

    def gather_columns(self) -> None:
        """Gather the columns of all processes in the main process."""
        self.columns.gather(self.args.ddp_timeout)

    def measured(self) -> dict[str, float]:
        """Figures since the last log."""
        return ({} if self.unweighted else self.figures.measured()) | self.backward.measured()

    def at_end(self) -> dict[str, Any]:
        """What is added to the last log."""
        logs = self.figures.at_end(self.trainer.state.global_step) | self.backward.at_end()
        return logs | {"train_unweighted": self.unweighted} if self.unweighted else logs

    def summary(self) -> list[str]:
        """Lines on what was saved, and on the training data."""
        lines = []
        if not self.trainer.state.global_step:
            return lines
        if self.schedule is not None and self.schedule.progress.finished and not self.unweighted:
            lines.append(self.figures.ended(self.trainer.state.global_step, self.backward.fraction))
        elif self.backward.fraction is not None:
            lines.append(f"Selective backward: {self.backward.fraction:.0%} of the backward passes.")
        if self.unweighted or not self.trainer.is_world_process_zero():
            return lines
        if diverged := self.figures.divergence():
            lines.append(diverged)
        elif self.figures.has_record:
            lines.append(self.trainer._findings().summary())
        return lines

    def _token_losses(self, index: list[int]) -> dict[int, list[Token]]:
        """See [`token_losses`]. Empty with several processes, because forward passes need all of them."""
        trainer = self.trainer
        if self.args.world_size > 1 or not hasattr(trainer.processing_class, "decode"):
            return {}
        prepare, tokenizer = trainer._prepare_inputs, trainer.processing_class
        return token_losses(trainer.model, *self.data_of_loader, prepare, tokenizer, self.objective.shifts, index)

    def say(self, line: str) -> None:
        """Print a line, in the main process."""
        if self.trainer.is_world_process_zero():
            say(line)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that must be saved of this process, as tensors and plain values."""
        return {
            "settings": self._settings(),
            "data": self.fingerprint,
            "sampler": self.sampler.state_dict(),
            "effective": None if self.schedule is None else self.schedule.state_dict(),
            "objective": self.objective.state_dict(),
            "figures": self.figures.state_dict(),
            "backward": self.backward.state_dict(),
            "unweighted": self.unweighted,
        }

    def save(self, checkpoint: str) -> None:
        """Save the state of every process into a checkpoint, and gather the columns of all."""
        save_state(checkpoint, self.args.process_index, self.args.world_size, self.state_dict())
        self.columns.gather(self.args.ddp_timeout)
        self.trainer.accelerator.wait_for_everyone()

    def save_importances(self, folder: str | Path) -> None:
        """Save what another training may start from, in the main process, which has it of all examples."""
        importance = self.columns.for_another_training
        if self.config.metric != "uniform" and importance.isfinite().any():
            write_importances(folder, importance, self.fingerprint, self.config.metric)

    def restore(self, checkpoint: str, position: tuple[int, int], epochs: int) -> tuple[int, int]:
        """Restore what a checkpoint has; warn of what it has not.

        Args:
            checkpoint: folder of the checkpoint.
            position: epoch of the loop and batches used in it, if all epochs had all their steps.
            epochs: number of epochs of the loop.

        Returns:
            The actual position.
        """
        self._checkpoint = checkpoint
        states, rank, unweighted = SavedStates(checkpoint), self.args.process_index, ""
        with explaining_errors(checkpoint):
            lost = restore_sampler(self.sampler, states, rank, self.fingerprint, self._settings(), self.all_agree)
            if lost is None:
                self.figures.load_state_dict(states[rank]["figures"])
                self._restored_objective = states[rank]["objective"]
                self.backward.load_state_dict(states[rank]["backward"])
                unweighted = states[rank]["unweighted"]
            elif not self.sampler.memory.known and not self.sampler.has_prior:
                self._inherit()
            if self.schedule is not None:
                position = self._restore_schedule(states, lost is None, position, epochs)
        self.sampler.skip(position[1])
        if unweighted:
            self._go_on_without_weights(unweighted)
            self.say(describe(unweighted))
        if lost is not None:
            logger.warning(f"{checkpoint} {lost}")
        return position

    def _restore_schedule(
        self, states: SavedStates, exactly: bool, position: tuple[int, int], epochs: int
    ) -> tuple[int, int]:
        rank, schedule = self.args.process_index, self.schedule
        effective = states[rank]["effective"] if exactly else self._common_progress(states.any(rank))
        if effective is None:  # without effective epochs, each step counted as one
            schedule.count_all(self.trainer.state.global_step)
            return position
        schedule.load_state_dict(effective, exactly)
        if schedule.progress.finished:
            return epochs, 0
        if not exactly:
            return schedule.loop.finished, 0
        return schedule.loop.finished, schedule.loop.steps * self.args.gradient_accumulation_steps

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identifies the training data."""
        return fingerprint(self.dataset, {*LABEL_COLUMNS, *self.trainer.label_names})

    def _settings(self) -> dict[str, Any]:
        """Settings that must be equal to resume exactly."""
        settings = self.config.to_dict() | {"sampling": self.config.sampling, "seed": seed_of(self.config, self.args)}
        return {name: value for name, value in settings.items() if name not in _DO_NOT_DRAW}

    def _common_progress(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The effective epochs of the first process that found any in its files: they must be the same on all."""
        own = None if state is None else state.get("effective")
        has_any = self.gather([float(own is not None)]).flatten()
        if not 0 < has_any.sum() < len(has_any):
            return own
        return broadcast_object_list([own], from_process=int(has_any.argmax()))[0]

    # ---- several processes -------------------------------------------------------------------------------------------

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Sum tensors on the device over the processes."""
        return self.trainer.accelerator.reduce(values, reduction="sum")

    def gather(self, values: list[float]) -> Tensor:
        """Values of this process to those of all, `[processes, values]`, on the CPU."""
        table = torch.zeros(self.args.world_size, len(values), device=self.args.device, dtype=torch.float32)
        table[self.args.process_index] = torch.tensor(values, device=self.args.device)
        return self.sum_over_processes(table).cpu()  # on the device, because not every backend supports the CPU

    def all_agree(self, agrees: bool) -> bool:
        """Whether all processes pass True."""
        return bool(self.gather([float(agrees)]).all())
