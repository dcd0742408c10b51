"""When the first batches are checked, together with the other processes."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from hf_importance.errors import UnweightedError
from hf_importance.losses.outputs import HINT

_LAST = 256
logger = logging.getLogger(__name__)

Gather = Callable[[list[float]], Tensor]
"""Values of this process to those of all, `[processes, values]`, float32 on the CPU."""


def alone(values: list[float]) -> Tensor:
    """The [`Gather`] of a single process."""
    return torch.tensor([values], dtype=torch.float32)


class FirstBatches:
    """When to check, until a check has decided: on batches 1, 2, 4, …, 256. Processes decide together.

    A check decides nothing while its losses are not finite, or could not differ: with logits of zero all losses are
    equal, whatever the weights of the classes. `hint` says what to do about a loss that was never compared.
    """

    def __init__(self, gather: Gather = alone, hint: str = HINT) -> None:
        self._gather, self._hint = gather, hint
        self.done = False
        self.batches = 0
        self._open = ""  # what the last check left open

    def due(self) -> bool:
        """Whether to check the next batch."""
        self.batches += not self.done
        return not self.done and self.batches & (self.batches - 1) == 0

    def together(self, check: Callable[[], list[float]], size: int) -> Tensor:
        """Call a check, which returns `size` values, in all processes; its error stops all of them.

        Returns the values of all, `[processes, size]`.
        """
        error: Exception | None = None
        try:
            values = check()
        except Exception as raised:
            error, values = raised, [0.0] * size
        kind = 0 if error is None else 1 if isinstance(error, UnweightedError) else 2
        table = self._gather([float(kind), *map(float, values)])
        worst = int(table[:, 0].max())
        if worst:
            self._open = ""
            if kind == worst:
                raise error
            of_all = UnweightedError if worst == 1 else ValueError  # without weights training may go on, in all of them
            raise of_all(f"A check failed in process {int(table[:, 0].argmax())}, whose error says why.") from error
        return table[:, 1:]

    @property
    def last(self) -> bool:
        """Whether this check is the last one."""
        return self.batches >= _LAST

    def decide(self, settled: bool, still_open: str = "") -> None:
        """End the checks if all is settled, or after the last of them, with a warning of what is still open."""
        self._open = "" if settled else still_open
        self.done = settled or self.last
        if self.done:
            self.warn()

    def refuse_coupled(self, changes: Callable[[bool], list[bool]], error: ValueError, still_open: str) -> None:
        """Raise the error if the losses couple the examples of a batch; done once a loss is finite.

        `changes(separately)` says whether there is a finite loss, and whether it changes with the other examples. That
        may be due to dropout or batch statistics, as in every training: then it is evaluated again without these.
        """

        def again() -> list[float]:
            if all(changes(True)):
                raise error
            return []

        votes = self.together(lambda: changes(False), 2)
        if votes[:, 1].any():
            self.together(again, 0)
        self.decide(bool(votes[:, 0].any()), still_open)

    def warn(self) -> None:
        """Name what was not settled, once; also at the end of a training."""
        if self._open:
            logger.warning(
                f"On the first {self.batches} batches, the loss could not be compared with that of the model itself: "
                f"{self._open}. If it is another one, training differs from that of Trainer. {self._hint}"
            )
        self._open = ""


# ---- when two losses agree -------------------------------------------------------------------------------------------


def tolerance(loss: Tensor | float, relative: float) -> Tensor | float:
    """Difference up to which two computations of a loss are equal."""
    return relative * abs(loss) + 1e-5


def precision_of(loss: Tensor, precisely: bool) -> float:
    """Relative error of a mean loss, by its type; `precisely` if both losses are computed in the same way."""
    if loss.dtype not in (torch.float32, torch.float64):
        return 3e-2
    return 1e-4 if precisely else 1e-3


def losses_agree(loss: Tensor, mean: Tensor, precisely: bool = False) -> bool:
    """Whether finite mean losses agree; see [`precision_of`]."""
    return torch.allclose(loss.float().mean(), mean.float(), rtol=precision_of(loss, precisely), atol=1e-5)
