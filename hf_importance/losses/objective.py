"""The training loss of a model per example, and the importances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.losses import heads, per_example
from hf_importance.losses.first_batch import (
    accepts,
    copies_of_the_first,
    losses_agree,
    may_skip_logits,
    refuse_another_loss,
    refuse_coupled,
    refuse_coupled_by_model,
    requires,
    without_side_effects,
)
from hf_importance.losses.heads import Labels, PerExampleLoss, Terms
from hf_importance.losses.last_layer import LastLayer
from hf_importance.record import OBSERVED
from hf_importance.state import read_number

_AUXILIARY_LOSSES = ("aux_loss", "z_loss")
_MASK_IGNORES = 255


@dataclass
class Measured:
    """Measurements of one batch.

    Args:
        losses: per-example losses `[batch]`, with gradient.
        importance: importances `[batch]`, without gradient.
        observed: rows named in `record.OBSERVED`, float32 `[4, batch]`, without gradient.
        added: auxiliary loss that the model adds, with gradient; 0 for most models.
        outputs: outputs of the model.
        counted: number of positions with a loss per example, `[batch]`; None if each has exactly one.
        are_sums: whether losses are sums over positions.
    """

    losses: Tensor
    importance: Tensor
    observed: Tensor
    added: Tensor | float
    outputs: Any
    counted: Tensor | None = None
    are_sums: bool = False

    def weighted_mean(self, weight: Tensor, positions: Tensor | None = None, share: float = 1.0) -> Tensor:
        """The weighted loss of the batch, including the auxiliary loss.

        With one loss per example it is the mean of w ℓ, divided by the weighted share of examples with a loss. With
        sums over positions it is Σ w ℓ / Σ w n. If all weights are 1, both are the mean of `Trainer`. As ratio
        estimators they have a bias of order 1/batch; dividing by unweighted positions would have a larger bias, because
        these depend on which examples are drawn.

        Args:
            weight: importance weights `[batch]`.
            positions: Σ w n over all batches of the step; by default over this batch.
            share: factor of the auxiliary loss: 1 / number of batches in the step.
        """
        if self.are_sums:
            own = (weight * self.counted).sum().clamp(min=torch.finfo(weight.dtype).tiny)
            return (weight * self.losses).sum() / (own if positions is None else positions) + share * self.added
        loss = (weight * self.losses).mean()
        if self.counted is not None:
            part = (weight * self.counted).sum() / weight.sum()
            loss = loss / part.clamp(min=torch.finfo(part.dtype).tiny)
        return loss + self.added


class Objective:
    """Computes the training loss per example, and the importances.

    The loss is computed outside the model, from its logits. Its kind follows from labels and outputs by the rules of
    the heads of transformers: cross-entropy, binary cross-entropy or squared error per example (`config.problem_type`,
    else from the number of logits and the type of the labels); cross-entropy of tokens (shifted by one for causal
    language models), of pixels, or of the start and end of a span; or `per_example_loss_func`. On the first batch it is
    compared with the model's own loss.

    Args:
        model: the unwrapped model.
        metric: see `ImportanceConfig`.
        label_smoothing: `TrainingArguments.label_smoothing_factor`, for cross-entropy.
        per_example_loss_func: see `ImportanceTrainerMixin`.
        causal: whether tokens are predicted from the previous ones; the first batch may correct this.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: str = "logit_gradient",
        label_smoothing: float = 0.0,
        per_example_loss_func: PerExampleLoss | None = None,
        causal: bool = False,
    ) -> None:
        self._model = model
        self._config = getattr(model, "config", None)
        self._metric = metric
        self._label_smoothing = label_smoothing
        self._per_example_loss_func = per_example_loss_func
        self._own_losses = None if per_example_loss_func is None else heads.with_inputs(per_example_loss_func)
        self._shifts = causal
        self._last_layer: LastLayer | None = None
        self._checked = False
        self._has_auxiliary_loss = False
        self._needs: bool | None = None
        self._classes = 0  # number of classes, for masks

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._last_layer is not None:
            self._last_layer.remove()

    def __call__(self, model: nn.Module, inputs: dict[str, Any], labels: Labels, batch: int) -> Measured:
        """Run the forward pass and measure the batch.

        Args:
            model: the model, possibly wrapped.
            inputs: inputs of the model, without the labels.
            labels: labels by name; may be empty with a `per_example_loss_func`.
            batch: number of examples.

        Raises:
            ValueError: if per-example losses cannot be computed, or do not match the model's loss.
        """
        labels = heads.whole_numbers(labels)
        if self._metric == "last_layer_gradient" and self._last_layer is None:
            self._last_layer = LastLayer(self._model)
        if not self._checked:
            self._check_first_batch(inputs, labels, batch)
            self._checked = True
        outputs, labels_given = self._forward(model, inputs, labels)
        terms = self._terms(outputs, labels_given, inputs, labels, batch)
        added = heads.loss_of(outputs) - terms.mean() if self._has_auxiliary_loss else 0.0
        shown = terms.losses / terms.counted.clamp(min=1) if terms.are_sums else terms.losses
        observed, importance = _observe(shown, outputs, labels_given, labels), self._importance(terms)
        return Measured(terms.losses, importance, observed, added, outputs, terms.counted, terms.are_sums)

    def evaluate(self, model: nn.Module, inputs: dict[str, Any], labels: Labels) -> tuple[Tensor, Any]:
        """The mean loss of `per_example_loss_func`, and the outputs; the loss is prepended to a tuple of outputs."""
        labels = heads.whole_numbers(labels)
        outputs, labels_given = self._forward(model, inputs, labels)
        loss = self._own_losses(outputs, *_as_arguments(inputs, labels)).mean()
        if isinstance(outputs, Mapping):
            return loss, outputs
        rest = (outputs,) if isinstance(outputs, Tensor) else outputs[int(labels_given) :]
        return loss, (loss, *rest)

    @property
    def shifts(self) -> bool:
        """Whether tokens are predicted from the previous ones."""
        return self._shifts

    def state_dict(self) -> dict[str, Any]:
        """Results of the checks on the first batch, so a resumed training does not repeat them."""
        return {
            "loss": self._loss_identity,
            "looked": self._checked,
            "shifts": self._shifts,
            "adds": self._has_auxiliary_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`]; with a different model or loss, the first batch is checked again."""
        looked, shifts, adds = (read_number(state, name, bool) for name in ("looked", "shifts", "adds"))
        if state["loss"] == self._loss_identity:
            self._checked, self._shifts, self._has_auxiliary_loss = looked, shifts, adds

    @property
    def _loss_identity(self) -> list[Any]:
        """Model and loss for which the checks on the first batch are valid."""
        function = self._per_example_loss_func
        name = None if function is None else getattr(function, "__qualname__", type(function).__qualname__)
        return [type(self._model).__name__, self._label_smoothing, name]

    # ---- the forward pass --------------------------------------------------------------------------------------------

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], labels: Labels, give: bool = False
    ) -> tuple[Any, bool]:
        """Return the outputs, and whether the model was given the labels: for an auxiliary loss, or if required."""
        if {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs) or not self._decodes(labels):
            must = self._needs_labels(labels)
        elif hasattr(self._model, "prepare_decoder_input_ids_from_labels"):
            inputs = {**inputs, "decoder_input_ids": self._model.prepare_decoder_input_ids_from_labels(**labels)}
            must = False
        else:  # the model derives them from the labels
            must = True
        labels_given = give or must or self._has_auxiliary_loss
        if labels_given and self._may_skip_logits:
            inputs = {**inputs, "skip_logits": False}
        return (model(**{**inputs, **labels}) if labels_given else model(**inputs)), labels_given

    def _needs_labels(self, labels: Labels) -> bool:
        if self._needs is None:  # cached: it takes as long as a small layer
            self._needs = requires(self._model, labels)
        return self._needs

    @cached_property
    def _may_skip_logits(self) -> bool:
        return may_skip_logits(self._model)

    def _decodes(self, labels: Labels) -> bool:
        """Whether the model is an encoder-decoder that generates its labels."""
        if not getattr(self._config, "is_encoder_decoder", False) or set(labels) != {"labels"}:
            return False
        return isinstance(labels["labels"], Tensor) and labels["labels"].dim() > 1

    # ---- kind of loss ------------------------------------------------------------------------------------------------

    def _terms(self, outputs: Any, labels_given: bool, inputs: dict[str, Any], labels: Labels, batch: int) -> Terms:
        if self._per_example_loss_func is not None:
            return heads.custom(self._own_losses, outputs, *_as_arguments(inputs, labels), batch, labels_given)
        if set(heads.SPAN) <= set(labels):
            return heads.span(*heads.logits_of(outputs, batch, labels_given, span=True), labels)
        (logits,) = heads.logits_of(outputs, batch, labels_given)
        target = self._target(logits, labels)
        try:
            if _is_mask(logits, target):
                return heads.pixels(logits, target, self._label_smoothing)
            if target.dim() == 2 and logits.dim() == 3 and not target.is_floating_point():
                return heads.tokens(logits, target, self._shifts, self._label_smoothing)
            return heads.classification(logits, target, self._problem_type, self._label_smoothing)
        except (IndexError, RuntimeError) as error:
            heads.refuse_out_of_range(logits, target)
            shapes = f"{list(target.shape)} ({target.dtype}) do not fit logits {list(logits.shape)}"
            raise ValueError(f"Labels {shapes} ({error}). {heads.HINT}") from error

    def _target(self, logits: Tensor, labels: Labels) -> Tensor:
        """The labels in the form that the loss of these logits requires."""
        ((name, target),) = list(labels.items())[:1]
        if not isinstance(target, Tensor):
            raise ValueError(
                f"{name} must be a tensor, but is {_kind(target)}, for which there is no standard loss. {heads.HINT}"
            )
        if _is_mask(logits, target):
            self._classes = logits.shape[1]
            return self._with_ignored(target)
        return heads.read_labels(target, logits, self._problem_type)

    def _with_ignored(self, mask: Tensor) -> Tensor:
        usual = _MASK_IGNORES if self._classes <= _MASK_IGNORES else per_example.IGNORE_INDEX
        ignored = getattr(self._config, "semantic_loss_ignore_index", usual)
        return mask.masked_fill(mask == ignored, per_example.IGNORE_INDEX)

    @property
    def _problem_type(self) -> str | None:
        return getattr(self._config, "problem_type", None)

    def count(self, labels: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Number of tokens or pixels with a loss per example, `[batch]`, from collated labels."""
        labels = labels.long()
        return heads.count(heads.predicted(labels, self._shifts) if labels.dim() == 2 else self._with_ignored(labels))

    def _importance(self, terms: Terms) -> Tensor:
        if self._metric == "uniform":
            return torch.ones_like(terms.losses, requires_grad=False)
        if self._metric == "loss":
            return terms.losses.detach().clamp(min=0)
        importance = terms.importance().detach()
        return importance if self._last_layer is None else self._last_layer.importance(importance)

    # ---- the first batch ---------------------------------------------------------------------------------------------

    def _check_first_batch(self, inputs: dict[str, Any], labels: Labels, batch: int) -> None:
        """Compare with the model's own loss, which also shows whether it shifts labels or adds an auxiliary loss."""
        with without_side_effects(self._model):
            outputs, labels_given = self._forward(self._model, inputs, labels)
        if self._per_example_loss_func is not None:
            losses = refuse_coupled(
                outputs, lambda o: self._terms(o, labels_given, inputs, labels, batch), batch, labels_given
            )
            refuse_coupled_by_model(losses, self._losses_of_copies(inputs, labels, batch))
            return
        logits = heads.decision_of(outputs, labels_given)
        if logits is not None and len(labels) == 1:
            heads.refuse_out_of_range(logits, self._target(logits, labels))  # before a device-side assertion on a GPU
        self._terms(outputs, labels_given, inputs, labels, batch)
        if self._label_smoothing:  # `Trainer` then computes the loss from the logits
            return
        self._compare(inputs, self._as_read(outputs, labels_given, labels, batch), batch, (outputs, labels_given))

    def _losses_of_copies(self, inputs: dict[str, Any], labels: Labels, batch: int) -> Tensor:
        """Losses `[batch]` of a batch of copies of the first example."""
        inputs, labels = copies_of_the_first(inputs, batch), copies_of_the_first(labels, batch)
        with without_side_effects(self._model):
            outputs, _ = self._forward(self._model, inputs, labels)
            return self._own_losses(outputs, *_as_arguments(inputs, labels))

    def _as_read(self, outputs: Any, labels_given: bool, labels: Labels, batch: int) -> Labels:
        """Labels in the form that the model expects, see [`heads.read_labels`]."""
        if len(labels) > 1:
            return labels
        (logits,) = heads.logits_of(outputs, batch, labels_given)
        return {name: heads.read_labels(target, logits, self._problem_type) for name, target in labels.items()}

    def _compare(self, inputs: dict[str, Any], labels: Labels, batch: int, usual: tuple[Any, bool]) -> None:
        """Compare with the loss of the model given labels; `usual` provides the logits if it then returns none."""
        if not accepts(self._model, labels):
            raise ValueError(f"The model does not accept {list(labels)}, so its loss is unknown. {heads.HINT}")
        try:
            with without_side_effects(self._model):
                outputs, _ = self._forward(self._model, inputs, labels, give=True)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"The model cannot compute its own loss for these labels ({error}). {heads.HINT}"
            ) from error
        theirs = heads.loss_of(outputs)
        if theirs is None:
            raise ValueError(f"The model returned no 'loss' for its labels, so its loss is unknown. {heads.HINT}")
        made_of = usual if heads.decision_of(outputs, True) is None else (outputs, True)
        by_rule = self._terms(*made_of, inputs, labels, batch)
        if isinstance(outputs, Mapping):
            self._has_auxiliary_loss = any(
                key.endswith(_AUXILIARY_LOSSES) and isinstance(value, Tensor) for key, value in outputs.items()
            )
        if self._has_auxiliary_loss:  # an auxiliary loss makes them differ
            return
        if by_rule.are_sums and not losses_agree(theirs, by_rule.mean()):
            self._shifts = not self._shifts
        refuse_another_loss(theirs, self._terms(*made_of, inputs, labels, batch).mean())


def _observe(losses: Tensor, outputs: Any, labels_given: bool, labels: Labels) -> Tensor:
    """Observations of the batch, see [`observed_of`]."""
    target = next(iter(labels.values())) if len(labels) == 1 else None
    return observed_of(losses, heads.decision_of(outputs, labels_given), target)


@torch.no_grad()
def observed_of(losses: Tensor, logits: Tensor | None = None, target: Any = None) -> Tensor:
    """The rows of `record.OBSERVED`, float32 `[4, batch]`; NaN where unknown.

    Args:
        losses: `[batch]`.
        logits: predictions of the model, class logits or a number per example.
        target: labels of the examples.
    """
    label = prediction = probability = torch.full_like(losses, torch.nan)
    if isinstance(target, Tensor) and logits is not None and target.numel() == len(losses):
        if logits.numel() == len(losses):
            label, prediction = target.flatten(), logits.flatten()
        elif logits.dim() == 2 and not target.is_floating_point():
            label = target.flatten()
            ignored = label == per_example.IGNORE_INDEX
            probability, prediction = logits.float().softmax(-1).max(-1)
            label, probability = (row.float().masked_fill(ignored, torch.nan) for row in (label, probability))
    observed = {"label": label, "loss": losses, "prediction": prediction, "probability": probability}
    return torch.stack([observed[name].float() for name in OBSERVED])


def _as_arguments(inputs: dict[str, Any], labels: Labels) -> tuple[Any, dict[str, Any]]:
    """Arguments of `per_example_loss_func`: labels (a dict of several, or the inputs if there are none), and inputs."""
    if not labels:
        return inputs, inputs
    return (next(iter(labels.values())) if len(labels) == 1 else labels), inputs


def _is_mask(logits: Tensor, labels: Tensor) -> bool:
    usual = labels.shape == logits.shape[:-1]  # classes on the last axis, as for word pairs
    return logits.dim() == 4 and labels.dim() == 3 and not labels.is_floating_point() and not usual


def _kind(value: Any) -> str:
    """Type of a value and of its elements, for messages."""
    name = type(value).__name__
    return f"a {name} of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and value else f"a {name}"
