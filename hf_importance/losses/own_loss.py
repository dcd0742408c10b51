"""The comparison of a model's own loss with the mean of the usual per-example losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_importance.errors import UnweightedError
from hf_importance.losses import made_up
from hf_importance.losses.first_batch import FirstBatches, precision_of, tolerance
from hf_importance.losses.isolation import without_side_effects
from hf_importance.losses.outputs import HINT, Inputs, Labels, any_logits, logits_of, model_loss, validate_classes
from hf_importance.losses.per_example import IGNORE_INDEX

_AUXILIARY_LOSSES = ("aux_loss", "z_loss")
_FOR_EXAMPLES, _FOR_POSITIONS = 32, 8  # comparisons that show classes, at most; twice as many if losses are alike
_CHANGED_LOGITS = 3e-2  # relative change of the loss, beyond what two passes on a GPU differ by


@dataclass(frozen=True)
class Found:
    """What the comparisons have shown so far."""

    shifts: bool | None = None  # whether the model predicts tokens from the previous ones; None if not yet known
    adds: bool = False  # whether it adds an auxiliary loss
    classes: int = 0  # number of classes whose weights would have shown


def compare_own_loss(
    objective: Any, before: Found, batches: FirstBatches, inputs: Inputs, labels: Labels, batch: int
) -> Found:
    """Compare the model's own loss with the usual one on one batch; a ValueError if they differ, or if there is none.

    The model is called as [`without_side_effects`] says: once without labels, once with those of the batch, and once
    with each of the labels that are made up for its logits ([`made_up`]), so that every class occurs and a shift shows.
    Positions without a label stay without, because a model may know them from its inputs. The number of calls is
    bounded, and the same in all processes, as the layers may be distributed over them. Where nothing can be made up
    (spans, soft labels, models that make inputs of labels) the labels of the batches have to suffice.
    """
    check = _Check(objective, before, inputs, labels, batch)
    calls = batches.together(check.with_labels_of_batch, 1)
    if objective.label_smoothing:  # `Trainer` then computes the loss from the logits
        batches.decide(settled=True)
        return before
    made_up_labels = partial(check.with_labels_made_up, int(calls.max()), batches.batches)
    votes = batches.together(made_up_labels, 4)
    compared, as_they_are, shifted, classes = votes.amax(0).tolist()
    if as_they_are and shifted:
        raise ValueError(
            "The loss of the model is that of shifted labels in one process, and that of labels as they are in "
            f"another. {HINT}"
        )
    shifts = bool(shifted) if as_they_are or shifted else before.shifts
    found = Found(shifts, check.adds, max(before.classes, int(classes)))
    if not compared:
        batches.decide(False, "its loss is not finite")
    elif check.adds:
        batches.decide(settled=True)
    elif len(check.own.mean_losses) > 1 and shifts is None:
        batches.decide(False, "it is the same for shifted labels and for labels as they are")
    else:
        alike = batches.last and found.classes == before.classes
        settled = found.classes >= check.classes
        batches.decide(settled, "its losses are too much alike for class weights to show" if alike else "")
    return found


def _refuse_places(logits: Tensor, labels: Tensor) -> None:
    """Refuse similarities of all pairs in a batch, whose labels are the places of the partners."""
    size = len(labels)
    may_compare = size > 2 and logits.shape == (size, size) and not labels.is_floating_point()
    if may_compare and torch.equal(labels.flatten().cpu(), torch.arange(size)):
        raise UnweightedError(
            f"The labels are the places 0 … {size - 1} in the batch, so the model compares the examples of a batch "
            "with each other, and there is no loss per example."
        )


class _Comparison(NamedTuple):
    """The loss of the model and the mean of the per-example losses, for the same labels."""

    model_loss: float
    mean_losses: list[float]  # for tokens, of labels as they are and shifted
    relative: float  # tolerance

    def agree(self, since: _Comparison | None = None) -> list[bool]:
        """Whether the two agree, for each way to read the labels; `since`: in the change from another comparison."""
        own, means = self.model_loss, self.mean_losses
        if since is not None:
            own, means = own - since.model_loss, [a - b for a, b in zip(means, since.mean_losses, strict=True)]
        return [abs(own - mean) <= tolerance(self.model_loss, self.relative) for mean in means]


class _Check:
    """The comparisons on one batch; arguments as for [`compare_own_loss`]."""

    def __init__(self, objective: Any, before: Found, inputs: Inputs, labels: Labels, batch: int) -> None:
        self._objective, self._before = objective, before
        self._inputs, self._labels, self._batch = inputs, labels, batch
        self.own: _Comparison  # with the labels of the batch
        self.adds = before.adds
        self.classes = 0  # number of classes that have to show; 0 if nothing can be made up to show them
        self._made: list[Labels] = []
        self._reached = 0  # the weights of classes below this number show with the labels made up, or did earlier
        self._tentative = False  # whether a disagreement for made-up labels says nothing

    def with_labels_of_batch(self) -> list[int]:
        """Compare for the labels of the batch, and make up others; returns the number of these."""
        objective, labels, batch = self._objective, self._labels, self._batch
        with without_side_effects(objective.model):
            self._usual = outputs, with_labels = objective.forward(objective.model, self._inputs, labels)
        logits, kind = any_logits(outputs, with_labels), ""
        if logits is not None and len(labels) == 1:
            kind, target = objective.kind_and_target(logits, labels)
            _refuse_places(logits, target)
            validate_classes(logits, target)  # before an assertion that ends a process with a GPU
        mean = objective.terms(outputs, with_labels, self._inputs, labels, batch).mean()
        if objective.label_smoothing:
            return [0]
        if kind == "multi_label_classification":
            self._labels = {name: value.float() for name, value in labels.items()}
        self.own, mean_with_labels = self._compare(self._inputs, self._labels)
        self._tentative = self.adds
        if not with_labels:
            _validate_same_logits(mean, mean_with_labels)
        self._inputs = objective.with_decoder_inputs(self._inputs, self._labels)
        self._make_up(kind)
        return [len(self._made)]

    def with_labels_made_up(self, calls: int, number: int) -> list[float]:
        """Compare for labels that are made up, in so many calls of the model, on the batch with this number.

        Returns whether any loss was finite, votes for labels as they are and for shifted labels, and the classes that
        show.
        """
        comparisons = [self.own]
        for labels in (self._made + [self._labels] * calls)[:calls]:
            try:
                comparisons.append(self._compare(self._inputs, labels)[0])
            except ValueError:  # the model demands more of its labels
                self._reached = self.classes
        finite = [c for c in comparisons if math.isfinite(c.model_loss) and any(map(math.isfinite, c.mean_losses))]
        since = finite.pop(0) if self.adds and finite else None  # an added term does not depend on the labels
        table = [comparison.agree(since) for comparison in finite]
        agree = [all(column) for column in zip(*table, strict=True)]
        if finite and not any(agree) and not self._tentative:
            different = (comparison for comparison, row in zip(finite, table, strict=True) if not any(row))
            raise self._another_loss(next(different, finite[-1]), number)
        votes = agree if sum(agree) == 1 < len(agree) else [False, False]
        compared = bool(finite) or (self.adds and not self._made)
        return [compared, *votes, self._reached]

    def _compare(self, inputs: Inputs, labels: Labels) -> tuple[_Comparison, Tensor]:
        """Compare for these labels; also returns the mean of the usual losses."""
        objective, batch = self._objective, self._batch
        try:
            with without_side_effects(objective.model):
                outputs, _ = objective.forward(objective.model, inputs, labels, with_labels=True)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UnweightedError(
                f"The model cannot compute its own loss for these labels ({error}). {HINT}"
            ) from error
        loss = model_loss(outputs)
        if loss is None:
            raise UnweightedError(f"The model returned no 'loss' for its labels, so its loss is unknown. {HINT}")
        if isinstance(outputs, Mapping):
            self.adds |= any(key.endswith(_AUXILIARY_LOSSES) and isinstance(outputs[key], Tensor) for key in outputs)
        fused = any_logits(outputs, True) is None  # the model returns logits or a loss
        arguments = (*(self._usual if fused else (outputs, True)), inputs, labels, batch)
        terms = objective.terms(*arguments)
        means = [mean := terms.mean()]
        logits = any_logits(*arguments[:2])
        if logits is not None and len(labels) == 1 and objective.kind_and_target(logits, labels)[0] == "tokens":
            means = [objective.terms(*arguments, shifts).mean() for shifts in (False, True)]
        resized = terms.are_sums and len(means) == 1  # masks
        relative = precision_of(loss, precisely=not (fused or resized or _mixes_precisions(objective.model)))
        return _Comparison(loss.float().mean().item(), [value.item() for value in means], relative), mean

    def _another_loss(self, comparison: _Comparison, number: int) -> UnweightedError:
        place = "the first batch" if number == 1 else f"batch {number}"
        how = "" if comparison is self.own else ", with labels made up so that every class occurs,"
        shifts = self._objective.shifts and len(comparison.mean_losses) > 1
        return UnweightedError(
            f"The model's loss on {place}{how} is {comparison.model_loss:.5g}, but the mean of the usual per-example "
            f"losses is {comparison.mean_losses[int(shifts)]:.5g}: the model has its own loss (class weights, another "
            f"reduction, …). {HINT}"
        )

    # ---- labels that are made up -------------------------------------------------------------------------------------

    def _make_up(self, kind: str) -> None:
        """Set the labels to compare with, and the number of classes they have to show."""
        objective, labels, inputs = self._objective, self._labels, self._inputs
        if len(labels) > 1 or "shift_labels" in inputs or objective.makes_inputs(inputs, labels):
            return
        ((name, original),) = labels.items()
        (logits,) = logits_of(self._usual[0], self._batch, self._usual[1])
        _, target = objective.kind_and_target(logits, labels)
        if kind == "tokens":
            made = self._for_tokens(logits, target, inputs.get("attention_mask"))
        elif self.adds:
            made = []
        elif target.is_floating_point() or logits.shape[-1] == 1:
            made = self._for_numbers(logits, target, kind)
        else:
            made = self._for_classes(logits, target, original, kind == "pixels")
        self._made = [{name: value.to(original.dtype)} for value in made if value.shape == original.shape]

    def _for_tokens(self, logits: Tensor, target: Tensor, mask: Tensor | None) -> list[Tensor]:
        logits = logits[:, logits.shape[1] - target.shape[1] :]
        kept = target != IGNORE_INDEX
        if not kept.any():
            kept = mask.bool() if mask is not None and mask.shape == kept.shape else torch.ones_like(kept)
            self._tentative = True  # a model may know from its inputs that they have no label
        made = [made_up.showing_shift(logits, target, kept)] if target.shape[1] > 1 else []
        if self.adds:
            return made
        self.classes = logits.shape[2]
        agree = self.own.agree()
        shifts = int(agree[1] if sum(agree) == 1 else self._objective.shifts)
        kept[:, :shifts] = False
        if self._tentative or not kept.any():
            return made
        place = kept.flatten().nonzero().flatten()
        return made + self._showing_classes(logits, place - shifts, target, place, _FOR_POSITIONS)

    def _for_classes(self, logits: Tensor, target: Tensor, original: Tensor, are_pixels: bool) -> list[Tensor]:
        """For one class per example, or per pixel."""
        if are_pixels:
            if logits.shape[-2:] != target.shape[-2:]:
                logits = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
            logits = logits.movedim(1, -1)
        self.classes = logits.shape[-1]
        place = (target != IGNORE_INDEX).flatten().nonzero().flatten()
        if not len(place):
            return []
        return self._showing_classes(logits, place, original, place, _FOR_POSITIONS if are_pixels else _FOR_EXAMPLES)

    def _showing_classes(self, logits: Tensor, rows: Tensor, labels: Tensor, place: Tensor, most: int) -> list[Tensor]:
        """Labels like `labels`, with others at the flat positions `place`, predicted by these rows of the logits."""
        shown = made_up.ClassLabels(logits.reshape(-1, self.classes)[rows], self.own.relative)
        start = min(self._before.classes, self.classes)
        made, self._reached = shown.make(start, most, sample=most == _FOR_POSITIONS)
        return [labels.flatten().index_copy(0, place, values).view(labels.shape) for values in made]

    def _for_numbers(self, logits: Tensor, target: Tensor, kind: str) -> list[Tensor]:
        """For several classes per example, and for regression."""
        if not target.is_floating_point():
            return []
        if target.dim() == 2 and target.shape[1] > 1 and kind != "regression":
            several = kind == "multi_label_classification" and target.shape == logits.shape
            return made_up.several_classes(target) if several else []
        made = made_up.numbers_between(target)
        error = (logits.float().flatten() - (made or [target])[0].flatten()).abs()
        squared, absolute = error.square().mean(), error.mean()
        self.classes = 1  # to tell squared errors from others
        self._reached = int((squared - absolute).abs() > 2 * tolerance(squared, self.own.relative))
        return made


def _mixes_precisions(model: Any) -> bool:
    """Whether the loss may be computed of logits in another precision than those that are returned."""
    of_accelerate = hasattr(model, "_original_forward")  # in mixed precision
    return of_accelerate or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def _validate_same_logits(without: Tensor, with_labels: Tensor) -> None:
    finite = without.isfinite() and with_labels.isfinite()
    if finite and (without - with_labels).abs() > _CHANGED_LOGITS * without.abs() + _CHANGED_LOGITS:
        raise UnweightedError(
            f"The model returns other logits if it is given labels: the mean loss is then {with_labels.item():.5g}, "
            f"else {without.item():.5g}. It is trained without labels. {HINT}"
        )
