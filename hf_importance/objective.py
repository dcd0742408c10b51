"""From what a model returns to per-example losses and importances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_importance import functional
from hf_importance.record import SEEN

PerExampleLoss = Callable[[Any, Any], Tensor]
Labels = dict[str, Tensor]

_CLASSIFICATION = {
    "single_label_classification": (functional.cross_entropy, functional.cross_entropy_importance),
    "multi_label_classification": (functional.binary_cross_entropy, functional.binary_cross_entropy_importance),
    "regression": (functional.squared_error, functional.squared_error_importance),
}
_SPAN = ("start_positions", "end_positions")
_SPAN_LOGITS = ("start_logits", "end_logits")
_ADDED = ("aux_loss", "z_loss")
_HINT = "Pass per_example_loss_func=f with f(outputs, labels) -> Tensor[batch] that computes it."


@dataclass
class Measured:
    """What one batch gives.

    Args:
        losses: `[batch]`, with gradient.
        importance: `[batch]`, without.
        seen: float32 `[4, batch]`, without: the rows that `record.SEEN` names.
        added: what the model adds to its loss by itself, with gradient; 0 for most.
        outputs: of the model.
    """

    losses: Tensor
    importance: Tensor
    seen: Tensor
    added: Tensor | float
    outputs: Any


@dataclass
class _Terms:
    """Of one batch: the losses, how to get their importances, and their mean as the head of the model takes it."""

    losses: Tensor
    importance: Callable[[], Tensor]
    mean: Callable[[], Tensor]
    are_sums: bool = False  # over tokens


class Objective:
    """The loss that training minimises, example by example, and the importance that goes with it.

    The loss is computed outside the model, from its logits. Which one it is follows from the labels and the outputs, by
    the rules of the heads of transformers: cross-entropy, binary cross-entropy or squared error of an example
    (`config.problem_type`, else the number of logits and the type of the labels); cross-entropy of its tokens, which
    causal language models shift by one; of the start and the end of a span; or `per_example_loss_func`. The first batch
    is also given to the model with its labels, to compare with the loss that it would have trained with.

    The loss of an example is the sum over its tokens, divided by the constant n̄, the mean number of tokens per example:
    to divide by those of the batch would be biased, as they depend on which examples are drawn.

    Args:
        model: unwrapped.
        metric: see `ImportanceConfig`.
        label_smoothing: as in `TrainingArguments.label_smoothing_factor`; for cross-entropy.
        per_example_loss_func: see `ImportanceTrainerMixin`.
        causal: whether tokens are predicted from those before them; the first batch may show that it is otherwise.
        mean_over_examples: from the name of a label and a count over it, `[batch, …] → [batch]`, to the mean of that
            count over the training data.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: str = "logit_gradient",
        label_smoothing: float = 0.0,
        per_example_loss_func: PerExampleLoss | None = None,
        causal: bool = False,
        mean_over_examples: Callable[[str, Callable[[Tensor], Tensor]], float] = lambda name, count: 1.0,
    ) -> None:
        self._model = model
        self._config = getattr(model, "config", None)
        self._metric = metric
        self._label_smoothing = label_smoothing
        self._per_example_loss_func = per_example_loss_func
        self._shifts = causal
        self._mean_over_examples = mean_over_examples
        self._mean_tokens: float | None = None
        self._last_layer = _LastLayer(model) if metric == "last_layer_gradient" else None
        self._checked = False
        self._adds = False

    def close(self) -> None:
        """Leave the model as it was found."""
        if self._last_layer is not None:
            self._last_layer.remove()

    def __call__(self, model: nn.Module, inputs: dict[str, Any], labels: Labels, batch: int) -> Measured:
        """Forward the batch through `model`, the wrapped one, and measure.

        Raises:
            ValueError: if losses per example cannot be had, or are not those of the model.
        """
        inputs = self._with_decoder_inputs(inputs, labels)
        if not self._checked:
            self._check(inputs, labels, batch)
            self._checked = True
        outputs = model(**inputs, **labels) if self._adds else model(**inputs)
        terms = self._terms(outputs, labels, batch)
        added = outputs["loss"] - terms.mean() if self._adds else 0.0
        losses = terms.losses / self._tokens_per_example(*labels) if terms.are_sums else terms.losses
        return Measured(losses, self._importance(terms), _seen(losses, outputs, labels), added, outputs)

    def _with_decoder_inputs(self, inputs: dict[str, Any], labels: Labels) -> dict[str, Any]:
        """An encoder-decoder makes them of its labels, which it is not going to see."""
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs)
        if not getattr(self._config, "is_encoder_decoder", False) or given or set(labels) != {"labels"}:
            return inputs
        if labels["labels"].dim() < 2 or not hasattr(self._model, "prepare_decoder_input_ids_from_labels"):
            return inputs
        return {**inputs, "decoder_input_ids": self._model.prepare_decoder_input_ids_from_labels(**labels)}

    def _tokens_per_example(self, name: str) -> float:
        if self._mean_tokens is None:
            self._mean_tokens = self._mean_over_examples(name, lambda labels: _counted(self._predicted(labels)))
        return self._mean_tokens

    def _importance(self, terms: _Terms) -> Tensor:
        if self._metric == "uniform":
            return torch.ones_like(terms.losses, requires_grad=False)
        if self._metric == "loss":
            return terms.losses.detach().clamp(min=0)
        importance = terms.importance().detach()
        return importance if self._last_layer is None else self._last_layer.importance(importance)

    # ---- which loss it is --------------------------------------------------------------------------------------------

    def _terms(self, outputs: Any, labels: Labels, batch: int) -> _Terms:
        if self._per_example_loss_func is not None:
            return self._custom(outputs, labels, batch)
        if set(_SPAN) <= set(labels):
            return self._span(*_logits(outputs, _SPAN_LOGITS, batch), labels)
        (logits,) = _logits(outputs, ("logits",), batch)
        target = next(iter(labels.values()))
        try:
            if target.dim() == 2 and logits.dim() == 3 and not target.is_floating_point():
                return self._tokens(logits, target)
            return self._classification(logits, target)
        except (IndexError, RuntimeError) as error:
            _refuse_labels_out_of_range(logits, target)
            shapes = f"{list(target.shape)} ({target.dtype}) do not fit logits {list(logits.shape)}"
            raise ValueError(f"Labels {shapes} ({error}). {_HINT}") from error

    def _classification(self, logits: Tensor, labels: Tensor) -> _Terms:
        problem_type = getattr(self._config, "problem_type", None) or _usual_problem_type(logits, labels)
        if problem_type not in _CLASSIFICATION:
            raise ValueError(f"config.problem_type must be one of {list(_CLASSIFICATION)}, but is {problem_type!r}.")
        loss, importance = _CLASSIFICATION[problem_type]
        if problem_type != "single_label_classification":
            if self._label_smoothing:
                raise ValueError(
                    f"label_smoothing_factor is for single-label classification, not {problem_type}: set it to 0."
                )
            losses = loss(logits, labels)
            return _Terms(losses, partial(importance, logits, labels), losses.mean)
        if not labels.is_floating_point():
            labels = labels.view(logits.shape[:-1])
        smoothing = self._label_smoothing
        losses = loss(logits, labels, smoothing)
        return _Terms(
            losses, partial(importance, logits, labels, smoothing), lambda: losses.sum() / _counted(labels).sum()
        )

    def _tokens(self, logits: Tensor, labels: Tensor) -> _Terms:
        virtual = logits.shape[1] - labels.shape[1]  # of prompt tuning, before the others
        labels = self._predicted(F.pad(labels, (virtual, 0), value=functional.IGNORE_INDEX))
        losses = functional.cross_entropy(logits, labels, self._label_smoothing)
        return _Terms(
            losses,
            partial(functional.cross_entropy_importance, logits, labels, self._label_smoothing),
            lambda: losses.sum() / _counted(labels).sum(),
            are_sums=True,
        )

    def _predicted(self, labels: Tensor) -> Tensor:
        """The label that each position predicts."""
        return F.pad(labels, (0, 1), value=functional.IGNORE_INDEX)[:, 1:] if self._shifts else labels

    def _span(self, start_logits: Tensor, end_logits: Tensor, labels: Labels) -> _Terms:
        pairs = []
        for logits, name in zip((start_logits, end_logits), _SPAN, strict=True):
            position = labels[name].view(len(logits)).clamp(min=0)
            pairs.append((logits, position.masked_fill(position >= logits.shape[1], functional.IGNORE_INDEX)))
        losses = [functional.cross_entropy(*pair) for pair in pairs]
        return _Terms(
            sum(losses) / 2,
            lambda: torch.stack([functional.cross_entropy_importance(*pair) for pair in pairs]).norm(dim=0) / 2,
            lambda: sum(loss.sum() / _counted(label).sum() for loss, (_, label) in zip(losses, pairs, strict=True)) / 2,
        )

    def _custom(self, outputs: Any, labels: Labels, batch: int) -> _Terms:
        logits = _logits(outputs, _logit_keys(outputs), batch)
        losses = self._per_example_loss_func(outputs, next(iter(labels.values())) if len(labels) == 1 else labels)
        if not isinstance(losses, Tensor) or losses.shape != (batch,):
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"per_example_loss_func must return a tensor of shape [{batch}], but returned {found}.")
        return _Terms(losses, partial(functional.autograd_importance, losses, *logits), losses.mean)

    # ---- the first batch ---------------------------------------------------------------------------------------------

    def _check(self, inputs: dict[str, Any], labels: Labels, batch: int) -> None:
        """Compare with the loss of the model, which also tells whether it shifts its labels, and adds to its loss."""
        with _evaluating(self._model):
            outputs = self._model(**inputs)
        if self._per_example_loss_func is not None:
            self._refuse_coupled(outputs, labels, batch)
            return
        if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
            _refuse_labels_out_of_range(outputs["logits"], next(iter(labels.values())))  # before a GPU fails at them
        self._terms(outputs, labels, batch)
        if self._label_smoothing:  # then `Trainer` takes the logits, whatever the loss of the model is
            return
        with _evaluating(self._model):
            outputs = self._model(**inputs, **labels)
        theirs = outputs.get("loss")
        by_rule = self._terms(outputs, labels, batch)
        if theirs is None:
            raise ValueError(f"The model returned no 'loss' for its labels, so that its loss is unknown. {_HINT}")
        self._adds = any(key.endswith(_ADDED) and isinstance(value, Tensor) for key, value in outputs.items())
        if self._adds:  # then the loss is not to be compared
            return
        if by_rule.are_sums and not _same(theirs, by_rule.mean()):
            self._shifts = not self._shifts
        ours = self._terms(outputs, labels, batch).mean()
        if not _same(theirs, ours):
            raise ValueError(
                f"The model's loss on the first batch is {theirs.mean().item():.5g}, but the mean of the usual "
                f"per-example losses is {ours.item():.5g}: it has a loss of its own (class weights, another reduction, "
                f"…). {_HINT}"
            )

    def _refuse_coupled(self, outputs: Any, labels: Labels, batch: int) -> None:
        """No loss may depend on the logits of another example."""
        keys = _logit_keys(outputs)
        leaves = [logits.detach().requires_grad_() for logits in _logits(outputs, keys, batch)]
        for key, leaf in zip(keys, leaves, strict=True):
            outputs[key] = leaf
        losses = self._custom(outputs, labels, batch).losses
        if not losses.requires_grad:
            raise ValueError(f"per_example_loss_func must compute the losses from the {' and '.join(keys)} in outputs.")
        for gradient in torch.autograd.grad(losses[0], leaves, allow_unused=True):
            if gradient is not None and gradient[1:].nan_to_num(nan=0.0).any():  # NaN: of 0 · ∞
                raise ValueError(
                    "per_example_loss_func must not couple the examples of a batch, but the first loss depends on the "
                    "logits of other examples: such losses cannot be weighted per example. Use Trainer for them."
                )


@contextmanager
def _evaluating(model: nn.Module):
    """No gradient, no dropout, no running statistics; then every module is again in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


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


@torch.no_grad()
def _seen(losses: Tensor, outputs: Any, labels: Labels) -> Tensor:
    """The decision of the model, where it takes one per example: a class and its probability, or a number."""
    seen = losses.new_full((len(SEEN), len(losses)), torch.nan, dtype=torch.float32)
    label, loss, prediction, probability = seen  # views
    loss.copy_(losses)
    logits, target = outputs.get("logits"), next(iter(labels.values()))
    if len(labels) > 1 or not isinstance(logits, Tensor) or target.numel() != len(losses):
        return seen
    target = target.flatten()
    if logits.numel() == len(losses):
        label.copy_(target)
        prediction.copy_(logits.flatten())
    elif logits.dim() == 2 and not target.is_floating_point():
        ignored = target == functional.IGNORE_INDEX
        highest, number = logits.float().softmax(-1).max(-1)
        label.copy_(target).masked_fill_(ignored, torch.nan)
        prediction.copy_(number)
        probability.copy_(highest).masked_fill_(ignored, torch.nan)
    return seen


def _logit_keys(outputs: Any) -> tuple[str, ...]:
    span = isinstance(outputs, Mapping) and "start_logits" in outputs
    return _SPAN_LOGITS if span else ("logits",)


def _logits(outputs: Any, keys: tuple[str, ...], batch: int) -> list[Tensor]:
    found = [outputs.get(key) for key in keys] if isinstance(outputs, Mapping) else []
    if not found or not all(isinstance(logits, Tensor) for logits in found):
        what = f"the keys {list(outputs)}" if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"The model must return a dict with {' and '.join(map(repr, keys))}, but returned {what}. Losses that "
            "couple the examples of a batch (contrastive, preference pairs) cannot be weighted: use Trainer for them."
        )
    for key, logits in zip(keys, found, strict=True):
        if logits.shape[:1] != (batch,):
            raise ValueError(f"{key} must be [{batch}, …], one row per example, but are {list(logits.shape)}.")
    return found


def _counted(labels: Tensor) -> Tensor:
    """`[batch]`: how many positions of each example have a loss."""
    if labels.is_floating_point():
        return labels.new_ones(labels.shape[0])
    return (labels != functional.IGNORE_INDEX).view(len(labels), -1).sum(1)


def _usual_problem_type(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[-1] == 1:
        return "regression"
    whole = labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if whole else "multi_label_classification"


def _refuse_labels_out_of_range(logits: Tensor, labels: Tensor) -> None:
    kept = labels[labels != functional.IGNORE_INDEX]
    classes = logits.shape[-1] if logits.dim() else 1
    if not labels.is_floating_point() and classes > 1 and kept.numel() and not 0 <= kept.min() <= kept.max() < classes:
        raise ValueError(
            f"Labels must be in 0 … {classes - 1}, as the model has {classes} outputs, but are in "
            f"{kept.min().item()} … {kept.max().item()}: correct the data, or num_labels of the model."
        )


def _same(theirs: Tensor, ours: Tensor) -> bool:
    tolerance = 1e-3 if theirs.dtype == torch.float32 else 3e-2
    return torch.allclose(theirs.float().mean(), ours.float(), rtol=tolerance, atol=1e-5, equal_nan=True)
