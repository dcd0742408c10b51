"""From what a model returns, and its labels, to losses per example: by the rules of the heads of transformers."""

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
    """What one batch adds to the loss.

    Args:
        losses: `[batch]`, with gradient.
        importance: computes that of each, `[batch]`.
        mean: computes the loss of the batch as the model's own head takes it.
        counted: `[batch]`: in how many positions an example has a loss; None: all have one, in one.
        are_sums: whether losses are sums over positions, of which examples have different numbers.
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
        labels: as [`read_labels`] gives them.
        problem_type: of the config of the model; None: what transformers makes of the logits and the type of labels.
        smoothing: of labels; for cross-entropy.

    Raises:
        ValueError: where they do not fit.
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
        logits: `[batch, tokens, classes]`, of prompt tuning with virtual tokens before the others.
        labels: int64 `[batch, tokens]`, -100 where there is no loss.
        shifts: whether a token is predicted from those before it.
        smoothing: of labels.
    """
    virtual = logits.shape[1] - labels.shape[1]
    counted = count(predicted(labels, shifts))  # as `Trainer` counts, which knows of no virtual tokens
    labels = predicted(F.pad(labels, (virtual, 0), value=per_example.IGNORE_INDEX), shifts)
    losses = per_example.cross_entropy(logits, labels, smoothing)
    importance = partial(per_example.cross_entropy_importance, logits, labels, smoothing)
    return Terms(losses, importance, lambda: losses.sum() / count(labels).sum(), counted, are_sums=True)


def predicted(labels: Tensor, shifts: bool) -> Tensor:
    """The label that each position predicts."""
    return F.pad(labels, (0, 1), value=per_example.IGNORE_INDEX)[:, 1:] if shifts else labels


def pixels(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Terms:
    """Cross-entropy, summed over the pixels of a mask, of logits that are enlarged to its size.

    Args:
        logits: `[batch, classes, height, width]`, mostly smaller than the mask.
        labels: int64 `[batch, height, width]`, -100 where there is no loss.
        smoothing: of labels.

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
    """Half of the cross-entropy of the start and half of that of the end; none of a position beyond the text.

    Args:
        start_logits: `[batch, tokens]`.
        end_logits: likewise.
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
    """The losses that `function` makes of them, and their gradients with respect to the logits by autograd.

    Args:
        function: as [`with_inputs`] makes it.
        outputs: of the model.
        labels: as the user's function has them.
        inputs: of the model.
        batch: examples.
        after_loss: whether a tuple begins with a loss.

    Raises:
        ValueError: if it does not return one loss per example.
    """
    losses = function(outputs, labels, inputs)
    if not isinstance(losses, Tensor) or losses.shape != (batch,):
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"per_example_loss_func must return a tensor of shape [{batch}], but returned {found}.")
    predictions = predictions_of(outputs, batch, after_loss).values()
    return Terms(losses, partial(per_example.autograd_importance, losses, *predictions), losses.mean)


def with_inputs(function: PerExampleLoss) -> LossOfInputs:
    """The user's function as one of `(outputs, labels, inputs)`.

    It gets the inputs if it has a third argument without a default, or one called `inputs` after the first two.

    Raises:
        TypeError: if it can be called neither with these nor with the first two.
    """
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # of some that are not written in Python
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
    """The logits, `[batch, …]`; of a span those of start and end.

    Args:
        outputs: a mapping that names them, or a tuple that begins with them, or them.
        batch: examples.
        after_loss: whether a tuple begins with a loss.
        span: see above.

    Raises:
        ValueError: if there are none, or not a row per example.
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
    """The logits, of whatever shape; None if there are none."""
    found = [outputs.get("logits")] if isinstance(outputs, Mapping) else _in_tuple(outputs, after_loss)
    return found[0] if found and isinstance(found[0], Tensor) else None


def predictions_of(outputs: Any, batch: int, after_loss: bool = False) -> dict[str | int, Tensor]:
    """What a loss of the user's own may be computed from, by key or position: logits and boxes, a row per example.

    Where nothing is called so, every floating-point tensor that has a row per example.

    Raises:
        ValueError: if there is nothing.
    """
    if isinstance(outputs, Mapping):
        named = {key: value for key, value in outputs.items() if key.endswith("logits") or key.startswith("pred_")}
        named = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if any(value.shape[:1] != (batch,) for value in named.values()):
            logits_of(outputs, batch)  # says so
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
    """The outputs with others in the place of what [`predictions_of`] has found."""
    if isinstance(outputs, Tensor):
        return predictions[0]
    if not isinstance(outputs, Mapping):
        values = [predictions.get(place, value) for place, value in enumerate(outputs)]
        return type(outputs)(*values) if hasattr(outputs, "_fields") else type(outputs)(values)
    for key, value in predictions.items():
        outputs[key] = value
    return outputs


def loss_of(outputs: Any) -> Tensor | None:
    """The loss of the model itself, of outputs that were made with labels; None if there is none."""
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
    """Integers and truth values as int64, floating-point numbers as float32: what heads and models can work with."""

    def read(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.float() if value.is_floating_point() else value.long()

    return {name: read(value) for name, value in labels.items()}


def read_labels(labels: Tensor, logits: Tensor, problem_type: str | None) -> Tensor:
    """Labels as [`whole_numbers`] gives them, for these logits: of several labels per example as float32."""
    many = labels.shape == logits.shape and logits.dim() == 2 and logits.shape[1] > 1
    several = problem_type == "multi_label_classification" or (many and problem_type is None)
    return labels.float() if several and not labels.is_floating_point() else labels


def count(labels: Tensor) -> Tensor:
    """float32 `[batch]`: how many positions of each example have a loss."""
    return (labels != per_example.IGNORE_INDEX).view(len(labels), -1).sum(1).float()


def refuse_out_of_range(logits: Tensor, labels: Tensor) -> None:
    """Before a GPU fails at them.

    Raises:
        ValueError: for classes that the model does not have.
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
