"""Labels that are made up so that a loss of its own shows in the loss of a model.

Class weights do not show while the class is missing from a batch, nor while all losses of the batch are equal: the
weighted mean is then the mean. Nor does a shift of the labels while both readings give the same number. The functions
below make labels for given logits, and say what these labels show. Pure tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_importance.losses.per_example import IGNORE_INDEX

_CLASSES_AT_ONCE = 32  # more would make the share of each too small to show
_SAMPLES = 2  # tensors of labels for a sample of the classes
_ELEMENTS = 2**24  # logits per piece
_MASKED = 1e4  # a logit this far below the largest is masked: its class cannot occur
_CANDIDATES = 64


@dataclass
class MadeUp:
    """Labels to compare with.

    Args:
        labels: one tensor per comparison.
        reached: the weights of classes below this number show in these comparisons, or did in earlier ones.
    """

    labels: list[Tensor] = field(default_factory=list)
    reached: int = 0


def tolerance(loss: Tensor | float, relative: float) -> Tensor | float:
    """Difference up to which two computations of a loss are equal."""
    return relative * abs(loss) + 1e-5


class ClassLabels:
    """Labels in which every class occurs, beside others whose loss is as different as possible.

    Args:
        logits: `[positions, classes]`.
        kept: indices of the positions with a label, int64 `[kept]`.
        relative: relative tolerance of the comparison.
    """

    def __init__(self, logits: Tensor, kept: Tensor, relative: float) -> None:
        self._logits, self._kept, self._relative = logits, kept, relative
        pieces = [_statistics(logits[part]) for part in kept.split(max(1, _ELEMENTS // logits.shape[1]))]
        self._top, self._normaliser, self._likely, self._unlikely = map(torch.cat, zip(*pieces, strict=True))

    def make(self, start: int, most: int, sample: bool = False) -> MadeUp:
        """Labels `[kept]` that show the weights of the classes from `start` on.

        Args:
            start: first class.
            most: at most so many tensors of labels, and as many again for classes that those do not show.
            sample: if there are more classes, take some spread evenly over all, as for the words of a language.
        """
        classes = self._logits.shape[1]
        at_once = max(1, min(_CLASSES_AT_ONCE, len(self._kept) // 2))
        wanted = range(start, min(classes, start + most * at_once))
        sample &= wanted.stop < classes
        if sample:
            wanted = range(0, classes, -(-classes // (_SAMPLES * at_once)))
        made, shown = [], torch.zeros(classes, dtype=torch.bool)
        for beside, first in ((self._likely, 0), (self._unlikely, 1)):
            missing = [c for c in wanted if not shown[c]]
            if first and len(missing) == len(wanted):
                return MadeUp([], start)  # all losses are equal
            for part in torch.tensor(missing, dtype=torch.long).split(at_once) if missing else ():
                labels = self._mixed(part.to(beside.device), beside, first)
                made.append(labels)
                shown |= self._shown(labels, part)
        missing = sum(not shown[c] for c in wanted)
        if sample:
            return MadeUp(made, classes if 2 * missing < len(wanted) else start)
        return MadeUp(made, start if missing else wanted.stop)

    def _mixed(self, classes: Tensor, beside: Tensor, first: int) -> Tensor:
        labels = beside.clone()
        place = torch.arange(min(first, len(labels) - 1), len(labels), 2, device=labels.device)
        labels[place] = classes[torch.arange(len(place), device=labels.device) % len(classes)]
        masked = self._logits[self._kept, labels].float() < self._top - _MASKED
        return torch.where(masked, self._likely, labels)

    def _shown(self, labels: Tensor, classes: Tensor) -> Tensor:
        """Classes whose weight shows: twice the weight would change the weighted mean by more than the tolerance."""
        losses = self._normaliser - self._logits[self._kept, labels].float()
        number, total = torch.zeros(2, self._logits.shape[1], device=labels.device)
        number.index_add_(0, labels, torch.ones_like(losses))
        total.index_add_(0, labels, losses)
        mean = losses.mean()
        doubled = (losses.sum() + total) / (len(losses) + number)
        shown = ((doubled - mean).abs() > 2 * tolerance(mean, self._relative)).cpu()
        shown[classes] |= (number == 0).cpu()[classes]  # masked everywhere, so these do not occur in the data
        return shown | (len(losses) == 1)  # the weighted mean of one loss is this loss, whatever its weight


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest logit, logarithm of the normaliser, most and least likely class that is not masked; each `[rows]`."""
    logits = logits.float()
    top, likely = logits.max(1)
    unlikely = logits.masked_fill(logits < top[:, None] - _MASKED, torch.inf).argmin(1)
    return top, logits.logsumexp(1), likely, unlikely


def showing_shift(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Token labels that fit the logits of the previous position better than those of their own.

    Args:
        logits: `[batch, tokens, classes]`, without those of virtual tokens.
        labels: int64 `[batch, tokens]`.
        kept: whether a position gets a label, `[batch, tokens]`.
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
