"""The loss that training minimises, and the importances that go with it."""

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
    may_skip_logits,
    refuse_another_loss,
    refuse_coupled,
    refuse_coupled_by_model,
    requires,
    same,
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
    """What one batch gives.

    Args:
        losses: `[batch]`, with gradient.
        importance: `[batch]`, without.
        observed: float32 `[4, batch]`, without: the rows that `record.OBSERVED` names.
        added: what the model adds to its loss by itself, with gradient; 0 for most.
        outputs: of the model.
        counted: `[batch]`, in how many positions each example has a loss; None: all have one.
        are_sums: whether losses are sums over these.
    """

    losses: Tensor
    importance: Tensor
    observed: Tensor
    added: Tensor | float
    outputs: Any
    counted: Tensor | None = None
    are_sums: bool = False

    def weighted_mean(self, weight: Tensor, positions: Tensor | None = None, share: float = 1.0) -> Tensor:
        """The loss of the batch: weight · loss over what has a loss, and what the model adds.

        Of one loss per example it is the mean; where some have none, over the weighted share of those that have one. Of
        sums over positions it is Σ w ℓ / Σ w n. Both are ratio estimators, and the mean of `Trainer` where all weights
        are 1. Their bias under weights is that of a ratio, of the order of 1/batch; to divide by positions without
        weights would be biased by more, as they depend on which examples are drawn.

        Args:
            weight: `[batch]`.
            positions: Σ w n over all batches of the step; by default over this one.
            share: of what the model adds that counts: one over those batches.
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
    """The loss that training minimises, example by example, and the importance that goes with it.

    The loss is computed outside the model, from its logits. Which one it is follows from the labels and the outputs, by
    the rules of the heads of transformers: cross-entropy, binary cross-entropy or squared error of an example
    (`config.problem_type`, else the number of logits and the type of the labels); cross-entropy of its tokens, which
    causal language models shift by one, or of its pixels; of the start and the end of a span; or
    `per_example_loss_func`. The first batch is also given to the model with its labels, to compare with the loss that
    it would have trained with.

    Args:
        model: unwrapped.
        metric: see `ImportanceConfig`.
        label_smoothing: as in `TrainingArguments.label_smoothing_factor`; for cross-entropy.
        per_example_loss_func: see `ImportanceTrainerMixin`.
        causal: whether tokens are predicted from those before them; the first batch may show that it is otherwise.
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
        self._classes = 0  # of masks

    def close(self) -> None:
        """Leave the model as it was found."""
        if self._last_layer is not None:
            self._last_layer.remove()

    def __call__(self, model: nn.Module, inputs: dict[str, Any], labels: Labels, batch: int) -> Measured:
        """Forward the batch through `model`, the wrapped one, and measure.

        Args:
            model: see above.
            inputs: of it, without the labels.
            labels: by name; none where the model has none, which takes a `per_example_loss_func`.
            batch: number of examples.

        Raises:
            ValueError: if losses per example cannot be had, or are not those of the model.
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
        """The mean of the losses of `per_example_loss_func`, and the outputs; a tuple begins with that loss."""
        labels = heads.whole_numbers(labels)
        outputs, labels_given = self._forward(model, inputs, labels)
        loss = self._own_losses(outputs, *_as_arguments(inputs, labels)).mean()
        if isinstance(outputs, Mapping):
            return loss, outputs
        rest = (outputs,) if isinstance(outputs, Tensor) else outputs[int(labels_given) :]
        return loss, (loss, *rest)

    @property
    def shifts(self) -> bool:
        """Whether tokens are predicted from those before them."""
        return self._shifts

    def state_dict(self) -> dict[str, Any]:
        """What the first batch has shown, so that a resumed training does not look again."""
        return {
            "loss": self._loss_identity,
            "looked": self._checked,
            "shifts": self._shifts,
            "adds": self._has_auxiliary_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where [`state_dict`] was taken; with another model or loss look at the first batch again."""
        looked, shifts, adds = (read_number(state, name, bool) for name in ("looked", "shifts", "adds"))
        if state["loss"] == self._loss_identity:
            self._checked, self._shifts, self._has_auxiliary_loss = looked, shifts, adds

    @property
    def _loss_identity(self) -> list[Any]:
        """What must be the same for the first batch to have shown the same."""
        function = self._per_example_loss_func
        name = None if function is None else getattr(function, "__qualname__", type(function).__qualname__)
        return [type(self._model).__name__, self._label_smoothing, name]

    # ---- the forward pass --------------------------------------------------------------------------------------------

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], labels: Labels, give: bool = False
    ) -> tuple[Any, bool]:
        """The outputs, and whether the model was given the labels: where it adds to its loss, or cannot do without."""
        if {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs) or not self._decodes(labels):
            must = self._needs_labels(labels)
        elif hasattr(self._model, "prepare_decoder_input_ids_from_labels"):
            inputs = {**inputs, "decoder_input_ids": self._model.prepare_decoder_input_ids_from_labels(**labels)}
            must = False
        else:  # it makes them of the labels by itself
            must = True
        labels_given = give or must or self._has_auxiliary_loss
        if labels_given and self._may_skip_logits:
            inputs = {**inputs, "skip_logits": False}
        return (model(**{**inputs, **labels}) if labels_given else model(**inputs)), labels_given

    def _needs_labels(self, labels: Labels) -> bool:
        if self._needs is None:  # which takes as long as a small layer
            self._needs = requires(self._model, labels)
        return self._needs

    @cached_property
    def _may_skip_logits(self) -> bool:
        return may_skip_logits(self._model)

    def _decodes(self, labels: Labels) -> bool:
        """Whether it is an encoder-decoder, which is to write its labels."""
        if not getattr(self._config, "is_encoder_decoder", False) or set(labels) != {"labels"}:
            return False
        return isinstance(labels["labels"], Tensor) and labels["labels"].dim() > 1

    # ---- which loss it is --------------------------------------------------------------------------------------------

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
        """The labels as a loss of these logits takes them."""
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
        """`[batch]`: tokens or pixels that have a loss, of labels as the collator makes them."""
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
        """Compare with the loss of the model, which also tells whether it shifts its labels, and adds to its loss."""
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
            heads.refuse_out_of_range(logits, self._target(logits, labels))  # before a GPU fails at them
        self._terms(outputs, labels_given, inputs, labels, batch)
        if self._label_smoothing:  # then `Trainer` takes the logits, whatever the loss of the model is
            return
        self._compare(inputs, self._as_read(outputs, labels_given, labels, batch), batch, (outputs, labels_given))

    def _losses_of_copies(self, inputs: dict[str, Any], labels: Labels, batch: int) -> Tensor:
        """`[batch]`, of a batch that is the first example again and again."""
        inputs, labels = copies_of_the_first(inputs, batch), copies_of_the_first(labels, batch)
        with without_side_effects(self._model):
            outputs, _ = self._forward(self._model, inputs, labels)
            return self._own_losses(outputs, *_as_arguments(inputs, labels))

    def _as_read(self, outputs: Any, labels_given: bool, labels: Labels, batch: int) -> Labels:
        """Several truth values of an example as floating-point numbers, which models want; all else as it is."""
        if len(labels) > 1:
            return labels
        (logits,) = heads.logits_of(outputs, batch, labels_given)
        return {name: heads.read_labels(target, logits, self._problem_type) for name, target in labels.items()}

    def _compare(self, inputs: dict[str, Any], labels: Labels, batch: int, usual: tuple[Any, bool]) -> None:
        """Give the model the labels, which may return no logits then, but `usual`ly does."""
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
        if self._has_auxiliary_loss:  # then the loss is not to be compared
            return
        if by_rule.are_sums and not same(theirs, by_rule.mean()):
            self._shifts = not self._shifts
        refuse_another_loss(theirs, self._terms(*made_of, inputs, labels, batch).mean())


def _observe(losses: Tensor, outputs: Any, labels_given: bool, labels: Labels) -> Tensor:
    """Of the decision of the model, where it takes one per example."""
    target = next(iter(labels.values())) if len(labels) == 1 else None
    return observed_of(losses, heads.decision_of(outputs, labels_given), target)


@torch.no_grad()
def observed_of(losses: Tensor, logits: Tensor | None = None, target: Any = None) -> Tensor:
    """float32 `[4, batch]`: the rows of `record.OBSERVED`; NaN is what is not known.

    Args:
        losses: `[batch]`.
        logits: the decision of the model: those of the classes of each example, or a number.
        target: what it should have been.
    """
    observed = losses.new_full((len(OBSERVED), len(losses)), torch.nan, dtype=torch.float32)
    label, loss, prediction, probability = observed  # views
    loss.copy_(losses)
    if not isinstance(target, Tensor) or logits is None or target.numel() != len(losses):
        return observed
    target = target.flatten()
    if logits.numel() == len(losses):
        label.copy_(target)
        prediction.copy_(logits.flatten())
    elif logits.dim() == 2 and not target.is_floating_point():
        ignored = target == per_example.IGNORE_INDEX
        highest, number = logits.float().softmax(-1).max(-1)
        label.copy_(target).masked_fill_(ignored, torch.nan)
        prediction.copy_(number)
        probability.copy_(highest).masked_fill_(ignored, torch.nan)
    return observed


def _as_arguments(inputs: dict[str, Any], labels: Labels) -> tuple[Any, dict[str, Any]]:
    """What `per_example_loss_func` gets: the labels, a dict of several, or the inputs if there are none; the inputs."""
    if not labels:
        return inputs, inputs
    return (next(iter(labels.values())) if len(labels) == 1 else labels), inputs


def _is_mask(logits: Tensor, labels: Tensor) -> bool:
    usual = labels.shape == logits.shape[:-1]  # the classes come last, as of pairs of words
    return logits.dim() == 4 and labels.dim() == 3 and not labels.is_floating_point() and not usual


def _kind(value: Any) -> str:
    """What it is, with what is in it."""
    name = type(value).__name__
    return f"a {name} of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and value else f"a {name}"
