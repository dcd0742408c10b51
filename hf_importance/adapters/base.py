"""Base class of adapters, which replace [`objective.Objective`] for trainers that compute their own loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.errors import UnweightedError
from hf_importance.losses.first_batch import FirstBatches, Gather, alone, losses_agree
from hf_importance.losses.objective import Measured
from hf_importance.losses.outputs import Inputs, importance_by

UNKNOWN = (
    "Its examples cannot be weighted with these settings or this version of the library: use the library's own trainer."
)
Lengths = list[int] | None
"""Number of tokens of each example, if a collator has concatenated all into one row."""
ComputeLoss = Callable[[Any, Inputs], Any]
"""`compute_loss(model, inputs)` of the adapted trainer; returns the loss, or the loss and the outputs."""


class LossAdapter(ABC):
    """Calls the `compute_loss` of a trainer, and extracts per-example losses and importances.

    Side effects of `compute_loss`, such as metrics, are kept. On the first batch with a finite loss, it is compared
    with the mean of the per-example losses. Settings without per-example losses are refused with a ValueError.
    """

    takes_own_loss = False
    """Whether a `per_example_loss_func` can replace the loss of the trainer."""
    shifts = True
    """Whether tokens are predicted from the previous ones, if there are labels per token."""

    def __init__(self, trainer: Any, gather: Gather = alone) -> None:
        self.trainer = trainer
        self._batches = FirstBatches(gather, UNKNOWN)

    @abstractmethod
    def _measure(self, compute_loss: ComputeLoss, model: Any, inputs: Inputs, batch: int, lengths: Lengths) -> Measured:
        """Measure one batch. The last call of `compute_loss` is the one used for training."""

    def __call__(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: Inputs, batch: int, lengths: Lengths = None
    ) -> Measured:
        """Measure a batch of so many examples, compare its loss, and add the outputs if `compute_loss` returns any."""
        returned: list[Any] = []

        def recorded(*args: Any) -> Any:
            returned.append(compute_loss(*args))
            return returned[-1]

        measured = self._measure(recorded, model, inputs, batch, lengths)
        loss, measured.outputs = returned[-1] if isinstance(returned[-1], tuple) else (returned[-1], None)
        if self._batches.due():
            check = partial(self._check_loss, loss.detach(), self.mean_of(measured).detach())
            finite = self._batches.together(check, 1)
            self._batches.decide(bool(finite.any()), "it is not finite")
        return measured

    def mean_of(self, measured: Measured) -> Tensor:
        """The loss that the trainer computes from these losses, for a single batch."""
        return measured.weighted_mean(torch.ones_like(measured.losses))

    def _check_loss(self, loss: Tensor, mean: Tensor) -> list[bool]:
        finite = bool(loss.isfinite().all())
        if finite and not losses_agree(loss, mean):
            raise self._another_loss(loss.item(), mean.item())
        return [finite]

    def _another_loss(self, loss: float, mean: float) -> UnweightedError:
        return UnweightedError(
            f"The loss of {type(self.trainer).__name__} on the first batch is {loss:.5g}, but the mean of its "
            f"per-example losses is {mean:.5g}. {UNKNOWN}"
        )

    def importance(self, losses: Tensor, of_logits: Callable[[], Tensor]) -> Tensor:
        """Importances `[batch]`, by the metric that is set."""
        return importance_by(self.trainer.importance_config.metric, losses, of_logits)

    def close(self) -> None:
        """Warn if the losses were never compared."""
        self._batches.warn()

    def state_dict(self) -> dict[str, Any]:
        """A state that makes [`objective.Objective`] repeat its checks."""
        return {"loss": [type(self).__name__]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Nothing to restore: comparing the losses again does not affect training."""
