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
    FirstBatches,
    Gather,
    alone,
    copies_of,
    coupled,
    losses_agree,
    may_skip_logits,
    refuse_coupled,
    requires,
    telling_row,
)
from hf_importance.losses.heads import Labels, PerExampleLoss, Terms
from hf_importance.losses.isolation import without_side_effects
from hf_importance.losses.last_layer import LastLayer
from hf_importance.losses.own_loss import OwnLoss
from hf_importance.sampling.record import OBSERVED
from hf_importance.sampling.state import read_number

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
    language models), of pixels, or of the start and end of a span; or `per_example_loss_func`. On the first batches it
    is compared with the model's own loss, see [`OwnLoss`].

    Args:
        model: the unwrapped model.
        metric: see `ImportanceConfig`.
        label_smoothing: `TrainingArguments.label_smoothing_factor`, for cross-entropy.
        per_example_loss_func: see `ImportanceTrainerMixin`.
        causal: whether tokens are predicted from the previous ones; the first batches may correct this.
        gather: collects what the processes find on the first batches, to decide together.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: str = "logit_gradient",
        label_smoothing: float = 0.0,
        per_example_loss_func: PerExampleLoss | None = None,
        causal: bool = False,
        gather: Gather = alone,
    ) -> None:
        self.model = model
        self._config = getattr(model, "config", None)
        self._metric = metric
        self.label_smoothing = label_smoothing
        self._per_example_loss_func = per_example_loss_func
        self._own_losses = None if per_example_loss_func is None else heads.with_inputs(per_example_loss_func)
        self._causal = causal
        self._last_layer: LastLayer | None = None
        self._first_batches = FirstBatches(gather)
        self._own_loss = OwnLoss(self, self._first_batches)
        self._needs: bool | None = None
        self._classes = 0  # number of classes, for masks

    def close(self) -> None:
        """Remove the hooks from the model; warn if its own loss was never compared."""
        self._first_batches.warn()
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
            self._last_layer = LastLayer(self.model)
        if self._first_batches.due():
            check = self._own_loss.check if self._own_losses is None else self._check_function
            check(inputs, labels, batch)
        outputs, labels_given = self.forward(model, inputs, labels)
        terms = self.terms(outputs, labels_given, inputs, labels, batch)
        added = heads.loss_of(outputs) - terms.mean() if self._own_loss.adds else 0.0
        shown = terms.losses / terms.counted.clamp(min=1) if terms.are_sums else terms.losses
        observed, importance = _observe(shown, outputs, labels_given, labels), self._importance(terms)
        return Measured(terms.losses, importance, observed, added, outputs, terms.counted, terms.are_sums)

    def evaluate(self, model: nn.Module, inputs: dict[str, Any], labels: Labels) -> tuple[Tensor, Any]:
        """The mean loss of `per_example_loss_func`, and the outputs; the loss is prepended to a tuple of outputs."""
        labels = heads.whole_numbers(labels)
        outputs, labels_given = self.forward(model, inputs, labels)
        loss = self._own_losses(outputs, *_as_arguments(inputs, labels)).mean()
        if isinstance(outputs, Mapping):
            return loss, outputs
        rest = (outputs,) if isinstance(outputs, Tensor) else outputs[int(labels_given) :]
        return loss, (loss, *rest)

    @property
    def shifts(self) -> bool:
        """Whether tokens are predicted from the previous ones."""
        return self._causal if self._own_loss.shifts is None else self._own_loss.shifts

    def state_dict(self) -> dict[str, Any]:
        """Results of the checks on the first batches, so a resumed training does not repeat them."""
        return {
            "loss": self._loss_identity,
            "looked": self._first_batches.done,
            "shifts": self.shifts,
            "adds": self._own_loss.adds,
            "batches": self._first_batches.batches,
            "known": self._own_loss.shifts is not None,
            "reached": self._own_loss.reached,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`]; with a different model or loss, the first batches are checked again."""
        looked, shifts, adds = (read_number(state, name, bool) for name in ("looked", "shifts", "adds"))
        since = {"batches": 0, "reached": 0, "known": looked, **state}  # not in checkpoints of 0.2
        batches, reached = (read_number(since, name, int, 0) for name in ("batches", "reached"))
        known = read_number(since, "known", bool)
        if state["loss"] == self._loss_identity:
            self._first_batches.done, self._first_batches.batches = looked, batches
            self._own_loss.shifts, self._own_loss.adds = shifts if known else None, adds
            self._own_loss.reached = reached

    @property
    def _loss_identity(self) -> list[Any]:
        """Model and loss for which the checks on the first batch are valid."""
        function = self._per_example_loss_func
        name = None if function is None else getattr(function, "__qualname__", type(function).__qualname__)
        return [type(self.model).__name__, self.label_smoothing, name]

    # ---- the forward pass --------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, inputs: dict[str, Any], labels: Labels, give: bool = False) -> tuple[Any, bool]:
        """Return the outputs, and whether the model was given the labels: for an auxiliary loss, or if required."""
        inputs = self.with_decoder_inputs(inputs, labels)
        must = self.makes_inputs(inputs, labels) or self._needs_labels(labels)
        labels_given = give or must or self._own_loss.adds
        if labels_given and self._may_skip_logits:
            inputs = {**inputs, "skip_logits": False}
        return (model(**{**inputs, **labels}) if labels_given else model(**inputs)), labels_given

    def with_decoder_inputs(self, inputs: dict[str, Any], labels: Labels) -> dict[str, Any]:
        """The inputs, with those of the decoder that an encoder-decoder makes of its labels, if it can be asked to."""
        if not self.makes_inputs(inputs, labels) or not hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            return inputs
        return {**inputs, "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(**labels)}

    def makes_inputs(self, inputs: dict[str, Any], labels: Labels) -> bool:
        """Whether the model makes the inputs of its decoder of the labels."""
        return not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs) and self._decodes(labels)

    def _needs_labels(self, labels: Labels) -> bool:
        if self._needs is None:  # cached: it takes as long as a small layer
            self._needs = requires(self.model, labels)
        return self._needs

    @cached_property
    def _may_skip_logits(self) -> bool:
        return may_skip_logits(self.model)

    def _decodes(self, labels: Labels) -> bool:
        """Whether the model is an encoder-decoder that generates its labels."""
        if not getattr(self._config, "is_encoder_decoder", False) or set(labels) != {"labels"}:
            return False
        return isinstance(labels["labels"], Tensor) and labels["labels"].dim() > 1

    # ---- kind of loss ------------------------------------------------------------------------------------------------

    def terms(
        self,
        outputs: Any,
        labels_given: bool,
        inputs: dict[str, Any],
        labels: Labels,
        batch: int,
        shifts: bool | None = None,
    ) -> Terms:
        """Losses of a batch, with token labels shifted as `shifts` says; by default as the model does."""
        if self._per_example_loss_func is not None:
            return heads.custom(self._own_losses, outputs, *_as_arguments(inputs, labels), batch, labels_given)
        if set(heads.SPAN) <= set(labels):
            return heads.span(*heads.logits_of(outputs, batch, labels_given, span=True), labels)
        (logits,) = heads.logits_of(outputs, batch, labels_given)
        target = self.target(logits, labels)
        try:
            if self.is_mask(logits, target):
                return heads.pixels(logits, target, self.label_smoothing)
            if self.are_tokens(logits, labels):
                return heads.tokens(logits, target, self.shifts if shifts is None else shifts, self.label_smoothing)
            return heads.classification(logits, target, self.problem_type, self.label_smoothing)
        except (IndexError, RuntimeError) as error:
            heads.refuse_out_of_range(logits, target)
            shapes = f"{list(target.shape)} ({target.dtype}) do not fit logits {list(logits.shape)}"
            raise ValueError(f"Labels {shapes} ({error}). {heads.HINT}") from error

    def target(self, logits: Tensor, labels: Labels) -> Tensor:
        """The labels in the form that the loss of these logits requires: ignored positions are -100."""
        ((name, target),) = list(labels.items())[:1]
        if not isinstance(target, Tensor):
            raise ValueError(
                f"{name} must be a tensor, but is {_kind(target)}, for which there is no standard loss. {heads.HINT}"
            )
        if self.is_mask(logits, target):
            self._classes = logits.shape[1]
            return self._with_ignored(target)
        return heads.read_labels(target, logits, self.problem_type)

    @staticmethod
    def is_mask(logits: Tensor, labels: Tensor) -> bool:
        """Whether labels are one class per pixel."""
        usual = labels.shape == logits.shape[:-1]  # classes on the last axis, as for word pairs
        return logits.dim() == 4 and labels.dim() == 3 and not labels.is_floating_point() and not usual

    @staticmethod
    def are_tokens(logits: Tensor | None, labels: Labels) -> bool:
        """Whether labels are one class per token."""
        target = next(iter(labels.values()))
        known = len(labels) == 1 and isinstance(target, Tensor) and logits is not None
        return known and target.dim() == 2 and logits.dim() == 3 and not target.is_floating_point()

    def _with_ignored(self, mask: Tensor) -> Tensor:
        usual = _MASK_IGNORES if self._classes <= _MASK_IGNORES else per_example.IGNORE_INDEX
        ignored = getattr(self._config, "semantic_loss_ignore_index", usual)
        return mask.masked_fill(mask == ignored, per_example.IGNORE_INDEX)

    @property
    def problem_type(self) -> str | None:
        """`config.problem_type` of the model; None if it has none."""
        return getattr(self._config, "problem_type", None)

    def count(self, labels: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Number of tokens or pixels with a loss per example, `[batch]`, from collated labels."""
        labels = labels.long()
        return heads.count(heads.predicted(labels, self.shifts) if labels.dim() == 2 else self._with_ignored(labels))

    def _importance(self, terms: Terms) -> Tensor:
        if self._metric == "uniform":
            return torch.ones_like(terms.losses, requires_grad=False)
        if self._metric == "loss":
            return terms.losses.detach().clamp(min=0)
        importance = terms.importance().detach()
        return importance if self._last_layer is None else self._last_layer.importance(importance)

    # ---- a user-defined loss on the first batches --------------------------------------------------------------------

    def _check_function(self, inputs: dict[str, Any], labels: Labels, batch: int) -> None:
        """Refuse losses that couple the examples of a batch, in the function or in the model.

        A loss must be the same in a batch of copies of its example. If it is not, it may be due to dropout or to batch
        statistics, which couple examples in every training: then both are evaluated without these.
        """
        together = self._first_batches.together
        row, found = together(lambda: self._first_loss(inputs, labels, batch), 2)
        if found[:, 1].any():
            together(lambda: self._refuse_coupled(inputs, labels, batch, row), 0)
        self._first_batches.decide(bool(found[:, 0].any()), "no loss of per_example_loss_func is finite")

    def _first_loss(self, inputs: dict[str, Any], labels: Labels, batch: int) -> tuple[int | None, list[bool]]:
        """An example, whether there is one with a finite loss, and whether that differs in a batch of its copies."""
        with without_side_effects(self.model):
            outputs, given = self.forward(self.model, inputs, labels)
        losses = refuse_coupled(outputs, lambda o: self.terms(o, given, inputs, labels, batch), batch, given)
        row = telling_row(losses)
        alone = self._losses(*(copies_of(part, batch, row or 0) for part in (inputs, labels)))
        finite = row is not None
        return row, [finite, finite and not losses_agree(losses[row], alone[row])]

    def _refuse_coupled(
        self, inputs: dict[str, Any], labels: Labels, batch: int, row: int | None
    ) -> tuple[None, list[float]]:
        losses = self._losses(inputs, labels, separately=True)
        alone = self._losses(*(copies_of(part, batch, row or 0) for part in (inputs, labels)), separately=True)
        if row is not None and not losses_agree(losses[row], alone[row]):
            raise coupled("changes with the other examples")
        return None, []

    def _losses(self, inputs: dict[str, Any], labels: Labels, separately: bool = False) -> Tensor:
        """Losses `[batch]` of the user-defined function, without gradient or effects."""
        with without_side_effects(self.model, separately):
            outputs, _ = self.forward(self.model, inputs, labels)
            return self._own_losses(outputs, *_as_arguments(inputs, labels))


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


def _kind(value: Any) -> str:
    """Type of a value and of its elements, for messages."""
    name = type(value).__name__
    return f"a {name} of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and value else f"a {name}"
