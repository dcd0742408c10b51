"""The training loss of a model per example, and the importances: forward pass, kind of loss, and the usual losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_importance.errors import UnweightedError
from hf_importance.losses import per_example
from hf_importance.losses.custom import CustomLoss, PerExampleLoss, check_coupling
from hf_importance.losses.first_batch import FirstBatches, Gather, alone
from hf_importance.losses.outputs import (
    HINT,
    SPAN,
    SPAN_LOGITS,
    Inputs,
    Labels,
    any_logits,
    count,
    importance_by,
    logits_of,
    model_loss,
    observed_of,
    requires,
    validate_classes,
    without_loss,
    without_peft,
)
from hf_importance.losses.own_loss import Found, compare_own_loss
from hf_importance.losses.per_example import IGNORE_INDEX

_MASK_IGNORES = 255


@dataclass
class Measured:
    """Measurements of one batch."""

    losses: Tensor  # `[batch]`, with gradient
    importance: Tensor  # `[batch]`, without gradient
    observed: dict[str, Tensor]  # see [`observed_of`]
    added: Tensor | float = 0.0  # auxiliary loss that the model adds, with gradient
    outputs: Any = None
    counted: Tensor | None = None  # number of positions with a loss, `[batch]`; None if each example has exactly one
    are_sums: bool = False  # whether losses are sums over positions

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
            if positions is None:
                positions = (weight * self.counted).sum().clamp(min=torch.finfo(weight.dtype).tiny)
            return (weight * self.losses).sum() / positions + share * self.added
        loss = (weight * self.losses).mean()
        if self.counted is not None:
            part = (weight * self.counted).sum() / weight.sum()
            loss = loss / part.clamp(min=torch.finfo(part.dtype).tiny)
        return loss if isinstance(self.added, float) and self.added == 0 else loss + self.added


@dataclass
class Terms:
    """Losses of one batch; what has the same name as in [`Measured`] is the same."""

    losses: Tensor
    importance: Callable[[], Tensor]
    mean: Callable[[], Tensor]  # the loss of the batch as the model's own head computes it
    counted: Tensor | None = None
    are_sums: bool = False
    observed: dict[str, Tensor] | None = None  # if already known


class Objective:
    """Computes the training loss per example, and the importances.

    The loss is computed outside the model, from its logits. Its kind follows from labels and outputs by the rules of
    the heads of transformers: cross-entropy, binary cross-entropy or squared error per example (`config.problem_type`,
    else from the number of logits and the type of the labels); cross-entropy of tokens (shifted by one for causal
    language models), of pixels, or of the start and end of a span; or `per_example_loss_func`. On the first batches it
    is compared with the model's own loss, see [`compare_own_loss`].

    The model is the unwrapped one. `causal` says whether tokens are predicted from the previous ones; the first batches
    may correct this.
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
        self.model, self._metric, self.label_smoothing = model, metric, label_smoothing
        self._config = getattr(model, "config", None)
        self._problem_type = getattr(self._config, "problem_type", None)
        self._is_encoder_decoder = getattr(self._config, "is_encoder_decoder", False)
        self._custom = None if per_example_loss_func is None else CustomLoss(per_example_loss_func)
        self._causal = causal
        self._batches = FirstBatches(gather)
        self._found = Found()
        self._requires_labels: bool | None = None  # inspecting the signature takes as long as a small layer
        self._classes = 0  # number of classes, for masks

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Labels, batch: int) -> Measured:
        """Run the forward pass of the model, which may be wrapped, and measure the batch of so many examples.

        The labels by name are not in the inputs; with a `per_example_loss_func` there may be none. A ValueError says
        why per-example losses cannot be computed, or do not match the model's own.
        """
        labels = with_usual_types(labels)
        if not self._batches.done and self._batches.due():
            if self._custom is None:
                self._found = compare_own_loss(self, self._found, self._batches, inputs, labels, batch)
            else:
                check_coupling(self._custom, self, self._batches, inputs, labels, batch)
        outputs, with_labels = self.forward(model, inputs, labels)
        terms = self.terms(outputs, with_labels, inputs, labels, batch)
        added = model_loss(outputs) - terms.mean() if self._found.adds else 0.0
        if self._metric == "logit_gradient":
            importance = terms.importance()
        else:
            importance = importance_by(self._metric, terms.losses, terms.importance)
        observed = terms.observed
        if observed is None:
            losses = terms.losses / terms.counted.clamp(min=1) if terms.are_sums else terms.losses
            target = next(iter(labels.values())) if len(labels) == 1 else None
            observed = observed_of(losses, any_logits(outputs, with_labels), target)
        return Measured(terms.losses, importance, observed, added, outputs, terms.counted, terms.are_sums)

    def evaluate(self, model: nn.Module, inputs: Inputs, labels: Labels) -> tuple[Tensor, Any]:
        """The mean loss of `per_example_loss_func`, and the outputs; the loss is prepended to a tuple of outputs."""
        labels = with_usual_types(labels)
        outputs, with_labels = self.forward(model, inputs, labels)
        loss = self._custom(outputs, labels, inputs).mean()
        return loss, outputs if isinstance(outputs, Mapping) else (loss, *without_loss(outputs, with_labels))

    def count(self, labels: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Number of tokens or pixels with a loss per example, `[batch]`, from collated labels."""
        labels = labels.long()
        return count(predicted(labels, self.shifts) if labels.dim() == 2 else self._with_ignored(labels))

    @property
    def shifts(self) -> bool:
        """Whether tokens are predicted from the previous ones."""
        return self._causal if self._found.shifts is None else self._found.shifts

    def close(self) -> None:
        """Warn if the model's own loss was never compared."""
        self._batches.warn()

    def state_dict(self) -> dict[str, Any]:
        """Results of the checks on the first batches, so a resumed training does not repeat them."""
        progress = {"done": self._batches.done, "batches": self._batches.batches}
        return {"loss": self._identity, **progress, "found": asdict(self._found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`]; with a different model or loss, the first batches are checked again."""
        if state["loss"] == self._identity:
            self._batches.done, self._batches.batches = state["done"], state["batches"]
            self._found = Found(**state["found"])

    @property
    def _identity(self) -> list[Any]:
        """Model and loss for which the checks on the first batch are valid."""
        return [type(self.model).__name__, self.label_smoothing, self._custom and self._custom.name]

    # ---- the forward pass --------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, inputs: Inputs, labels: Labels, with_labels: bool = False) -> tuple[Any, bool]:
        """Return the outputs, and whether the model was given the labels: for an auxiliary loss, or if required."""
        if self._is_encoder_decoder:
            inputs = self.with_decoder_inputs(inputs, labels)
            with_labels = with_labels or self.makes_inputs(inputs, labels)
        if self._requires_labels is None:
            self._requires_labels = requires(self.model, labels)
        if not (with_labels or self._requires_labels or self._found.adds):
            try:
                return model(**inputs), False
            except (AttributeError, KeyError, TypeError) as error:  # as of `None.shape`
                if not labels:
                    raise
                names = ", ".join(labels)
                raise UnweightedError(f"The model has no logits without {names} ({error!r}). {HINT}") from error
        if self._may_skip_logits:
            inputs = {**inputs, "skip_logits": False}
        return model(**{**inputs, **labels}), True

    def with_decoder_inputs(self, inputs: Inputs, labels: Labels) -> Inputs:
        """The inputs, with those of the decoder that an encoder-decoder makes of its labels, if it can be asked to."""
        make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if make is None or not self.makes_inputs(inputs, labels):
            return inputs
        return {**inputs, "decoder_input_ids": make(**labels)}

    def makes_inputs(self, inputs: Inputs, labels: Labels) -> bool:
        """Whether the model makes the inputs of its decoder of the labels."""
        if not self._is_encoder_decoder or {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
            return False
        return set(labels) == {"labels"} and isinstance(labels["labels"], Tensor) and labels["labels"].dim() > 1

    @cached_property
    def _may_skip_logits(self) -> bool:
        """Whether the model may skip its logits in training when it is given labels, as with the Liger kernels."""
        return "skip_logits" in inspect.signature(without_peft(self.model).forward).parameters

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def terms(
        self, outputs: Any, with_labels: bool, inputs: Inputs, labels: Labels, batch: int, shifts: Any = None
    ) -> Terms:
        """Losses of a batch, with token labels shifted as `shifts` says; by default as the model does."""
        if self._custom is not None:
            losses, importance = self._custom.losses(outputs, labels, inputs, batch, with_labels)
            return Terms(losses, importance, losses.mean)
        if len(labels) > 1 and set(SPAN) <= set(labels):
            return span(*logits_of(outputs, batch, with_labels, SPAN_LOGITS), labels)
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        if not isinstance(logits, Tensor) or logits.shape[:1] != (batch,):
            (logits,) = logits_of(outputs, batch, with_labels)
        kind, target = self.kind_and_target(logits, labels)
        try:
            if kind == "single_label_classification":
                return classes(logits, target, self.label_smoothing)
            if kind == "tokens":
                return tokens(logits, target, self.shifts if shifts is None else shifts, self.label_smoothing)
            if kind == "pixels":
                return pixels(logits, target, self.label_smoothing)
            return numbers(logits, target, kind, self.label_smoothing)
        except (IndexError, RuntimeError) as error:
            validate_classes(logits, target)
            shapes = f"{list(target.shape)} ({target.dtype}) do not fit logits {list(logits.shape)}"
            raise UnweightedError(f"Labels {shapes} ({error}). {HINT}") from error

    def kind_and_target(self, logits: Tensor, labels: Labels) -> tuple[str, Tensor]:
        """See [`kind_of_loss`]; and the first of the labels, with -100 where masks have no loss."""
        target = next(iter(labels.values()))
        if not isinstance(target, Tensor):
            of = f" of {type(target[0]).__name__}" if isinstance(target, (list, tuple)) and target else ""
            raise UnweightedError(
                f"{next(iter(labels))} must be a tensor, but is a {type(target).__name__}{of}, for which there is no "
                f"standard loss. {HINT}"
            )
        kind = kind_of_loss(logits, target, self._problem_type)
        if kind == "pixels":
            self._classes = logits.shape[1]
            target = self._with_ignored(target)
        return kind, target

    def _with_ignored(self, mask: Tensor) -> Tensor:
        usual = _MASK_IGNORES if self._classes <= _MASK_IGNORES else IGNORE_INDEX
        ignored = getattr(self._config, "semantic_loss_ignore_index", usual)
        return mask.masked_fill(mask == ignored, IGNORE_INDEX)


def with_usual_types(labels: Labels) -> Labels:
    """Convert labels to types that losses and models accept: int64 for integers and booleans, float32 for floats."""
    for name, value in labels.items():
        if isinstance(value, Tensor) and value.dtype not in (torch.int64, torch.float32):
            labels = {**labels, name: value.float() if value.is_floating_point() else value.long()}
    return labels


def kind_of_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> str:
    """The kind of loss that transformers computes: "pixels", "tokens", or a `problem_type`.

    If the model config has no `problem_type`, it is inferred from logits `[batch, …]` and labels as transformers does.
    """
    dims = logits.dim(), labels.dim()
    if dims in ((4, 3), (3, 2)) and not labels.is_floating_point():
        if dims == (3, 2):
            return "tokens"
        if labels.shape != logits.shape[:-1]:  # else classes are on the last axis, as for word pairs
            return "pixels"
    if problem_type is not None:
        return problem_type
    if dims[0] == 1 or logits.shape[-1] == 1:
        return "regression"
    several = labels.is_floating_point() or (dims[0] == 2 and labels.shape == logits.shape)
    return "multi_label_classification" if several else "single_label_classification"


# ---- the usual losses ------------------------------------------------------------------------------------------------

_OF_NUMBERS = {
    "multi_label_classification": (per_example.binary_cross_entropy, per_example.binary_cross_entropy_importance),
    "regression": (per_example.squared_error, per_example.squared_error_importance),
}


def classes(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Terms:
    """Cross-entropy of classes `[batch, …]`, -100 where there is no loss, or of probabilities like `logits`."""
    if labels.is_floating_point():
        losses = per_example.cross_entropy(logits, labels, smoothing)
        return Terms(losses, partial(per_example.cross_entropy_importance, logits, labels, smoothing), losses.mean)
    labels = labels.view(logits.shape[:-1])
    losses = per_example.cross_entropy(logits, labels, smoothing)
    all_have_one = labels.device.type == "cpu" and labels.dim() == 1 and int(labels.min()) >= 0
    counted = None if all_have_one else count(labels)
    mean = losses.mean if all_have_one else lambda: losses.sum() / counted.sum()
    if logits.dim() > 2:
        return Terms(losses, partial(per_example.cross_entropy_importance, logits, labels, smoothing), mean, counted)
    ignored = None if all_have_one else labels == IGNORE_INDEX
    p = torch.softmax(logits.detach(), -1, dtype=losses.dtype)
    observed = {"loss": losses.detach().float(), **per_example.observed_classes(p, labels, ignored)}
    squares = partial(per_example.squared_distance_to_class, p, labels, smoothing, ignored)
    return Terms(losses, lambda: squares().sqrt(), mean, counted, observed=observed)


def numbers(logits: Tensor, labels: Tensor, problem_type: str, smoothing: float = 0.0) -> Terms:
    """Binary cross-entropy or squared error, for labels with as many elements as `logits`, `[batch, …]`."""
    if problem_type not in _OF_NUMBERS:
        known = ["single_label_classification", *_OF_NUMBERS]
        raise ValueError(f"config.problem_type must be one of {known}, but is {problem_type!r}.")
    if smoothing:
        raise ValueError(f"label_smoothing_factor is for single-label classification, not {problem_type}: set it to 0.")
    if labels.is_floating_point() and labels.numel() == len(logits) < logits.numel():
        raise ValueError(
            f"Labels are one number per example ({labels.dtype}), but the model has {logits.shape[-1]} outputs: "
            "convert classes to integers, as in row['labels'] = int(row['labels']), or set num_labels=1 for regression."
        )
    loss, importance = _OF_NUMBERS[problem_type]
    losses = loss(logits, labels)
    return Terms(losses, partial(importance, logits, labels), losses.mean)


def tokens(logits: Tensor, labels: Tensor, shifts: bool, smoothing: float = 0.0) -> Terms:
    """Cross-entropy, summed over the tokens of an example.

    The logits are `[batch, tokens, classes]`; with prompt tuning, virtual tokens come first, which have no labels.
    """
    virtual = logits.shape[1] - labels.shape[1]
    counted = count(predicted(labels, shifts))  # as in `Trainer`, which ignores virtual tokens
    labels = predicted(F.pad(labels, (virtual, 0), value=IGNORE_INDEX), shifts)
    losses = per_example.cross_entropy(logits, labels, smoothing)
    importance = partial(per_example.cross_entropy_importance, logits, labels, smoothing)
    return Terms(losses, importance, lambda: losses.sum() / count(labels).sum(), counted, are_sums=True)


def predicted(labels: Tensor, shifts: bool) -> Tensor:
    """The label that each position predicts."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:] if shifts else labels


def pixels(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Terms:
    """Cross-entropy, summed over the pixels of masks `[batch, height, width]`, to whose size the logits are resized."""
    if logits.shape[1] == 1:
        raise ValueError(f"A mask of two classes requires a model with two outputs, but it has one. {HINT}")
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    losses, counted = per_example.pixel_cross_entropy(logits, labels, smoothing), count(labels)
    importance = partial(per_example.pixel_cross_entropy_importance, logits, labels, smoothing)
    return Terms(losses, importance, lambda: losses.sum() / counted.sum(), counted, are_sums=True)


def span(start_logits: Tensor, end_logits: Tensor, labels: Labels) -> Terms:
    """Mean of the cross-entropies of start and end, logits `[batch, tokens]`; none for positions beyond the text."""
    pairs = []
    for logits, name in zip((start_logits, end_logits), SPAN, strict=True):
        position = labels[name].view(len(logits)).clamp(min=0)
        pairs.append((logits, position.masked_fill(position >= logits.shape[1], IGNORE_INDEX)))
    losses = [per_example.cross_entropy(*pair) for pair in pairs]
    counted = [count(position) for _, position in pairs]
    return Terms(
        sum(losses) / 2,
        lambda: torch.stack([per_example.cross_entropy_importance(*pair) for pair in pairs]).norm(dim=0) / 2,
        lambda: sum(loss.sum() / number.sum() for loss, number in zip(losses, counted, strict=True)) / 2,
        sum(counted) / 2,
    )
