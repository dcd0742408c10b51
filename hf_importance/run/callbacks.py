"""Passes the events of training to the run, without a callback in the list of the user."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class RunCallbackHandler(CallbackHandler):
    """The callbacks of the user, and before them the run, which is not one of them.

    Args:
        handler: the handler that `Trainer` has made.
        trainer: the trainer, with the run in progress.
    """

    def __init__(self, handler: CallbackHandler, trainer: Any) -> None:
        vars(self).update(vars(handler))
        self._trainer = trainer

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Call the run, then the callbacks."""
        run = self._trainer._active_run
        if run is not None:
            run.on_event(event, state, control)
        return super().call_event(event, args, state, control, **kwargs)
