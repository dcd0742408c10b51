"""Per-example losses from the outputs and labels of a model, by the rules of the heads of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_importance.losses import per_example

LossOfInputs = Callable[[Any, Any, dict[str, Any]], Tensor]
PerExampleLoss = Callable[[Any, Any], Tensor] | LossOfInputs
"""`f(outputs, labels)` or `f(outputs, labels, inputs)`, to `[batch]`."""
Labels = dict[str, Any]

SPAN = ("start_positions", "end_positions")
HINT = "Pass per_example_loss_func=f with f(outputs, labels[, inputs]) -> Tensor[batch] that computes it."
_SPAN_LOGITS = ("start_logits", "end_logits")
_CLASSIFICATION = {
    "single_label_classification": (per_example.cross_entropy, per_example.cross_entropy_importance),
    "multi_label_classification": (per_example.binary_cross_entropy, per_example.binary_cross_entropy_importance),
    "regression": (per_example.squared_error, per_example.squared_error_importance),
}


@dataclass
class Terms:
    """Losses of one batch.

    Args:
        losses: per-example losses `[batch]`, with gradient.
        importance: computes the importances `[batch]`.
        mean: computes the loss of the batch as the model's own head does.
        counted: number of positions with a loss per example, `[batch]`; None if each has exactly one.
        are_sums: whether losses are sums over positions, whose number differs between examples.
    """

    losses: Tensor
    importance: Callable[[], Tensor]
    mean: Callable[[], Tensor]
    counted: Tensor | None = None
    are_sums: bool = False


# ---- heads -----------------------------------------------------------------------------------------------------------


def classification(logits: Tensor, labels: Tensor, problem_type: str | None, smoothing: float = 0.0) -> Terms:
    """One loss per example: cross-entropy, binary cross-entropy or squared error.

    Args:
        logits: `[batch, …, outputs]`, or `[batch]` for regression.
        labels: result of [`read_labels`].
        problem_type: from the model config; None to infer it from logits and labels as transformers does.
        smoothing: label smoothing, for cross-entropy only.

    Raises:
        ValueError: if logits, labels and settings do not match.
    """
    problem_type = problem_type or _usual_problem_type(logits, labels)
    if problem_type not in _CLASSIFICATION:
        raise ValueError(f"config.problem_type must be one of {list(_CLASSIFICATION)}, but is {problem_type!r}.")
    loss, importance = _CLASSIFICATION[problem_type]
    if problem_type != "single_label_classification":
        if smoothing:
            raise ValueError(
                f"label_smoothing_factor is for single-label classification, not {problem_type}: set it to 0."
            )
        if labels.is_floating_point() and labels.numel() == len(logits) < logits.numel():
            raise ValueError(
                f"Labels are one number per example ({labels.dtype}), but the model has {logits.shape[-1]} outputs: "
                "convert classes to integers, as in row['labels'] = int(row['labels']), or set num_labels=1 for "
                "regression."
            )
        losses = loss(logits, labels)
        return Terms(losses, partial(importance, logits, labels), losses.mean)
    counted = None
    if not labels.is_floating_point():
        labels = labels.view(logits.shape[:-1])
        counted = count(labels)
    losses = loss(logits, labels, smoothing)
    mean = losses.mean if counted is None else lambda: losses.sum() / counted.sum()
    return Terms(losses, partial(importance, logits, labels, smoothing), mean, counted)


def tokens(logits: Tensor, labels: Tensor, shifts: bool, smoothing: float = 0.0) -> Terms:
    """Cross-entropy, summed over the tokens of an example.

    Args:
        logits: `[batch, tokens, classes]`; with prompt tuning, virtual tokens come first.
        labels: int64 `[batch, tokens]`, -100 where there is no loss.
        shifts: whether each token is predicted from the previous ones.
        smoothing: label smoothing.
    """
    virtual = logits.shape[1] - labels.shape[1]
    counted = count(predicted(labels, shifts))  # as in `Trainer`, which ignores virtual tokens
    labels = predicted(F.pad(labels, (virtual, 0), value=per_example.IGNORE_INDEX), shifts)
    losses = per_example.cross_entropy(logits, labels, smoothing)
    importance = partial(per_example.cross_entropy_importance, logits, labels, smoothing)
    return Terms(losses, importance, lambda: losses.sum() / count(labels).sum(), counted, are_sums=True)


def predicted(labels: Tensor, shifts: bool) -> Tensor:
    """The label that each position predicts."""
    return F.pad(labels, (0, 1), value=per_example.IGNORE_INDEX)[:, 1:] if shifts else labels


def pixels(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Terms:
    """Cross-entropy, summed over the pixels of a mask; logits are resized to the mask.

    Args:
        logits: `[batch, classes, height, width]`, usually smaller than the mask.
        labels: int64 `[batch, height, width]`, -100 where there is no loss.
        smoothing: label smoothing.

    Raises:
        ValueError: for a model with one output.
    """
    if logits.shape[1] == 1:
        raise ValueError(f"A mask of two classes requires a model with two outputs, but it has one. {HINT}")
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    losses, counted = per_example.pixel_cross_entropy(logits, labels, smoothing), count(labels)
    importance = partial(per_example.pixel_cross_entropy_importance, logits, labels, smoothing)
    return Terms(losses, importance, lambda: losses.sum() / counted.sum(), counted, are_sums=True)


def span(start_logits: Tensor, end_logits: Tensor, labels: Labels) -> Terms:
    """Mean of the cross-entropies of start and end; positions beyond the text have no loss.

    Args:
        start_logits: `[batch, tokens]`.
        end_logits: `[batch, tokens]`.
        labels: `start_positions` and `end_positions`, int64 `[batch]`.
    """
    pairs = []
    for logits, name in zip((start_logits, end_logits), SPAN, strict=True):
        position = labels[name].view(len(logits)).clamp(min=0)
        pairs.append((logits, position.masked_fill(position >= logits.shape[1], per_example.IGNORE_INDEX)))
    losses = [per_example.cross_entropy(*pair) for pair in pairs]
    counted = [count(position) for _, position in pairs]
    return Terms(
        sum(losses) / 2,
        lambda: torch.stack([per_example.cross_entropy_importance(*pair) for pair in pairs]).norm(dim=0) / 2,
        lambda: sum(loss.sum() / number.sum() for loss, number in zip(losses, counted, strict=True)) / 2,
        sum(counted) / 2,
    )


def custom(
    function: LossOfInputs, outputs: Any, labels: Any, inputs: dict[str, Any], batch: int, after_loss: bool = False
) -> Terms:
    """Losses of a user-defined function, with gradients with respect to the logits by autograd.

    Args:
        function: result of [`with_inputs`].
        outputs: outputs of the model.
        labels: labels in the form that the function expects.
        inputs: inputs of the model.
        batch: number of examples.
        after_loss: whether a tuple of outputs starts with a loss.

    Raises:
        ValueError: if the function does not return one loss per example.
    """
    losses = function(outputs, labels, inputs)
    if not isinstance(losses, Tensor) or losses.shape != (batch,):
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"per_example_loss_func must return a tensor of shape [{batch}], but returned {found}.")
    predictions = predictions_of(outputs, batch, after_loss).values()
    return Terms(losses, partial(per_example.autograd_importance, losses, *predictions), losses.mean)


def with_inputs(function: PerExampleLoss) -> LossOfInputs:
    """Wrap the user's function as a function of `(outputs, labels, inputs)`.

    It receives the inputs if it has a third argument without a default, or an argument `inputs` after the first two.

    Raises:
        TypeError: if it accepts neither two nor three such arguments.
    """
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # some functions not written in Python have no signature
        return lambda outputs, labels, _: function(outputs, labels)
    parameters = list(signature.parameters.values())
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in places[:2]]
    third = any(p.default is p.empty for p in places[2:3])
    named = not third and "inputs" in names

    def called(outputs: Any, labels: Any, inputs: dict[str, Any]) -> Tensor:
        return function(outputs, labels, *([inputs] if third else ()), **({"inputs": inputs} if named else {}))

    try:
        signature.bind(None, None, *([None] if third else ()), **({"inputs": None} if named else {}))
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            "per_example_loss_func must be a function f(outputs, labels) or f(outputs, labels, inputs) -> "
            f"Tensor[batch], but {name}{signature} cannot be called that way: {error}."
        ) from error
    return called


# ---- outputs ---------------------------------------------------------------------------------------------------------


def logits_of(outputs: Any, batch: int, after_loss: bool = False, span: bool = False) -> list[Tensor]:
    """The logits `[batch, …]`, or the start and end logits of a span.

    Args:
        outputs: a mapping with the logits, a tuple that starts with them, or the logits.
        batch: number of examples.
        after_loss: whether a tuple of outputs starts with a loss.
        span: whether to return start and end logits.

    Raises:
        ValueError: if there are no logits with one row per example.
    """
    keys = _SPAN_LOGITS if span else ("logits",)
    if isinstance(outputs, Mapping):
        found = [outputs.get(key) for key in keys]
    else:
        found = _in_tuple(outputs, after_loss)[: len(keys)]
    if len(found) < len(keys) or not all(isinstance(logits, Tensor) for logits in found):
        raise ValueError(
            f"The model must return a dict with {' and '.join(map(repr, keys))}, or a tuple that starts with it, but "
            f"returned {_described(outputs)}. {HINT} Losses that compare the examples of a batch (contrastive, "
            "preference pairs) cannot be weighted per example: use Trainer for them."
        )
    for key, logits in zip(keys, found, strict=True):
        if logits.shape[:1] != (batch,):
            raise ValueError(f"{key} must have shape [{batch}, …], one row per example, but has {list(logits.shape)}.")
    return found


def decision_of(outputs: Any, after_loss: bool = False) -> Tensor | None:
    """The logits, of any shape; None if there are none."""
    found = [outputs.get("logits")] if isinstance(outputs, Mapping) else _in_tuple(outputs, after_loss)
    return found[0] if found and isinstance(found[0], Tensor) else None


def predictions_of(outputs: Any, batch: int, after_loss: bool = False) -> dict[str | int, Tensor]:
    """Outputs that a user-defined loss may depend on, by key or position: logits and boxes, one row per example.

    If no output has such a name, all floating-point tensors with one row per example.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(outputs, Mapping):
        named = {key: value for key, value in outputs.items() if key.endswith("logits") or key.startswith("pred_")}
        named = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if any(value.shape[:1] != (batch,) for value in named.values()):
            logits_of(outputs, batch)  # raises
        found = named or {key: value for key, value in outputs.items() if key != "loss"}
    else:
        found = dict(
            enumerate(_in_tuple(outputs, after_loss), start=int(after_loss and not isinstance(outputs, Tensor)))
        )
    found = {
        key: value
        for key, value in found.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == (batch,)
    }
    if not found:
        raise ValueError(
            f"The model must return its logits, [{batch}, …], in a dict or a tuple, but returned {_described(outputs)}."
        )
    return found


def with_predictions(outputs: Any, predictions: Mapping[str | int, Tensor]) -> Any:
    """The outputs with the result of [`predictions_of`] replaced."""
    if isinstance(outputs, Tensor):
        return predictions[0]
    if not isinstance(outputs, Mapping):
        values = [predictions.get(place, value) for place, value in enumerate(outputs)]
        return type(outputs)(*values) if hasattr(outputs, "_fields") else type(outputs)(values)
    for key, value in predictions.items():
        outputs[key] = value
    return outputs


def loss_of(outputs: Any) -> Tensor | None:
    """The model's own loss from outputs computed with labels; None if there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) else None
    return first if isinstance(first, Tensor) and first.numel() == 1 else None


def _in_tuple(outputs: Any, after_loss: bool) -> list[Any]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs[int(after_loss) :]) if isinstance(outputs, (tuple, list)) else []


def _described(outputs: Any) -> str:
    return f"the keys {list(outputs)}" if isinstance(outputs, Mapping) else type(outputs).__name__


# ---- labels ----------------------------------------------------------------------------------------------------------


def whole_numbers(labels: Labels) -> Labels:
    """Convert labels to types that heads and models accept: int64 for integers and booleans, float32 for floats."""

    def read(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.float() if value.is_floating_point() else value.long()

    return {name: read(value) for name, value in labels.items()}


def read_labels(labels: Tensor, logits: Tensor, problem_type: str | None) -> Tensor:
    """Convert labels of multi-label classification to float32; others are unchanged. See [`whole_numbers`]."""
    many = labels.shape == logits.shape and logits.dim() == 2 and logits.shape[1] > 1
    several = problem_type == "multi_label_classification" or (many and problem_type is None)
    return labels.float() if several and not labels.is_floating_point() else labels


def count(labels: Tensor) -> Tensor:
    """Number of positions with a loss per example, float32 `[batch]`."""
    counted = labels != per_example.IGNORE_INDEX
    return counted.float() if counted.dim() == 1 else counted.view(len(labels), -1).sum(1).float()


def refuse_out_of_range(logits: Tensor, labels: Tensor) -> None:
    """Check the range of class labels, which would cause a device-side assertion on a GPU.

    Raises:
        ValueError: if the model does not have these classes.
    """
    kept = labels[labels != per_example.IGNORE_INDEX]
    classes = logits.shape[1 if logits.dim() == 4 else -1] if logits.dim() else 1
    if not labels.is_floating_point() and classes > 1 and kept.numel() and not 0 <= kept.min() <= kept.max() < classes:
        raise ValueError(
            f"Labels must be in 0 … {classes - 1}, as the model has {classes} outputs, but are in "
            f"{kept.min().item()} … {kept.max().item()}: correct the labels, or num_labels of the model."
        )


def _usual_problem_type(logits: Tensor, labels: Tensor) -> str:
    if logits.dim() == 1 or logits.shape[-1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
