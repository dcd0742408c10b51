"""The hooks for checkpoints: the state of importance sampling is saved and restored with that of `Trainer`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_importance.config import ImportanceConfig
from hf_importance.run.checkpoints import (
    SavedStates,
    explaining_errors,
    load_states,
    newest_complete,
    resume,
    save_state,
)
from hf_importance.run.epochs import LoopEpochs
from hf_importance.run.schedule import EffectiveEpochs
from hf_importance.run.validation import seed_of
from hf_importance.sampling.progress import EffectiveVisits
from hf_importance.sampling.sampler import ImportanceBatchSampler

logger = logging.get_logger(__name__)


class _Resumed(NamedTuple):
    """What was found in a checkpoint.

    Args:
        states: states of the ranks.
        exactly: whether the sampler continues exactly.
        effective: state of the effective epochs, if there is one.
    """

    states: SavedStates
    exactly: bool
    effective: dict[str, Any] | None


class CheckpointMixin:
    """The part of [`trainer.ImportanceTrainerMixin`] for checkpoints."""

    importance_config: ImportanceConfig
    _sampler: ImportanceBatchSampler | None
    _effective: EffectiveEpochs | None

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
        self._columns.gather(self.args.ddp_timeout)
        self.accelerator.wait_for_everyone()

    def _settings(self) -> dict[str, Any]:
        """Settings that must be equal to resume exactly."""
        settings = asdict(self.importance_config) | {"seed": seed_of(self.importance_config, self.args)}
        settings["budget"] = 1.0 if self.importance_config.budget == "auto" else self.importance_config.budget
        return {name: value for name, value in settings.items() if name != "record"}

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, *args: Any
    ) -> tuple[int, int]:
        """Also restore the sampler, and return epoch and batches of the loop, whose epochs may have been shorter."""
        position = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, *args)
        self._resumed = None
        if checkpoint is None:
            return position
        states, rank = load_states(checkpoint), self.args.process_index
        with explaining_errors(checkpoint):
            dropped = resume(self._sampler, states, rank, self._fingerprint(), self._settings(), self._all_agree)
            exactly = dropped is None
            effective = states[rank]["effective"] if exactly else self._common_progress(states.any(rank))
            self._resumed = _Resumed(states, exactly, effective)
            if self._effective is not None and effective is not None:
                position = self._position(max_steps, epochs)
        self._sampler.skip(position[1])
        if dropped:
            logger.warning(f"{checkpoint} {dropped}")
        return position

    def _position(self, max_steps: int, epochs: int) -> tuple[int, int]:
        """Epoch of the loop, and batches that were used in it."""
        progress = EffectiveVisits(max_steps, self._steps_per_epoch)
        progress.load_state_dict(self._resumed.effective["progress"])
        if progress.finished:
            return epochs, 0
        if not self._resumed.exactly:
            return int(progress.epochs), 0
        loop = LoopEpochs(progress)
        loop.load_state_dict(self._resumed.effective["loop"])
        return loop.finished, loop.steps * self.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also restore what needs the schedule and the wrapped model; at this point nothing was drawn."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        (states, exactly, effective), self._resumed = self._resumed, None
        with explaining_errors(checkpoint):
            if exactly:
                mine = states[self.args.process_index]
                self._reported.load_state_dict(mine["reported"])
                self._get_objective().load_state_dict(mine["objective"])
            if self._effective is not None and effective is not None:
                self._effective.load_state_dict(effective, exactly)
            elif self._effective is not None:  # without budget="auto", each step counted as one
                self._effective.count_all(self.state.global_step)

    def _all_agree(self, mine: bool) -> bool:
        """Whether all processes pass True."""
        return self._sum_on_device(torch.tensor([float(mine)])).item() == self.args.world_size

    def _common_progress(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The effective epochs of the first process that found any in its files: they must be the same on all."""
        mine = None if state is None else state["effective"]
        found = torch.zeros(self.args.world_size)
        found[self.args.process_index] = mine is not None
        found = self._sum_on_device(found)
        if not 0 < found.sum() < len(found):
            return mine
        return broadcast_object_list([mine], from_process=int(found.argmax()))[0]

    def _newest_checkpoint(self) -> str | bool:
        newest = newest_complete(self.args.output_dir)
        if newest is not None:
            return str(newest)
        if get_last_checkpoint(self.args.output_dir) is None:
            return True  # no checkpoint at all: `Trainer` raises an error
        logger.warning(f"{self.args.output_dir} has no complete checkpoint: training starts from scratch.")
        return False
