"""From what a model returns to per-example losses and importances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance import functional

PerExampleLoss = Callable[[Any, Any], Tensor]

_LOSS_AND_IMPORTANCE = {
    "single_label_classification": (functional.cross_entropy, functional.cross_entropy_importance),
    "multi_label_classification": (functional.binary_cross_entropy, functional.binary_cross_entropy_importance),
    "regression": (functional.squared_error, functional.squared_error_importance),
}


class Objective:
    """The loss that training minimises, example by example, and the importance that goes with it.

    The loss is computed outside the model, from its logits: cross-entropy, binary cross-entropy or squared error by the
    rule of the heads of transformers (`config.problem_type`, else the number of logits and the type of the labels), or
    `per_example_loss_func`. The first batch shows whether that is the loss that the model itself would have trained
    with; see [`checks_model_loss`].

    Args:
        model: unwrapped; its config says which loss, and is completed with `problem_type` as its own head would do.
        metric: see `ImportanceConfig`.
        label_smoothing: as in `TrainingArguments.label_smoothing_factor`; for single-label classification.
        per_example_loss_func: see `ImportanceTrainerMixin`.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: str = "logit_gradient",
        label_smoothing: float = 0.0,
        per_example_loss_func: PerExampleLoss | None = None,
    ) -> None:
        self._config = getattr(model, "config", None)
        self._metric = metric
        self._label_smoothing = label_smoothing
        self._per_example_loss_func = per_example_loss_func
        self._last_layer = _LastLayer(model) if metric == "last_layer_gradient" else None
        self.checks_model_loss = per_example_loss_func is None and not label_smoothing
        """Whether the next batch must be given to the model with its labels, so that its own loss can be compared."""

    def close(self) -> None:
        """Leave the model as it was found."""
        if self._last_layer is not None:
            self._last_layer.remove()

    def __call__(self, outputs: Any, labels: dict[str, Tensor], batch: int) -> tuple[Tensor, Tensor]:
        """Per-example losses with gradient, and importances without: both `[batch]`.

        Raises:
            ValueError: if they cannot be had from `outputs`, or are not those of the model.
        """
        logits = _logits(outputs, batch)
        target = next(iter(labels.values())) if len(labels) == 1 else labels
        if self._per_example_loss_func is None:
            losses, gradient_norm = self._closed_form(logits, target)
        else:
            losses = _checked_losses(self._per_example_loss_func(outputs, target), batch)
            gradient_norm = partial(functional.autograd_importance, losses, logits)
        if self.checks_model_loss:
            _compare_with_model(outputs, losses, target)
            self.checks_model_loss = False
        return losses, self._importance(losses, gradient_norm)

    def _closed_form(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        problem_type = self._problem_type(logits, labels)
        loss, importance = _LOSS_AND_IMPORTANCE[problem_type]
        if problem_type != "single_label_classification":
            return loss(logits, labels), partial(importance, logits, labels)
        if not labels.is_floating_point():
            labels = labels.view(logits.shape[:-1])
        smoothing = self._label_smoothing
        return loss(logits, labels, smoothing), partial(importance, logits, labels, smoothing)

    def _problem_type(self, logits: Tensor, labels: Tensor) -> str:
        found = getattr(self._config, "problem_type", None)
        if found is None:
            found = _usual_problem_type(logits, labels)
            if self._config is not None and not self._label_smoothing:  # with smoothing no head gets to set it either
                self._config.problem_type = found
        if found not in _LOSS_AND_IMPORTANCE:
            raise ValueError(f"config.problem_type must be one of {list(_LOSS_AND_IMPORTANCE)}, but is {found!r}.")
        if self._label_smoothing and found != "single_label_classification":
            raise ValueError(f"label_smoothing_factor is for single-label classification, not {found}: set it to 0.")
        return found

    def _importance(self, losses: Tensor, gradient_norm: Callable[[], Tensor]) -> Tensor:
        if self._metric == "uniform":
            return torch.ones_like(losses, requires_grad=False)
        if self._metric == "loss":
            return losses.detach().clamp(min=0)
        importance = gradient_norm()
        return importance if self._last_layer is None else self._last_layer.importance(importance)


class _LastLayer:
    """Catches what the linear last layer of a model is given."""

    def __init__(self, model: nn.Module) -> None:
        outputs = getattr(getattr(model, "config", None), "num_labels", None)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and outputs in (None, m.out_features)]
        if not layers:
            raise ValueError(
                f"metric='last_layer_gradient' needs a last layer nn.Linear with {outputs} outputs, and "
                f"{type(model).__name__} has none: use metric='logit_gradient'."
            )
        self._bias = layers[-1].bias is not None
        self._features: Tensor | None = None
        self.remove = layers[-1].register_forward_pre_hook(self._catch).remove

    def _catch(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._features = args[0].detach()

    def importance(self, gradient_norm: Tensor) -> Tensor:
        features, self._features = self._features, None
        if features is None or features.dim() != 2 or len(features) != len(gradient_norm):
            raise ValueError(
                f"metric='last_layer_gradient' needs features [{len(gradient_norm)}, hidden] at the last layer, not "
                f"{None if features is None else list(features.shape)}: use metric='logit_gradient'."
            )
        return functional.last_layer_importance(gradient_norm, features, self._bias)


def _logits(outputs: Any, batch: int) -> Tensor:
    if not isinstance(outputs, Mapping) or not isinstance(outputs.get("logits"), Tensor):
        found = f"the keys {list(outputs)}" if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"The model must return a dict with a tensor 'logits', but returned {found}.")
    if outputs["logits"].shape[:1] != (batch,):
        raise ValueError(f"logits must be [{batch}, …], one row per example, but are {list(outputs['logits'].shape)}.")
    return outputs["logits"]


def _checked_losses(losses: Any, batch: int) -> Tensor:
    if isinstance(losses, Tensor) and losses.shape == (batch,):
        return losses
    found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    raise ValueError(f"per_example_loss_func must return a tensor of shape [{batch}], but returned {found}.")


def _usual_problem_type(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[-1] == 1:
        return "regression"
    whole = labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if whole else "multi_label_classification"


def _compare_with_model(outputs: Mapping[str, Any], losses: Tensor, labels: Tensor) -> None:
    theirs = outputs.get("loss")
    if theirs is None:
        raise ValueError(
            "The model returned no 'loss' for its labels, so that its loss is unknown: pass per_example_loss_func=f "
            "with f(outputs, labels) -> Tensor[batch]."
        )
    counted = len(losses) if labels.is_floating_point() else (labels != functional.IGNORE_INDEX).sum().clamp(min=1)
    theirs, ours = theirs.detach().float().mean(), losses.detach().float().sum() / counted
    tolerance = 1e-3 if outputs["loss"].dtype == torch.float32 else 3e-2
    if not torch.allclose(theirs, ours, rtol=tolerance, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"The model's loss on the first batch is {theirs.item():.5g}, but the mean of the usual per-example losses "
            f"is {ours.item():.5g}: it has a loss of its own (class weights, an auxiliary term, …). Pass "
            "per_example_loss_func=f with f(outputs, labels) -> Tensor[batch] that computes it."
        )
