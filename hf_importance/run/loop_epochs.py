"""Epochs of the training loop: each ends once it has made the progress of a uniform epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_importance.sampling.effective_steps import EffectiveSteps
from hf_importance.sampling.state import read_number

_ROUNDING = 1e-9


class LoopEpochs:
    """Where the training loop is: its epoch, the progress within it, and how many steps are expected.

    An epoch ends with the step that completes one more effective epoch, at the latest after `steps_per_epoch` steps.
    What a step makes beyond the end of an epoch counts for the next. An epoch that ended with less (because a callback
    ended it, or steps overflowed) is not made up for, as in `Trainer`.

    Args:
        progress: the effective steps.

    >>> progress = EffectiveSteps(steps=20, steps_per_epoch=10)
    >>> loop = LoopEpochs(progress)
    >>> loop.begin()
    >>> progress.gain = 4.0
    >>> for _ in range(3):
    ...     progress.advance()
    ...     print(loop.step(exhausted=False), loop.epoch)
    False 0.4
    False 0.8
    True 1.0
    >>> loop.remaining_steps()
    2
    """

    def __init__(self, progress: EffectiveSteps) -> None:
        self._progress = progress
        self.finished = 0  # epochs
        self.steps = 0  # in the current epoch
        self._start = 0.0  # effective steps at its start

    def begin(self) -> None:
        """Begin an epoch, or go on with it after a restart."""
        if not self.steps:
            self._start = min(self._progress.value, float(self.finished * self._progress.steps_per_epoch))

    def step(self, exhausted: bool) -> bool:
        """Count a step; return whether it is the last of the epoch.

        Args:
            exhausted: whether the dataloader has no more batches in this epoch.
        """
        self.steps += 1
        if not (exhausted or self._earned >= 1):
            return self._progress.finished
        self.end()
        return True

    def end(self) -> None:
        """End the epoch."""
        self.finished, self.steps = self.finished + 1, 0

    @property
    def _earned(self) -> float:
        return (min(self._progress.value, self._progress.steps) - self._start) / self._progress.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Finished epochs and the progress within the current one, as in `TrainerState.epoch`."""
        return self.finished + (min(self._earned, 1.0) if self.steps else 0.0)

    def remaining_steps(self) -> int:
        """Expected number of remaining steps with the current gain; 0 only after the last.

        There are not more than remain of the requested ones, also if some did not count.
        """
        left = self._progress.steps - self.finished * self._progress.steps_per_epoch - self.steps
        return max(0, min(left, math.ceil(self._progress.remaining_steps() - _ROUNDING)))

    def count_all(self, steps: int) -> None:
        """Go on after steps that each counted as one."""
        self.finished, self.steps = divmod(steps, self._progress.steps_per_epoch)
        self._start = float(steps - self.steps)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values."""
        return {"finished": self.finished, "steps": self.steps, "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        self.finished, self.steps = (read_number(state, name, int, 0) for name in ("finished", "steps"))
        self._start = read_number(state, "start", least=0)
