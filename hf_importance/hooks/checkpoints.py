"""The hooks for checkpoints: the state of importance sampling is saved and restored with that of `Trainer`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_importance.checkpoint import (
    SavedStates,
    explaining_errors,
    load_states,
    newest_complete,
    resume,
    save_state,
)
from hf_importance.config import ImportanceConfig
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.schedule import EffectiveEpochs
from hf_importance.support import seed_of

logger = logging.get_logger(__name__)


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
            dropped = resume(self._sampler, states, rank, skip, data, self._settings(), self._all_agree)
            if dropped is None:
                self._reported.load_state_dict(states[rank]["reported"])
                self._get_objective().load_state_dict(states[rank]["objective"])
            if self._effective is not None:
                self._resume_effective(states, done, exactly=dropped is None)
        if dropped:
            logger.warning(f"{checkpoint} {dropped}")

    def _resume_effective(self, states: SavedStates, done: int, exactly: bool) -> None:
        rank = self.args.process_index
        state = states[rank]["effective"] if exactly else self._common_progress(states.any(rank))
        if state is not None:
            self._effective.load_state_dict(state, exactly)
            if not exactly:  # steps may differ in size: count at least those of `Trainer`
                self._effective.progress.value = max(self._effective.progress.value, float(done))
        else:  # without budget="auto", each step counted as one
            self._effective.progress.value = float(done)
        if self._effective.progress.finished:
            self._sampler.end()

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
