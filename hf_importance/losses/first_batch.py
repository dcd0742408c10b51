"""The first batch shows whether the loss that is computed is the one that the model would have trained with."""

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
    """Forward passes that leave no trace: no gradient, no dropout; then modes, buffers and random numbers as before."""
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
    """Compare the loss of the model with the mean of ours.

    Raises:
        ValueError: if they differ.
    """
    if not same(theirs, ours):
        raise ValueError(
            f"The model's loss on the first batch is {theirs.mean().item():.5g}, but the mean of the usual "
            f"per-example losses is {ours.item():.5g}: the model has its own loss (class weights, another reduction, "
            f"…). {HINT}"
        )


def same(theirs: Tensor, ours: Tensor, precisely: bool = False) -> bool:
    """To the precision of the type of the loss: of two ways to compute it, or `precisely` of one and the same."""
    tolerance = (1e-4 if precisely else 1e-3) if theirs.dtype == torch.float32 else 3e-2
    return torch.allclose(theirs.float().mean(), ours.float(), rtol=tolerance, atol=1e-5, equal_nan=True)


def refuse_coupled(outputs: Any, terms_of: Callable[[Any], Terms], batch: int, after_loss: bool) -> Tensor:
    """No loss of the user's own may depend on what the model returned for another example.

    Returns:
        The losses, `[batch]`.

    Raises:
        ValueError: if one does, or if it depends on nothing that the model returned.
    """
    found = predictions_of(outputs, batch, after_loss)
    leaves = {key: value.detach().requires_grad_() for key, value in found.items()}
    losses = terms_of(with_predictions(outputs, leaves)).losses
    if not losses.requires_grad:
        names = " or ".join(map(str, leaves))
        raise ValueError(f"per_example_loss_func must compute the losses from the {names} in outputs.")
    for gradient in torch.autograd.grad(losses[0], list(leaves.values()), allow_unused=True):
        if gradient is not None and gradient[1:].nan_to_num(nan=0.0).any():  # NaN: of 0 · ∞
            raise _coupled("depends on the logits of other examples")
    return losses.detach()


def refuse_coupled_by_model(losses: Tensor, alone: Tensor) -> None:
    """No loss may change with the other examples of a batch, as those of similarities between them do.

    Args:
        losses: of the first batch, `[batch]`.
        alone: the same, of copies of its first example.

    Raises:
        ValueError: if that of the first example differs by more than numerics make of it.
    """
    if not same(losses[0], alone[0]):
        raise _coupled("changes with the other examples")


def copies_of_the_first(batch: Any, size: int) -> Any:
    """A batch of copies of its first example: of all that has a row per example, in mappings and lists of rows."""
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
    """Whether the model cannot be called without these arguments."""
    parameters = inspect.signature(model.forward).parameters
    return any(name in parameters and parameters[name].default is inspect.Parameter.empty for name in names)


def accepts(model: nn.Module, names: Collection[str]) -> bool:
    """Whether the model can be called with these arguments."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return takes_all or set(names) <= set(parameters)


def may_skip_logits(model: nn.Module) -> bool:
    """Whether it builds no logits in training when it is given labels, unless told to, as with the kernels of Liger."""
    return "skip_logits" in inspect.signature(without_peft(model).forward).parameters


def without_peft(model: nn.Module) -> nn.Module:
    """The model in the wrapper of PEFT; itself if it is in none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
