"""What models return and accept: logits, losses, labels; and what is observed of them for the report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.errors import UnweightedError
from hf_importance.losses.per_example import IGNORE_INDEX, observed_classes

Inputs = dict[str, Any]
Labels = dict[str, Any]

SPAN = ("start_positions", "end_positions")
SPAN_LOGITS = ("start_logits", "end_logits")
HINT = "Pass per_example_loss_func=f with f(outputs, labels[, inputs]) -> Tensor[batch] that computes it."


# ---- outputs: a mapping, a tuple that starts with the loss if the model was given labels, or the logits --------------


def logits_of(
    outputs: Any, batch: int, with_labels: bool = False, names: tuple[str, ...] = ("logits",)
) -> list[Tensor]:
    """The logits `[batch, …]` with these names; a ValueError if there are none with one row per example."""
    if isinstance(outputs, Mapping):
        logits = [outputs.get(name) for name in names]
    else:
        logits = list(without_loss(outputs, with_labels)[: len(names)])
    if len(logits) < len(names) or not all(isinstance(value, Tensor) for value in logits):
        raise UnweightedError(
            f"The model must return a dict with {' and '.join(map(repr, names))}, or a tuple that starts with it, but "
            f"returned {described(outputs)}. {HINT} Losses that compare the examples of a batch (contrastive, "
            "preference pairs) cannot be weighted per example: use Trainer for them."
        )
    for name, value in zip(names, logits, strict=True):
        if value.shape[:1] != (batch,):
            raise UnweightedError(
                f"{name} must have shape [{batch}, …], one row per example, but has {list(value.shape)}."
            )
    return logits


def any_logits(outputs: Any, with_labels: bool = False) -> Tensor | None:
    """The logits, of any shape; None if there are none."""
    values = [outputs.get("logits")] if isinstance(outputs, Mapping) else without_loss(outputs, with_labels)
    return values[0] if values and isinstance(values[0], Tensor) else None


def model_loss(outputs: Any) -> Tensor | None:
    """The model's own loss from outputs computed with labels; None if there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) else None
    return first if isinstance(first, Tensor) and first.numel() == 1 else None


def without_loss(outputs: Any, with_labels: bool) -> tuple[Any, ...]:
    """The outputs as a tuple, without the loss that comes first in a tuple `with_labels`."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(outputs[int(with_labels) :]) if isinstance(outputs, (tuple, list)) else ()


def described(outputs: Any) -> str:
    """What was returned, for messages."""
    return f"the keys {list(outputs)}" if isinstance(outputs, Mapping) else type(outputs).__name__


# ---- labels ----------------------------------------------------------------------------------------------------------


def count(labels: Tensor) -> Tensor:
    """Number of positions with a loss per example, float32 `[batch]`."""
    has_loss = labels != IGNORE_INDEX
    return has_loss.float() if has_loss.dim() == 1 else has_loss.view(len(labels), -1).sum(1).float()


def validate_classes(logits: Tensor, labels: Tensor) -> None:
    """Refuse classes that the model does not have, which would cause a device-side assertion on a GPU."""
    kept = labels[labels != IGNORE_INDEX]
    classes = logits.shape[1 if logits.dim() == 4 else -1] if logits.dim() else 1
    if not labels.is_floating_point() and classes > 1 and kept.numel() and not 0 <= kept.min() <= kept.max() < classes:
        raise ValueError(
            f"Labels must be in 0 … {classes - 1}, as the model has {classes} outputs, but are in "
            f"{kept.min().item()} … {kept.max().item()}: correct the labels, or num_labels of the model."
        )


# ---- models ----------------------------------------------------------------------------------------------------------


def requires(model: nn.Module, names: Collection[str]) -> bool:
    """Whether any of these arguments is required by `model.forward`."""
    parameters = inspect.signature(model.forward).parameters
    return any(name in parameters and parameters[name].default is inspect.Parameter.empty for name in names)


def without_peft(model: nn.Module) -> nn.Module:
    """The model without its PEFT wrapper, if any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- what is measured ------------------------------------------------------------------------------------------------


def importance_by(metric: str, losses: Tensor, of_logits: Callable[[], Tensor]) -> Tensor:
    """Importances `[batch]` by `ImportanceConfig.metric`: of the logits, of the losses, or equal ones."""
    if metric == "uniform":
        return torch.ones_like(losses, requires_grad=False)
    return losses.detach().clamp(min=0) if metric == "loss" else of_logits().detach()


@torch.no_grad()
def observed_of(losses: Tensor, logits: Tensor | None = None, target: Any = None) -> dict[str, Tensor]:
    """The label, loss, prediction and probability of the prediction, float32 `[batch]` each; NaN where unknown."""
    losses = losses.detach().float()
    unknown = torch.full_like(losses, torch.nan)
    observed = {"label": unknown, "loss": losses, "prediction": unknown, "probability": unknown}
    if not isinstance(target, Tensor) or logits is None or target.numel() != len(losses):
        return observed
    logits, target = logits.detach(), target.detach().flatten()
    if logits.numel() == len(losses):
        return observed | {"label": target.float(), "prediction": logits.flatten().float()}
    if logits.dim() == 2 and not target.is_floating_point():
        return observed | observed_classes(logits.float().softmax(-1), target, target == IGNORE_INDEX)
    return observed
