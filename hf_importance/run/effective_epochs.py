"""Effective epochs in `Trainer`: they determine the learning rate, the ends of epochs and the end of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_importance.report.training import divergence
from hf_importance.run.loop_epochs import LoopEpochs
from hf_importance.sampling.effective_steps import EffectiveSteps, GradientSample, learning_rate_factor
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SEGMENTS
from hf_importance.sampling.state import read_number, read_tensor
from hf_importance.upstream import unwrapped_scheduler

_FORECAST_AFTER = 0.2
"""Share of the effective steps after which the expected end of training is announced, …"""
_FORECAST_EPOCH = 1.25
"""… but not before this effective epoch: until examples are visited again, each step counts as one, unless training
started from importances of another one."""
_NO_GAIN_ABOVE = 0.95
"""If the smallest possible variance ratio is above this, there is little to gain."""
_ROUNDING = 1e-9
ALL_STEPS = "Pass ImportanceConfig(effective_epochs=False) to run all epochs or steps with any schedule."


class EffectiveEpochs:
    """Counts effective steps; ends each epoch when it has made those of a uniform epoch, and training after the last.

    Its methods are called before the callbacks of users, which then see an epoch that has ended: `state.epoch` is a
    whole number, and at the end `state.max_steps` is `state.global_step`. Before, `state.max_steps` is a forecast.

    Once per segment (an eighth of an epoch), four numbers are summed over all processes; they determine what a step is
    worth until the next segment. They are read from the device one step later, to avoid a synchronisation.

    Args:
        progress: the effective steps.
        sampler: the sampler of this process.
        reduce: sums a tensor over all processes.
        say: prints a line for the user.
        callbacks: the callbacks of the user, for their progress bars.
        take_squares: second moment of the gradients with selective backward and without, since its last call.
    """

    def __init__(
        self,
        progress: EffectiveSteps,
        sampler: ImportanceBatchSampler,
        reduce: Callable[[Tensor], Tensor],
        say: Callable[[str], None],
        callbacks: Callable[[], Sequence[TrainerCallback]],
        take_squares: Callable[[], Tensor],
    ) -> None:
        self.progress, self.loop = progress, LoopEpochs(progress)
        self._sampler, self._reduce, self._say, self._callbacks = sampler, reduce, say, callbacks
        self._take_squares = take_squares
        self._gradients: GradientSample | None = None  # once the model is wrapped
        self._restored: dict[str, Any] | None = None  # its state in a checkpoint, until then
        self._measured_until = torch.zeros(2, dtype=torch.float64)  # moments of the sampler at the last measurement
        self._pending: tuple[Tensor, torch.Event | None] | None = None
        self._is_announced = False
        self.says_forecast = True
        self._before = 0.0  # effective steps before the last step

    def follow(self, scheduler: LRScheduler, model: nn.Module, steps: int = 0) -> None:
        """Make a schedule follow the effective steps, scaled by [`learning_rate_factor`].

        It goes on where it is, if it was used before.

        Args:
            scheduler: the schedule.
            model: the model.
            steps: steps of the schedule that were made in this training, before it was resumed.

        Raises:
            ValueError: if the schedule is not a [function of steps][is_function_of_steps].
        """
        scheduler = unwrapped_scheduler(scheduler)
        if not is_function_of_steps(scheduler):
            raise ValueError(
                f"With effective_epochs=True the learning rate follows the effective epochs, which the schedule "
                f"{type(scheduler).__name__} does not support. {ALL_STEPS}"
            )
        start, before = scheduler.last_epoch - steps, scheduler.lr_lambdas
        scheduler.lr_lambdas = [_following(schedule, self.progress, start) for schedule in before]
        if hasattr(before[0], "effective_steps"):  # its rates are scaled by what steps of an earlier training counted
            _recompute_learning_rates(scheduler)
        self._gradients = GradientSample(model.parameters())
        if self._restored is not None:
            self._gradients.load_state_dict(self._restored)

    @property
    def is_followed(self) -> bool:
        """Whether there is a schedule that follows the effective steps."""
        return self._gradients is not None

    # ---- events of training ------------------------------------------------------------------------------------------

    def begin_training(self, state: TrainerState) -> None:
        """Set the forecast of the last step."""
        state.max_steps = state.global_step + self.loop.remaining_steps()

    def observe_gradients(self) -> None:
        """Observe the gradients before they are cleared."""
        self._gradients.observe()

    def count_step(self, step: int, counts: bool, device: torch.device, scheduler: LRScheduler) -> None:
        """Count an effective step.

        Args:
            step: number of the step.
            counts: whether the parameters were updated; False if gradients overflowed.
            device: device of the gradients.
            scheduler: the schedule of the learning rate.
        """
        self._before = self.progress.value
        if counts:
            self.progress.advance()
        if self._pending is not None:
            sums, arrived = self._pending
            if arrived is not None:
                arrived.synchronize()
            self.progress.measure(sums.double())
            self._pending = None
        if step % max(1, self.progress.steps_per_epoch // SEGMENTS) == 0:
            self._measure(device)
        wait = _FORECAST_AFTER * self.progress.steps
        if not self._sampler.has_prior:
            wait = max(wait, _FORECAST_EPOCH * self.progress.steps_per_epoch)
        if not self._is_announced and self.progress.value >= min(wait, self.progress.steps):
            self._is_announced = True
            if self.says_forecast:
                self._say(self.forecast(step))
        if unwrapped_scheduler(scheduler) is not scheduler:  # DeepSpeed steps the schedule before the step is counted
            _recompute_learning_rates(unwrapped_scheduler(scheduler))

    def end_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Set epoch and forecast; end the epoch, or training."""
        if self.loop.step(exhausted=state.epoch >= self.loop.finished + 1):
            control.should_epoch_stop = True
        if self.progress.finished:
            control.should_training_stop = True
        state.epoch = self.loop.epoch
        state.max_steps = state.global_step + self.loop.remaining_steps()
        self._set_intervals(args, state)
        if args.eval_strategy == IntervalStrategy.STEPS and state.max_steps == state.global_step < args.eval_delay:
            control.should_evaluate = args.eval_delay <= self.progress.steps  # the last step stands for all after it
        for callback in self._callbacks():
            _set_total(callback, state.max_steps)

    def end_epoch(self, control: TrainerControl) -> None:
        """End an epoch that a callback ended; training that a callback ended may be resumed within the epoch."""
        if self.loop.steps and control.should_epoch_stop and not control.should_training_stop:
            self.loop.end()

    def _set_intervals(self, args: TrainingArguments, state: TrainerState) -> None:
        """Set the intervals of logs, evaluations and checkpoints that are given as shares of the training.

        `Trainer` acts in steps that are multiples of them: they are the step in which it is to act next.
        """
        steps, value = self.progress.steps, min(self.progress.value, self.progress.steps)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            share = getattr(args, name)
            if share is None or not 0 < share < 1:
                continue
            passed, now = (math.floor(v / (share * steps) + _ROUNDING) for v in (self._before, value))
            missing = (now + 1) * share * steps - value
            later = max(1, math.ceil(missing / self.progress.gain - _ROUNDING))
            setattr(state, name, state.global_step + (0 if now > passed else later))

    def _measure(self, device: torch.device) -> None:
        self._sampler.flush()
        moments = self._sampler.moments
        moments = torch.tensor([moments["ours"], moments["uniform"]], dtype=torch.float64)
        new, self._measured_until = moments - self._measured_until, moments
        selected, whole = self._take_squares()
        new[0] *= selected / whole if whole > 0 else 1.0  # ρ of the draws times the rise through selection
        sums = self._reduce(torch.cat([new.float().to(device), self._gradients.take(device)]))
        arrived = None
        if sums.is_cuda:
            sums = sums.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = (sums.cpu(), arrived)

    def forecast(self, step: int) -> str:
        """A message on when training is expected to end, or why it will not end early."""
        if diverged := divergence(self._sampler):
            return diverged
        steps = self.progress.steps
        if steps <= self.progress.steps_per_epoch and not self._sampler.has_prior:
            return "Importance sampling saves nothing in a single epoch, in which every example is visited once."
        least = self._sampler.memory.least_variance_ratio()
        if least > _NO_GAIN_ABOVE:
            return (
                f"Importance sampling has little to gain here so far (step {step:,}): importances are similar, and the "
                f"variance ratio to uniform sampling is at best {least:.2f}"
                f"{'' if self._sampler.memory.cost is None else ' at equal cost'}. Unless importances diverge as the "
                f"model learns, training will take nearly all of its {steps:,} steps."
            )
        end = step + self.loop.remaining_steps()
        return (
            f"Importance sampling: at step {step:,}, training is expected to end after about {end:,} of {steps:,} "
            "steps, or sooner if importances diverge as the model learns."
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        if self._pending is not None and self._pending[1] is not None:
            self._pending[1].synchronize()
        return {
            "progress": self.progress.state_dict(),
            "loop": self.loop.state_dict(),
            "gradients": self._gradients.state_dict(),
            "measured_until": self._measured_until.clone(),
            "pending": None if self._pending is None else self._pending[0].cpu(),
            "is_announced": self._is_announced,
        }

    def load_state_dict(self, state: dict[str, Any], exactly: bool) -> None:
        """Restore a [`state_dict`]; with `exactly=False` if the sampler was restarted."""
        self.progress.load_state_dict(state["progress"])
        self._is_announced = read_number(state, "is_announced", bool)
        if exactly:
            self.loop.load_state_dict(state["loop"])
            GradientSample(()).load_state_dict(state["gradients"])  # an error shows here, where it is explained
            self._restored = state["gradients"]
            self._measured_until = read_tensor(state, "measured_until", [2], torch.float64)
            self._pending = None if state["pending"] is None else (state["pending"].view(4), None)
        else:
            self.loop.finished = int(self.progress.epochs)

    def count_all(self, steps: int) -> None:
        """Resume from a training in which each of these steps counted as one."""
        self.progress.value = float(steps)
        self.loop.count_all(steps)


def is_function_of_steps(scheduler: LRScheduler) -> bool:
    """Whether the learning rate is a function of the number of steps, that of a `LambdaLR`, and can follow another."""
    kind = type(scheduler)
    return isinstance(scheduler, LambdaLR) and kind.get_lr is LambdaLR.get_lr and kind.step is LRScheduler.step


def _following(schedule: Callable[[float], float], progress: EffectiveSteps, start: int) -> Callable[[int], float]:
    steps_to_factor = getattr(schedule, "steps_to_factor", schedule)
    if steps_to_factor is not schedule:  # followed an earlier training, or this one when an engine made the schedule
        start = schedule.start if schedule.progress is progress else schedule.effective_steps()
    module = getattr(getattr(steps_to_factor, "func", steps_to_factor), "__module__", None) or ""
    between_steps = module.startswith("transformers.")  # functions of users may look steps up in a table

    def effective_steps() -> float:
        return start + min(progress.value, progress.steps)

    def factor(_: int) -> float:
        steps = effective_steps()
        steps = steps if between_steps else math.floor(steps + _ROUNDING)
        return steps_to_factor(steps) * learning_rate_factor(progress.gain)

    factor.steps_to_factor, factor.effective_steps = steps_to_factor, effective_steps
    factor.start, factor.progress = start, progress
    return factor


def _recompute_learning_rates(scheduler: LRScheduler) -> None:
    """Compute the learning rates of a [function of steps][is_function_of_steps] again."""
    factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(0) for base, factor in factors]
    for group, learning_rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = learning_rate


def _set_total(callback: TrainerCallback, total: int) -> None:
    """Set the total of the progress bar of a callback: those of transformers and TRL, and others like these."""
    bar, task = (getattr(callback, name, None) for name in ("training_bar", "training_task"))
    bar = getattr(callback, "training_tracker", None) if bar is None else bar
    if task is not None:
        bar.update(task, total=total)
    elif hasattr(bar, "total"):
        bar.total = total
