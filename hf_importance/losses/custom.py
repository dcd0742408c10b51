"""User-defined losses: how they are called, their importance, and the check that they separate over examples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_importance.losses.first_batch import FirstBatches, losses_agree
from hf_importance.losses.isolation import without_side_effects
from hf_importance.losses.outputs import Inputs, Labels, described, without_loss
from hf_importance.losses.per_example import autograd_importance

_OF_LAYERS = ("hidden_states", "attentions", "key_values")  # ends of the names of tuples with one tensor per layer

LossOfInputs = Callable[[Any, Any, Inputs], Tensor]
PerExampleLoss = Callable[[Any, Any], Tensor] | LossOfInputs
"""`f(outputs, labels)` or `f(outputs, labels, inputs)`, to `[batch]`."""


def with_inputs(function: PerExampleLoss) -> LossOfInputs:
    """Wrap the user's function as a function of `(outputs, labels, inputs)`.

    It receives the inputs if it has a third argument without a default, or an argument `inputs` after the first two.
    A TypeError says that it accepts neither two nor three arguments.
    """
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # some functions not written in Python have no signature
        return lambda outputs, labels, _: function(outputs, labels)
    later = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][2:]
    by_place = bool(later) and later[0].kind != later[0].KEYWORD_ONLY and later[0].default is later[0].empty
    by_name = not by_place and "inputs" in [p.name for p in later]

    def called(outputs: Any, labels: Any, inputs: Inputs, call: Callable[..., Any] = function) -> Any:
        if by_place:
            return call(outputs, labels, inputs)
        return call(outputs, labels, inputs=inputs) if by_name else call(outputs, labels)

    try:
        called(None, None, None, call=signature.bind)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            "per_example_loss_func must be a function f(outputs, labels) or f(outputs, labels, inputs) -> "
            f"Tensor[batch], but {name}{signature} cannot be called that way: {error}."
        ) from error
    return called


def validate_function(function: Any) -> None:
    """Check that a `per_example_loss_func` can be called, and is not a loss of torch, which takes logits.

    Raises:
        TypeError: if it is not callable with outputs and labels.
    """
    if not callable(function):
        raise TypeError(
            "per_example_loss_func must be a function f(outputs, labels) -> Tensor[batch], but is "
            f"{type(function).__name__}."
        )
    inner = getattr(function, "func", function)  # of `functools.partial`
    if isinstance(inner, nn.modules.loss._Loss) or getattr(inner, "__module__", None) == F.__name__:
        name = getattr(inner, "__name__", type(inner).__name__)
        raise TypeError(
            f"per_example_loss_func gets the outputs of the model, but {name} takes logits. Wrap it: def f(outputs, "
            f"labels): return loss(outputs['logits'], labels), where loss is {name} with reduction='none', so that "
            "there is one loss per example."
        )
    with_inputs(function)


class CustomLoss:
    """A user-defined loss of the outputs, labels and inputs, called as [`with_inputs`] says."""

    def __init__(self, function: PerExampleLoss) -> None:
        self.name = getattr(function, "__qualname__", type(function).__qualname__)
        self._function = with_inputs(function)

    def __call__(self, outputs: Any, labels: Labels, inputs: Inputs) -> Tensor:
        """Call the function with the labels: a dict of several, or the inputs if there are none."""
        given = inputs if not labels else next(iter(labels.values())) if len(labels) == 1 else labels
        try:
            return self._function(outputs, given, inputs)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"per_example_loss_func={self.name} failed with {error!r}. It gets the outputs of the model, here "
                f"{described(outputs)}, and {_described(labels)}. The model is called without the labels, unless its "
                "forward requires them."
            ) from error

    def losses(
        self, outputs: Any, labels: Labels, inputs: Inputs, batch: int, with_labels: bool
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """The losses `[batch]`, and a function that computes their importances by autograd."""
        losses = self(outputs, labels, inputs)
        if not isinstance(losses, Tensor) or losses.shape != (batch,):
            returned = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"per_example_loss_func must return a tensor of shape [{batch}], but returned {returned}.")
        return losses, partial(autograd_importance, losses, *_predictions_of(outputs, batch, with_labels))


def _described(labels: Labels) -> str:
    """The labels that a function gets, for messages."""
    if not labels:
        return "the inputs of the model, as there are no labels"
    kinds = {name: list(y.shape) if isinstance(y, Tensor) else type(y).__name__ for name, y in labels.items()}
    return f"the labels {kinds}" if len(labels) > 1 else f"the labels, here {next(iter(kinds.values()))}"


def _predictions_of(outputs: Any, batch: int, with_labels: bool) -> list[Tensor]:
    """Outputs that a user-defined loss may depend on: those called logits, and boxes; if there are none, all of them.

    They are floating-point tensors with one row per example.
    """
    if isinstance(outputs, Mapping):
        named = [outputs[key] for key in outputs if key.endswith("logits") or key.startswith("pred_")]
        candidates = [value for value in named if isinstance(value, Tensor)]
        candidates = candidates or [
            value
            for key, value in outputs.items()
            if key != "loss" and (isinstance(value, Tensor) or not key.endswith(_OF_LAYERS))
        ]
    else:
        candidates = without_loss(outputs, with_labels)
    leaves = [value for value in tree_leaves(list(candidates)) if isinstance(value, Tensor)]
    predictions = [value for value in leaves if value.is_floating_point() and value.shape[:1] == (batch,)]
    if not predictions:
        raise ValueError(
            f"The model must return its logits, [{batch}, …], in a dict or a tuple, but returned {described(outputs)}."
        )
    return predictions


# ---- losses that couple the examples of a batch ----------------------------------------------------------------------


def check_coupling(
    loss: CustomLoss, objective: Any, batches: FirstBatches, inputs: Inputs, labels: Labels, batch: int
) -> None:
    """Refuse a loss that couples the examples of a batch, in the function or in the model.

    A loss must be the same in a batch of copies of its example, and depend on the outputs of its example only.
    """
    model = objective.model

    def changes(separately: bool) -> list[bool]:
        with without_side_effects(model, separately):
            outputs, with_labels = objective.forward(model, inputs, labels)
        losses = _validate_gradient(loss, outputs, labels, inputs, batch, with_labels)
        row = _largest_finite(losses)
        of_inputs, of_labels = copies_of(inputs, batch, row), copies_of(labels, batch, row)
        with without_side_effects(model, separately):
            alone = loss(objective.forward(model, of_inputs, of_labels)[0], of_labels, of_inputs)
        finite = bool(losses[row].isfinite())
        return [finite, finite and not losses_agree(losses[row], alone[row])]

    error, still_open = _coupled("changes with the other examples"), "no loss of per_example_loss_func is finite"
    batches.refuse_coupled(changes, error, still_open)


def _validate_gradient(
    loss: CustomLoss, outputs: Any, labels: Labels, inputs: Inputs, batch: int, with_labels: bool
) -> Tensor:
    """The losses `[batch]`; a ValueError if one depends on the outputs of other examples, or on no outputs."""
    predictions = _predictions_of(outputs, batch, with_labels)
    for values in predictions:  # computed without gradient, so they are leaves
        values.requires_grad_()
    losses, _ = loss.losses(outputs, labels, inputs, batch, with_labels)
    if not losses.requires_grad:
        raise ValueError("per_example_loss_func must compute the losses from the logits in outputs.")
    row = _largest_finite(losses)
    for gradient in torch.autograd.grad(losses[row], predictions, allow_unused=True, materialize_grads=True):
        others = torch.cat([gradient[:row], gradient[row + 1 :]])
        if others.nan_to_num(nan=0.0).any():  # NaN comes from 0 · ∞
            raise _coupled("depends on the logits of other examples")
    for values in predictions:
        values.requires_grad_(False)  # some may be inputs
    return losses.detach()


def _largest_finite(losses: Tensor) -> int:
    """The example with the largest finite loss; the first one if there is none."""
    return int(losses.detach().abs().nan_to_num(-1.0, -1.0).argmax())


def copies_of(batch: Any, size: int, row: int = 0) -> Any:
    """A batch of copies of one example, applied to tensors and lists with one row per example, and mappings."""
    if isinstance(batch, Tensor):
        return batch[row : row + 1].expand_as(batch).clone() if batch.shape[:1] == (size,) else batch
    if isinstance(batch, Mapping):
        return {name: copies_of(value, size, row) for name, value in batch.items()}
    return [batch[row]] * size if isinstance(batch, list) and len(batch) == size else batch


def _coupled(how: str) -> ValueError:
    return ValueError(
        f"per_example_loss_func must compute each loss from one example alone, but a loss {how}: such losses "
        "cannot be weighted per example. Use Trainer instead."
    )
