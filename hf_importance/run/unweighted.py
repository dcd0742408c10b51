"""A training whose draws cannot be weighted: draws and losses of `Trainer`, and a selective backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from hf_importance.config import ImportanceConfig
from hf_importance.errors import UnweightedError
from hf_importance.report.logs import say
from hf_importance.run.backward import BackwardPass
from hf_importance.run.checkpoints import SavedStates, explaining_errors, save_state


class UnweightedRun:
    """What [`ImportanceRun`] is for a training with weights; methods of the same name do the same.

    Args:
        trainer: the trainer, an `ImportanceTrainer`.
        reason: why draws cannot be weighted.
    """

    def __init__(self, trainer: Any, reason: str) -> None:
        self.trainer, self.args, self.unweighted = trainer, trainer.args, reason
        self.active = True
        self.figures = None
        self.share_of_visits = 1.0
        self.backward = BackwardPass(trainer, self.say)
        self.step = UnweightedStep(self.backward)
        self._is_scaled = trainer.loss_is_scaled_for_ga

    def begin(self, base: DataLoader) -> DataLoader:
        """The dataloader of `Trainer`."""
        if self.trainer.per_example_loss_func is not None:
            self.trainer.loss_is_scaled_for_ga = False  # the loss is a mean over the micro-batch
        self.say(describe(self.unweighted))
        return base

    def plan(self, max_steps: int) -> None:
        """All steps are made."""

    def follow(self, scheduler: Any) -> None:
        """The schedule is that of `Trainer`."""

    def epoch_loader(self, base: DataLoader) -> DataLoader:
        """The dataloader of `Trainer`."""
        return base

    def on_event(self, event: str, state: TrainerState, control: TrainerControl) -> None:
        """Follow the training loop."""
        if event == "on_optimizer_step":
            self.backward.end_step(state.global_step + 1, self._sum_over_processes)

    def end(self) -> None:
        """End the training loop, also after an error."""
        self.active, self.trainer.loss_is_scaled_for_ga = False, self._is_scaled
        self.backward.end()

    def gather_columns(self) -> None:
        """Nothing to gather."""

    def summary(self) -> list[str]:
        """Lines on what was saved."""
        fraction = self.backward.fraction
        return [] if fraction is None else [f"Selective backward: {fraction:.0%} of the backward passes."]

    def measured(self) -> dict[str, float]:
        """Figures since the last log."""
        return self.backward.measured()

    def at_end(self) -> dict[str, Any]:
        """What is added to the last log."""
        return self.backward.at_end() | {"train_unweighted": self.unweighted}

    def save(self, checkpoint: str) -> None:
        """Save the state of every process into a checkpoint."""
        state = {"unweighted": self.unweighted, "backward": self.backward.state_dict()}
        save_state(checkpoint, self.args.process_index, self.args.world_size, state)
        self.trainer.accelerator.wait_for_everyone()

    def restore(self, checkpoint: str, position: tuple[int, int], epochs: int) -> tuple[int, int]:
        """Restore what a checkpoint has."""
        states, rank = SavedStates(checkpoint), self.args.process_index
        with explaining_errors(checkpoint):
            if rank in states and states.ranks == self.args.world_size:
                self.backward.load_state_dict(states[rank]["backward"])
        return position

    def say(self, line: str) -> None:
        """Print a line, in the main process."""
        if self.trainer.is_world_process_zero():
            say(line)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.trainer.accelerator.reduce(values, reduction="sum")


class UnweightedStep:
    """What [`TrainingStep`] is for a training with weights."""

    def __init__(self, backward: BackwardPass) -> None:
        self._backward = backward

    def begin(self, batches: list[Any]) -> None:
        """Nothing to prepare."""

    def of(self, model: nn.Module, batch: Any) -> AbstractContextManager[None]:
        """Context in which a batch is trained on."""
        return self._backward.of(batch)


def describe(reason: str) -> str:
    """A line on a training whose draws are not weighted."""
    return f"Examples are drawn and weighted as by Trainer, and only the backward pass can save: {reason}"


def refuse_unweighted(config: ImportanceConfig, error: UnweightedError) -> None:
    """Raise the error why draws cannot be weighted, if the settings are worth nothing without."""
    if config.backward == "full":
        raise error
    if config.start_from is not None:
        raise UnweightedError(f"start_from requires draws that are weighted; remove it, or: {error}") from error
