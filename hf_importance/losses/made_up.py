"""Labels that are made up so that a loss of its own shows in the loss of a model.

Class weights do not show while the class is missing from a batch, nor while all losses of the batch are equal: the
weighted mean is then the mean. Nor does a shift of the labels while both readings give the same number. The functions
below make labels for given logits, and say what these labels show. Pure tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_importance.losses.first_batch import tolerance
from hf_importance.losses.per_example import IGNORE_INDEX

_CLASSES_AT_ONCE = 32  # more would make the share of each too small to show
_SAMPLES = 2  # tensors of labels for a sample of the classes
_MASKED = 1e4  # a logit this far below the largest is masked: its class cannot occur
_CANDIDATES = 64


class ClassLabels:
    """Labels in which every class occurs, beside others whose loss is as different as possible.

    They are made for logits `[positions, classes]`, to be compared with this relative tolerance.
    """

    def __init__(self, logits: Tensor, relative: float) -> None:
        self._logits, self._relative = logits.float(), relative
        top, self._likely = self._logits.max(1)
        self._masked = self._logits < top[:, None] - _MASKED
        self._unlikely = self._logits.masked_fill(self._masked, torch.inf).argmin(1)
        self._normaliser = self._logits.logsumexp(1)

    def make(self, start: int, most: int, sample: bool = False) -> tuple[list[Tensor], int]:
        """Labels `[positions]` that show the weights of the classes from `start` on, and up to which class they do.

        Args:
            start: first class.
            most: at most so many tensors of labels, and as many again for classes that those do not show.
            sample: if there are more classes, take some spread evenly over all, as for the words of a language.
        """
        classes = self._logits.shape[1]
        at_once = max(1, min(_CLASSES_AT_ONCE, len(self._logits) // 2))
        wanted = range(start, min(classes, start + most * at_once))
        sample &= wanted.stop < classes
        if sample:
            wanted = range(0, classes, -(-classes // (_SAMPLES * at_once)))
        made, shown = [], torch.zeros(classes, dtype=torch.bool)
        for beside, first in ((self._likely, 0), (self._unlikely, 1)):
            missing = [c for c in wanted if not shown[c]]
            if first and len(missing) == len(wanted):
                return [], start  # all losses are equal
            for part in torch.tensor(missing, dtype=torch.long).split(at_once) if missing else ():
                labels = self._mixed(part.to(beside.device), beside, first)
                made.append(labels)
                shown |= self._shown(labels, part)
        missing = sum(not shown[c] for c in wanted)
        if sample:
            return made, classes if 2 * missing < len(wanted) else start
        return made, start if missing else wanted.stop

    def _mixed(self, classes: Tensor, beside: Tensor, first: int) -> Tensor:
        """The classes in turn at every second position from `first` on, unless they are masked there."""
        labels = beside.clone()
        place = torch.arange(min(first, len(labels) - 1), len(labels), 2, device=labels.device)
        labels[place] = classes[torch.arange(len(place), device=labels.device) % len(classes)]
        return torch.where(_at(self._masked, labels), self._likely, labels)

    def _shown(self, labels: Tensor, classes: Tensor) -> Tensor:
        """Classes whose weight shows: twice the weight would change the weighted mean by more than the tolerance."""
        losses = self._normaliser - _at(self._logits, labels)
        number, total = torch.zeros(2, self._logits.shape[1], device=labels.device, dtype=torch.float32)
        number.index_add_(0, labels, torch.ones_like(losses))
        total.index_add_(0, labels, losses)
        mean = losses.mean()
        doubled = (losses.sum() + total) / (len(losses) + number)
        shown = ((doubled - mean).abs() > 2 * tolerance(mean, self._relative)).cpu()
        shown[classes] |= (number == 0).cpu()[classes]  # masked everywhere, so these do not occur in the data
        return shown | (len(losses) == 1)  # the weighted mean of one loss is this loss, whatever its weight


def _at(values: Tensor, labels: Tensor) -> Tensor:
    """The value of each row at its label."""
    return values.gather(1, labels[:, None])[:, 0]


def showing_shift(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Token labels `[batch, tokens]` that fit the logits of the previous position better than those of their own.

    Only the positions `kept` get one; the logits are without those of virtual tokens.
    """
    classes = torch.linspace(0, logits.shape[2] - 1, min(logits.shape[2], _CANDIDATES)).long().to(logits.device)
    few = logits[:, :, classes].float()
    possible = few > few.amax(2, keepdim=True) - _MASKED
    ratio = few[:, :-1] - few[:, 1:]
    best = classes[ratio.masked_fill(~(possible[:, :-1] & possible[:, 1:]), -torch.inf).argmax(2)]
    made = torch.full_like(labels, IGNORE_INDEX)
    made[:, 1:] = best.masked_fill(~kept[:, 1:], IGNORE_INDEX)
    return made


def several_classes(labels: Tensor) -> list[Tensor]:
    """Multi-label targets like `labels`, `[batch, classes]`, in which every class is present and absent."""
    batch, classes = (torch.arange(size, device=labels.device) for size in labels.shape)
    present = ((batch[:, None] + classes) % 2).to(labels.dtype)
    return [present, 1 - present]


def numbers_between(labels: Tensor) -> list[Tensor]:
    """Regression targets like `labels`, in their range; none if they are all equal."""
    low, high = labels.min(), labels.max()
    if not low < high:
        return []
    generator = torch.Generator().manual_seed(0)
    return [low + (high - low) * torch.rand(labels.shape, generator=generator).to(labels)]
