"""The trainers of sentence-transformers, with losses that are the mean of one loss of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode

from hf_importance.adapters.base import UNKNOWN, ComputeLoss, LossAdapter, seen_of
from hf_importance.losses import per_example
from hf_importance.losses.first_batch import copies_of_the_first, looking, same
from hf_importance.losses.objective import Measured
from hf_importance.sampling.draw import Draw

_FUNCTIONS = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.huber_loss,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
}


class SentenceLoss(LossAdapter):
    """The losses whose last step is one loss of torch, a module or a function, of which they are the mean.

    Those of cross-encoders (binary cross-entropy, cross-entropy, squared error), of cosine similarities, of margins and
    of embeddings to be imitated. Importance is the gradient with respect to what that loss is given: logits,
    similarities, embeddings.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.start()
        if isinstance(trainer.loss, dict):
            raise ValueError(
                "loss must be one for all training data, but is one for each of several data sets: join these, or use "
                "the trainer of sentence-transformers."
            )

    def start(self) -> None:
        """See [`LossAdapter`]."""
        super().start()
        self._looked = False
        loss = self.trainer.loss
        self._modules = [] if isinstance(loss, dict) else [m for m in loss.modules() if isinstance(m, _Loss)]

    def measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """See [`LossAdapter`]."""
        size = len(draw.index)
        if not self._looked:
            self._refuse_coupled(compute_loss, model, inputs, size)
            self._looked = True
        losses, given = self._caught(compute_loss, model, inputs, size)
        importance = self.importance(losses, lambda: per_example.autograd_importance(losses, *given))
        return Measured(losses, importance, seen_of(losses), 0.0, None)

    def _caught(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], size: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of each example, and what it was computed from."""
        calls: list[_Call] = []
        hooks = [module.register_forward_hook(partial(_catch, calls), with_kwargs=True) for module in self._modules]
        try:
            if self._modules:
                compute_loss(model, dict(inputs))
            else:
                with _Losses(calls):
                    compute_loss(model, dict(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != 1:
            raise ValueError(
                f"{self._loss_name} takes {len(calls) or 'no'} losses of torch in a step, such as nn.MSELoss, and it "
                "takes one to know that of an example. Losses that compare the examples of a batch with each other "
                "(in-batch negatives, mined triplets) have none. Use the trainer of sentence-transformers."
            )
        each, args, kwargs = calls[0]
        losses = each(*args, **kwargs).float()
        if losses.shape[:1] != (size,):
            raise ValueError(f"{self._loss_name} has losses {list(losses.shape)} of {size} examples. {UNKNOWN}")
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
        return losses.view(size, -1).mean(1), given

    @property
    def _loss_name(self) -> str:
        return type(self.trainer.loss).__name__

    def _refuse_coupled(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], size: int) -> None:
        """By a batch that is the first example again and again; untrained models tell examples apart by little."""
        with looking(self.trainer.model):
            losses, _ = self._caught(compute_loss, model, inputs, size)
            alone, _ = self._caught(compute_loss, model, copies_of_the_first(inputs, size), size)
        precisely = self.trainer.accelerator.mixed_precision == "no"
        without_labels = inputs.get("label") is None  # the target is made of the batch, as which of it is the right one
        if without_labels or not same(losses[0], alone[0], precisely):
            reason = "its data have no label" if without_labels else "the loss of the first one changes with the others"
            raise ValueError(
                f"{self._loss_name} compares the examples of a batch with each other, as in-batch negatives do: "
                f"{reason}. Such losses cannot be weighted per example: use the trainer of sentence-transformers."
            )


_Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]
"""A loss without its reduction, and what it was called with."""


def _catch(calls: list[_Call], module: _Loss, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
    each = copy.copy(module)
    each.reduction = "none"
    calls.append((each, args, kwargs))


class _Losses(TorchFunctionMode):
    """Takes down the losses that are called as functions."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _FUNCTIONS:
            self._calls.append((function, args, {**kwargs, "reduction": "none"}))
        return function(*args, **kwargs)
