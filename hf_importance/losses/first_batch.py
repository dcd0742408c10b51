"""Checks on the first batch: the computed loss must be the one that the model would train with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.losses.heads import HINT, Terms, predictions_of, with_predictions
from hf_importance.randomness import isolated_randomness


@contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """Forward passes in evaluation mode without gradients; modes, buffers and random states are restored."""
    training = [module for module in model.modules() if module.training]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    devices = {parameter.device for parameter in model.parameters()}
    model.eval()
    try:
        with torch.no_grad(), isolated_randomness(devices=devices):
            yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer.data.copy_(value) if buffer.requires_grad else buffer.copy_(value)
        for module in training:
            module.training = True


def refuse_another_loss(theirs: Tensor, ours: Tensor) -> None:
    """Check that the loss of the model is the mean of the per-example losses.

    Raises:
        ValueError: if they differ.
    """
    if not losses_agree(theirs, ours):
        raise ValueError(
            f"The model's loss on the first batch is {theirs.mean().item():.5g}, but the mean of the usual "
            f"per-example losses is {ours.item():.5g}: the model has its own loss (class weights, another reduction, "
            f"…). {HINT}"
        )


def losses_agree(theirs: Tensor, ours: Tensor, precisely: bool = False) -> bool:
    """Whether mean losses agree to the precision of their type; `precisely` if both are computed the same way."""
    tolerance = (1e-4 if precisely else 1e-3) if theirs.dtype == torch.float32 else 3e-2
    return torch.allclose(theirs.float().mean(), ours.float(), rtol=tolerance, atol=1e-5, equal_nan=True)


def refuse_coupled(outputs: Any, terms_of: Callable[[Any], Terms], batch: int, after_loss: bool) -> Tensor:
    """Check that a user-defined loss does not depend on the outputs of other examples.

    Returns:
        The losses, `[batch]`.

    Raises:
        ValueError: if it does, or if it does not depend on the outputs at all.
    """
    found = predictions_of(outputs, batch, after_loss)
    leaves = {key: value.detach().requires_grad_() for key, value in found.items()}
    losses = terms_of(with_predictions(outputs, leaves)).losses
    if not losses.requires_grad:
        names = " or ".join(map(str, leaves))
        raise ValueError(f"per_example_loss_func must compute the losses from the {names} in outputs.")
    for gradient in torch.autograd.grad(losses[0], list(leaves.values()), allow_unused=True):
        if gradient is not None and gradient[1:].nan_to_num(nan=0.0).any():  # NaN comes from 0 · ∞
            raise _coupled("depends on the logits of other examples")
    return losses.detach()


def refuse_coupled_by_model(losses: Tensor, alone: Tensor) -> None:
    """Check that losses do not change with the other examples of a batch, as in-batch similarities do.

    Args:
        losses: losses of the first batch, `[batch]`.
        alone: losses of copies of its first example, `[batch]`.

    Raises:
        ValueError: if the loss of the first example differs by more than numerical errors.
    """
    if not losses_agree(losses[0], alone[0]):
        raise _coupled("changes with the other examples")


def copies_of_the_first(batch: Any, size: int) -> Any:
    """A batch of copies of its first example, applied to tensors and lists with one row per example, and mappings."""
    if isinstance(batch, Tensor):
        return batch[:1].expand_as(batch).clone() if batch.shape[:1] == (size,) else batch
    if isinstance(batch, Mapping):
        return {name: copies_of_the_first(value, size) for name, value in batch.items()}
    return [batch[0]] * size if isinstance(batch, list) and len(batch) == size else batch


def _coupled(how: str) -> ValueError:
    return ValueError(
        f"per_example_loss_func must compute each loss from one example alone, but the first loss {how}: such losses "
        "cannot be weighted per example. Use Trainer instead."
    )


def requires(model: nn.Module, names: Collection[str]) -> bool:
    """Whether any of these arguments is required by `model.forward`."""
    parameters = inspect.signature(model.forward).parameters
    return any(name in parameters and parameters[name].default is inspect.Parameter.empty for name in names)


def accepts(model: nn.Module, names: Collection[str]) -> bool:
    """Whether `model.forward` accepts all of these arguments."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return takes_all or set(names) <= set(parameters)


def may_skip_logits(model: nn.Module) -> bool:
    """Whether the model may skip its logits in training when it is given labels, as with the Liger kernels."""
    return "skip_logits" in inspect.signature(without_peft(model).forward).parameters


def without_peft(model: nn.Module) -> nn.Module:
    """The model without its PEFT wrapper, if any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
