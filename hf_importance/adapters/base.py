"""What stands in the place of an [`Objective`] where a trainer computes its loss by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.losses.first_batch import same
from hf_importance.losses.objective import Measured
from hf_importance.sampling.draw import Draw

_METRICS = ("logit_gradient", "loss", "uniform")
UNKNOWN = (
    "Its examples cannot be weighted with these settings or this version of the library: use the library's own trainer."
)
ComputeLoss = Callable[[Any, dict[str, Any]], Any]
"""`compute_loss(model, inputs)` of the trainer that is adapted; the loss, or the loss and the outputs."""


class LossAdapter(ABC):
    """Calls the `compute_loss` of a trainer, and has from it the loss of each example and its importance.

    What that method does beside its loss, as metrics, is kept. Its loss is the mean of those of the examples, which
    each batch is compared with until one has passed.

    Args:
        trainer: that is adapted, with its model.

    Raises:
        ValueError: for settings with which there are no losses per example.
    """

    takes_own_loss = False
    """Whether a `per_example_loss_func` can take the place of the loss of the trainer."""
    shifts = True
    """Whether tokens, where there are labels for them, are predicted from those before them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._metric = trainer.importance_config.metric
        self._compared = False
        if self._metric not in _METRICS:
            raise ValueError(
                f"metric must be one of {list(_METRICS)} for {self.name}, but is {self._metric!r}: it needs the "
                "last layer of a model that this trainer calls itself."
            )

    @property
    def name(self) -> str:
        """Of the trainer, in messages."""
        return type(self.trainer).__name__

    @abstractmethod
    def measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """What one batch gives. The last call of `compute_loss` is the one that trains."""

    def __call__(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """As [`measure`], with the outputs that `compute_loss` was asked for, if any.

        Raises:
            ValueError: if the mean of the losses is not the loss of the trainer.
        """
        returned: list[Any] = []

        def kept(*args: Any) -> Any:
            returned.append(compute_loss(*args))
            return returned[-1]

        measured = self.measure(kept, model, inputs, draw)
        theirs, measured.outputs = returned[-1] if isinstance(returned[-1], tuple) else (returned[-1], None)
        if not self._compared:
            self._compare(theirs.detach().as_subclass(Tensor), self.mean_of(measured).detach())
            self._compared = True
        return measured

    def mean_of(self, measured: Measured) -> Tensor:
        """What the trainer makes of these losses, of one batch alone."""
        return measured.weighted_mean(torch.ones_like(measured.losses))

    def _compare(self, theirs: Tensor, ours: Tensor) -> None:
        if not same(theirs, ours):
            raise ValueError(
                f"The loss of {self.name} on the first batch is {theirs.item():.5g}, but the mean of its "
                f"per-example losses is {ours.item():.5g}. {UNKNOWN}"
            )

    def count(self, labels: Tensor, lengths: list[int] | None = None) -> Tensor:
        """`[batch]`: how many positions of each example have a loss; for losses that are sums over these.

        Args:
            labels: as the collator makes them.
            lengths: of the examples, where all of them are in one row.
        """
        raise NotImplementedError

    def importance(self, losses: Tensor, of_logits: Callable[[], Tensor]) -> Tensor:
        """`[batch]`, as `ImportanceConfig.metric` wants it."""
        if self._metric == "uniform":
            return torch.ones_like(losses, requires_grad=False)
        return losses.detach().clamp(min=0) if self._metric == "loss" else of_logits().detach()

    def start(self) -> None:
        """A training begins, maybe of another model."""
        self._compared = False

    def close(self) -> None:  # noqa: B027
        """There is nothing to be undone."""

    def state_dict(self) -> dict[str, Any]:
        """What an [`Objective`] would find, if it went on from here: that it has to look for itself."""
        return {"loss": [type(self).__name__], "looked": False, "shifts": False, "adds": False}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """There is nothing to be restored: to compare again has no effect on training."""


def outputs_of(compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], look: Any = None) -> list[Any]:
    """What the model returns, at each of the calls that `compute_loss` makes.

    Args:
        compute_loss: see above.
        model: likewise.
        inputs: likewise.
        look: called with the outputs before `compute_loss` gets them.
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
