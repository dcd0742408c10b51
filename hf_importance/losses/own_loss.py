"""The comparison of a model's own loss with the usual per-example losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_importance.losses import heads, made_up
from hf_importance.losses.first_batch import Compared, FirstBatches, accepts, judge, precision_of, refuse_another_loss
from hf_importance.losses.heads import Labels
from hf_importance.losses.isolation import without_side_effects
from hf_importance.losses.made_up import MadeUp, tolerance
from hf_importance.losses.per_example import IGNORE_INDEX

_AUXILIARY_LOSSES = ("aux_loss", "z_loss")
_FOR_EXAMPLES, _FOR_POSITIONS = 32, 8  # comparisons that show classes, at most; twice as many if losses are alike
_CHANGED_LOGITS = 3e-2  # relative change of the loss, beyond what two passes on a GPU differ by


@dataclass
class _Look:
    """What the batch's own labels say.

    Args:
        outputs: outputs without labels, or with them if the model requires them.
        given: whether it was given the labels.
        labels: labels as the model expects them.
        own: the comparison with these labels.
        made: labels made up for further comparisons.
        classes: number of classes that have to show; 0 if nothing can be made up to show them.
        tentative: whether a disagreement for made-up labels says nothing.
    """

    outputs: Any
    given: bool
    labels: Labels
    own: Compared
    made: MadeUp
    classes: int
    tentative: bool


class OwnLoss:
    """Compares the model's own loss with the usual one, and finds whether it shifts labels or adds a term.

    The model is called as [`without_side_effects`] says: once without labels, once with those of the batch, and once
    with each of the labels that are made up for its logits ([`made_up`]), so that every class occurs and a shift shows.
    Positions without a label stay without, because a model may know them from its inputs. The number of calls is
    bounded, and the same in all processes, as the layers may be distributed over them. Where nothing can be made up
    (spans, soft labels, models that make inputs of labels) the labels of the batches have to suffice.

    Args:
        objective: computes outputs and losses.
        batches: when to compare, and with whom to decide.
    """

    def __init__(self, objective: Any, batches: FirstBatches) -> None:
        self._objective, self._batches = objective, batches
        self.shifts: bool | None = None  # None if not yet known
        self.adds = False
        self.reached = 0  # number of classes whose weights would have shown

    def check(self, inputs: dict[str, Any], labels: Labels, batch: int) -> None:
        """Compare on one batch, with labels as from the collator.

        Raises:
            ValueError: if the losses differ, or if there is no loss to compare with.
        """
        look, calls = self._batches.together(partial(self._look, inputs, labels, batch), 1)
        if look is None:
            self._batches.decide(settled=True)
            return
        compare = partial(self._compare_made_up, inputs, look, batch, int(calls.max()))
        _, found = self._batches.together(compare, 4)
        compared, kept, shifted, reached = found.amax(0).tolist()
        if kept and shifted:
            raise ValueError(
                "The loss of the model is that of shifted labels in one process, and that of labels as they are in "
                f"another. {heads.HINT}"
            )
        if kept or shifted:
            self.shifts = bool(shifted)
        progress = int(reached) > self.reached
        self.reached = max(self.reached, int(reached))
        self._settle(look, bool(compared), progress)

    def _settle(self, look: _Look, compared: bool, progress: bool) -> None:
        decide = self._batches.decide
        if not compared:
            decide(False, "its loss is not finite")
        elif self.adds:
            decide(settled=True)
        elif len(look.own.ours) > 1 and self.shifts is None:
            decide(False, "it is the same for shifted labels and for labels as they are")
        else:
            alike = self._batches.last and not progress
            message = "its losses are too much alike for class weights to show" if alike else ""
            decide(self.reached >= look.classes, message)

    # ---- comparisons -------------------------------------------------------------------------------------------------

    def _look(self, inputs: dict[str, Any], labels: Labels, batch: int) -> tuple[_Look | None, list[float]]:
        """Compare for the labels of the batch, and make up others; returns the number of these as well."""
        objective = self._objective
        with without_side_effects(objective.model):
            outputs, given = objective.forward(objective.model, inputs, labels)
        logits = heads.decision_of(outputs, given)
        if logits is not None and len(labels) == 1:
            heads.refuse_out_of_range(logits, objective.target(logits, labels))  # an assertion that ends a GPU process
        usual = objective.terms(outputs, given, inputs, labels, batch).mean()
        if objective.label_smoothing:  # `Trainer` then computes the loss from the logits
            return None, [0]
        if len(labels) == 1:
            (logits,) = heads.logits_of(outputs, batch, given)
            labels = {name: heads.read_labels(value, logits, objective.problem_type) for name, value in labels.items()}
        own, with_labels = self._compare(inputs, labels, batch, (outputs, given))
        if not given:
            _refuse_logits_of_labels(usual, with_labels)
        look = _Look(outputs, given, labels, own, MadeUp(), 0, self.adds)
        self._make_up(look, objective.with_decoder_inputs(inputs, labels), batch)
        return look, [len(look.made.labels)]

    def _compare(
        self, inputs: dict[str, Any], labels: Labels, batch: int, usual: tuple[Any, bool]
    ) -> tuple[Compared, Tensor]:
        """Compare for these labels; also returns our mean loss. `usual` has logits if the model then returns none."""
        objective = self._objective
        if not accepts(objective.model, labels):
            raise ValueError(f"The model does not accept {list(labels)}, so its loss is unknown. {heads.HINT}")
        try:
            with without_side_effects(objective.model):
                outputs, _ = objective.forward(objective.model, inputs, labels, give=True)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"The model cannot compute its own loss for these labels ({error}). {heads.HINT}"
            ) from error
        theirs = heads.loss_of(outputs)
        if theirs is None:
            raise ValueError(f"The model returned no 'loss' for its labels, so its loss is unknown. {heads.HINT}")
        if isinstance(outputs, Mapping):
            self.adds |= any(key.endswith(_AUXILIARY_LOSSES) and isinstance(outputs[key], Tensor) for key in outputs)
        fused = heads.decision_of(outputs, True) is None
        made_of = usual if fused else (outputs, True)
        terms = objective.terms(*made_of, inputs, labels, batch)
        ours = [terms.mean()]
        if objective.are_tokens(heads.decision_of(*made_of), labels):
            ours = [objective.terms(*made_of, inputs, labels, batch, shifts).mean() for shifts in (False, True)]
        resized = terms.are_sums and len(ours) == 1  # masks
        relative = precision_of(theirs, coarse=fused or resized or self._mixes_precisions)
        return Compared(theirs.float().mean().item(), [mean.item() for mean in ours], relative), terms.mean()

    def _compare_made_up(self, inputs: dict[str, Any], look: _Look, batch: int, calls: int) -> tuple[None, list[float]]:
        """Compare for labels that are made up; returns whether any loss was finite, votes on a shift, and classes."""
        comparisons = [look.own]
        inputs = self._objective.with_decoder_inputs(inputs, look.labels)
        for call in range(calls):
            made = look.made.labels[call] if call < len(look.made.labels) else look.labels
            try:
                compared, _ = self._compare(inputs, made, batch, (look.outputs, look.given))
            except ValueError:  # the model demands more of its labels
                look.made.reached = look.classes
                continue
            compared.made_up = True
            comparisons.append(compared)
        verdict = judge(comparisons, self.adds)
        if verdict.against is not None and not look.tentative:
            shifts = self._objective.shifts if self.shifts is None else self.shifts
            refuse_another_loss(verdict.against, self._batches.batches, shifts)
        votes = verdict.agree if sum(verdict.agree) == 1 < len(verdict.agree) else [False, False]
        compared = bool(verdict.agree) or (self.adds and not look.made.labels)
        return None, [compared, *votes, look.made.reached]

    @cached_property
    def _mixes_precisions(self) -> bool:
        """Whether the loss may be computed of logits in another precision than those that are returned."""
        model = self._objective.model
        of_accelerate = hasattr(model, "_original_forward")  # in mixed precision
        return of_accelerate or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())

    # ---- labels that are made up -------------------------------------------------------------------------------------

    def _make_up(self, look: _Look, inputs: dict[str, Any], batch: int) -> None:
        """Set the labels to compare with, and the number of classes they have to show."""
        ((name, given),) = list(look.labels.items())[:1]
        if len(look.labels) > 1 or "shift_labels" in inputs or self._objective.makes_inputs(inputs, look.labels):
            return
        (logits,) = heads.logits_of(look.outputs, batch, look.given)
        target = self._objective.target(logits, look.labels)
        if self._objective.are_tokens(logits, look.labels):
            made = self._for_tokens(look, logits, target, inputs.get("attention_mask"))
        elif target.is_floating_point() or logits.shape[-1] == 1:
            made = self._for_numbers(look, logits, target)
        else:
            made = self._for_classes(look, logits, target)
        fits = [labels for labels in made if labels.shape == given.shape]
        look.made.labels = [{name: labels.to(given.dtype)} for labels in fits]

    def _for_tokens(self, look: _Look, logits: Tensor, target: Tensor, mask: Tensor | None) -> list[Tensor]:
        logits = logits[:, logits.shape[1] - target.shape[1] :]
        kept = target != IGNORE_INDEX
        if not kept.any():
            kept = mask.bool() if mask is not None and mask.shape == kept.shape else torch.ones_like(kept)
            look.tentative = True  # a model may know from its inputs that they have no label
        made = [made_up.showing_shift(logits, target, kept)] if target.shape[1] > 1 else []
        agree = look.own.agree()
        shifts = agree[1] if sum(agree) == 1 else bool(self._objective.shifts)
        kept[:, : int(shifts)] = False
        if self.adds:
            return made
        look.classes = logits.shape[2]
        if look.tentative or not kept.any():
            return made
        place = kept.flatten().nonzero().flatten()
        shown = made_up.ClassLabels(logits.reshape(-1, look.classes), place - int(shifts), look.own.relative)
        return [*made, *self._placed(look, shown, target, place, _FOR_POSITIONS)]

    def _for_classes(self, look: _Look, logits: Tensor, target: Tensor) -> list[Tensor]:
        """For one class per example, or per pixel."""
        pixels = self._objective.is_mask(logits, target)
        if pixels:
            if logits.shape[-2:] != target.shape[-2:]:
                logits = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
            logits = logits.movedim(1, -1)
        look.classes = 0 if self.adds else logits.shape[-1]
        place = (target != IGNORE_INDEX).flatten().nonzero().flatten()
        if self.adds or not len(place):
            return []
        shown = made_up.ClassLabels(logits.reshape(-1, look.classes), place, look.own.relative)
        original = next(iter(look.labels.values()))
        return self._placed(look, shown, original, place, _FOR_POSITIONS if pixels else _FOR_EXAMPLES)

    def _placed(
        self, look: _Look, shown: made_up.ClassLabels, target: Tensor, place: Tensor, most: int
    ) -> list[Tensor]:
        made = shown.make(min(self.reached, look.classes), most, sample=most == _FOR_POSITIONS)
        look.made.reached = made.reached
        return [target.flatten().index_copy(0, place, labels).view(target.shape) for labels in made.labels]

    def _for_numbers(self, look: _Look, logits: Tensor, target: Tensor) -> list[Tensor]:
        """For several classes per example, and for regression."""
        if not target.is_floating_point() or self.adds:
            return []
        problem_type = self._objective.problem_type
        if target.dim() == 2 and target.shape[1] > 1 and problem_type != "regression":
            several = problem_type != "single_label_classification" and target.shape == logits.shape
            return made_up.several_classes(target) if several else []
        made = made_up.numbers_between(target)
        error = (logits.float().flatten() - (made or [target])[0].flatten()).abs()
        squared, absolute = error.square().mean(), error.mean()
        look.classes = 1  # to tell squared errors from others
        look.made.reached = int((squared - absolute).abs() > 2 * tolerance(squared, look.own.relative))
        return made


def _refuse_logits_of_labels(without: Tensor, with_labels: Tensor) -> None:
    finite = without.isfinite() and with_labels.isfinite()
    if finite and (without - with_labels).abs() > _CHANGED_LOGITS * without.abs() + _CHANGED_LOGITS:
        raise ValueError(
            f"The model returns other logits if it is given labels: the mean loss is then {with_labels.item():.5g}, "
            f"else {without.item():.5g}. It is trained without labels. {heads.HINT}"
        )
