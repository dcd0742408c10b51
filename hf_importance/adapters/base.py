"""Base class of adapters, which replace [`objective.Objective`] for trainers that compute their own loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.losses.first_batch import FirstBatches, losses_agree
from hf_importance.losses.objective import Measured
from hf_importance.sampling.draw import Draw

_METRICS = ("logit_gradient", "loss", "uniform")
UNKNOWN = (
    "Its examples cannot be weighted with these settings or this version of the library: use the library's own trainer."
)
ComputeLoss = Callable[[Any, dict[str, Any]], Any]
"""`compute_loss(model, inputs)` of the adapted trainer; returns the loss, or the loss and the outputs."""


class LossAdapter(ABC):
    """Calls the `compute_loss` of a trainer, and extracts per-example losses and importances.

    Side effects of `compute_loss`, such as metrics, are kept. On the first batch with a finite loss, it is compared
    with the mean of the per-example losses.

    Args:
        trainer: the adapted trainer, with its model.

    Raises:
        ValueError: for settings without per-example losses.
    """

    takes_own_loss = False
    """Whether a `per_example_loss_func` can replace the loss of the trainer."""
    shifts = True
    """Whether tokens are predicted from the previous ones, if there are labels per token."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._metric = trainer.importance_config.metric
        self._batches = FirstBatches(trainer._gather_values, UNKNOWN)
        if self._metric not in _METRICS:
            raise ValueError(
                f"metric must be one of {list(_METRICS)} for {self.name}, but is {self._metric!r}: it needs the "
                "last layer of a model that this trainer calls itself."
            )

    @property
    def name(self) -> str:
        """Name of the trainer in messages."""
        return type(self.trainer).__name__

    @abstractmethod
    def measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """Measure one batch. The last call of `compute_loss` is the one used for training."""

    def __call__(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """Call [`measure`], and add the outputs if `compute_loss` returns any.

        Raises:
            ValueError: if the mean of the losses is not the loss of the trainer.
        """
        returned: list[Any] = []

        def kept(*args: Any) -> Any:
            returned.append(compute_loss(*args))
            return returned[-1]

        measured = self.measure(kept, model, inputs, draw)
        theirs, measured.outputs = returned[-1] if isinstance(returned[-1], tuple) else (returned[-1], None)
        if self._batches.due():
            losses = theirs.detach().as_subclass(Tensor), self.mean_of(measured).detach()
            _, finite = self._batches.together(partial(self._compare_finite, *losses), 1)
            self._batches.decide(bool(finite.any()), "it is not finite")
        return measured

    def mean_of(self, measured: Measured) -> Tensor:
        """The loss that the trainer computes from these losses, for a single batch."""
        return measured.weighted_mean(torch.ones_like(measured.losses))

    def _compare_finite(self, theirs: Tensor, ours: Tensor) -> tuple[None, list[bool]]:
        finite = bool(theirs.isfinite().all())
        if finite:
            self._compare(theirs, ours)
        return None, [finite]

    def _compare(self, theirs: Tensor, ours: Tensor) -> None:
        if not losses_agree(theirs, ours):
            raise ValueError(
                f"The loss of {self.name} on the first batch is {theirs.item():.5g}, but the mean of its "
                f"per-example losses is {ours.item():.5g}. {UNKNOWN}"
            )

    def count(self, labels: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Number of positions with a loss per example, `[batch]`; for losses that are sums over positions.

        Args:
            labels: collated labels.
            lengths: number of tokens of each example, if all are in one row.
        """
        raise NotImplementedError

    def importance(self, losses: Tensor, of_logits: Callable[[], Tensor]) -> Tensor:
        """Importances `[batch]` according to `ImportanceConfig.metric`."""
        if self._metric == "uniform":
            return torch.ones_like(losses, requires_grad=False)
        return losses.detach().clamp(min=0) if self._metric == "loss" else of_logits().detach()

    def start(self) -> None:
        """Reset at the start of training, possibly with another model."""
        self._batches = FirstBatches(self.trainer._gather_values, UNKNOWN)

    def close(self) -> None:
        """Warn if the losses were never compared."""
        self._batches.warn()

    def state_dict(self) -> dict[str, Any]:
        """A state that makes [`objective.Objective`] repeat its checks."""
        return {"loss": [type(self).__name__], "looked": False, "shifts": False, "adds": False}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Nothing to restore: comparing the losses again does not affect training."""


def outputs_of(compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], look: Any = None) -> list[Any]:
    """Outputs of all calls of the model that `compute_loss` makes.

    Args:
        compute_loss: method of the adapted trainer.
        model: the model.
        inputs: the batch.
        look: called with the outputs before they are returned to `compute_loss`.
    """
    found = []

    def call(**kwargs: Any) -> Any:
        outputs = model(**kwargs)
        if look is not None:
            look(outputs)
        found.append(outputs)
        return outputs

    compute_loss(call, inputs)
    return found
