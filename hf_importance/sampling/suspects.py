"""Suspects: examples whose label is probably wrong, their rates, and their smaller weights in the loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.state import read_tensor

_NOISY = 0.025
"""Share of contradicted examples in the median class from which on labels count as noisy."""


def suspects(columns: Mapping[str, Tensor], classes: int | None = None) -> Tensor:
    """Which examples probably have a wrong label, by the columns of a [`VisitRecord`]: bool `[examples]`.

    A label is suspect if its mean probability over the visits is below chance: the mean loss is above the logarithm of
    the number of classes, by default that of distinct labels. The mean over the visits is more informative than the
    final loss, because wrong labels are learned late but may be memorised in the end (Pleiss et al. 2020, arXiv
    2001.10528). No example is suspect if examples have no single label.

    >>> columns = {"label": [0.0, 1.0], "probability": [0.9, 0.9], "mean_loss": [2.3, 0.1]}
    >>> suspects({name: torch.tensor(column) for name, column in columns.items()})
    tensor([ True, False])
    """
    has_single_label = columns["probability"].isfinite()
    return has_single_label & (columns["mean_loss"] > loss_of_chance(columns, classes))


def loss_of_chance(columns: Mapping[str, Tensor], classes: int | None = None) -> float:
    """Cross-entropy of a uniform prediction: the logarithm of the number of classes."""
    classes = classes or len(columns["label"][columns["probability"].isfinite()].unique())
    return math.log(max(classes, 2))


def doubted(columns: Mapping[str, Tensor]) -> Tensor | None:
    """Which examples get rate 1, because labels are noisy: bool `[examples]`, None if they are not.

    A label is contradicted if on average and at the last visit it had less probability than its frequency among the
    labels, or than one over the number of classes, whichever is less. Wrong labels stay important for as long as they
    are contradicted. Drawn in proportion to that, they are memorised sooner than by uniform sampling: the smaller
    variance of their gradients speeds up their learning. That is what hard examples need, so right labels must be told
    from wrong ones: hard examples are found in rare or similar classes, wrong labels in all. Therefore labels only
    count as noisy if many are contradicted in the median class.

    >>> columns = {"label": [0.0, 0.0, 1.0, 1.0], "probability": [0.1, 0.9, 0.8, 0.2], "visits": [2, 2, 2, 2]}
    >>> columns |= {"mean_loss": [2.3, 0.1, 0.2, 1.6], "loss": [2.3, 0.1, 0.2, 1.6]}
    >>> doubted({name: torch.tensor(column) for name, column in columns.items()})
    tensor([ True, False, False,  True])
    """
    known = columns["probability"].isfinite().nonzero().flatten()
    if not len(known):
        return None
    _, label, count = columns["label"][known].unique(return_inverse=True, return_counts=True)
    chance = (len(known) / count).clamp(min=max(len(count), 2)).log()[label]
    contradicted = columns["visits"][known] > 1
    for loss in ("mean_loss", "loss"):
        contradicted &= columns[loss][known] > chance
    share = torch.zeros(len(count), dtype=torch.float32).index_add_(0, label, contradicted.float()) / count
    if share.median() < _NOISY:
        return None
    return torch.zeros(len(columns["label"]), dtype=torch.bool).index_fill_(0, known[contradicted], True)


class SuspectWeights:
    """Factor s of the loss ℓ of each example: `weight` in [0, 1) for suspects, else 1.

    Training then minimises the mean of s·ℓ. The remembered importance of an example is s·q, so a suspect with s = 0 is
    visited at the floor of the rates. Its unscaled loss is still recorded at each visit. An example is suspect while
    its label has less probability than chance both on average and at the last visit; it recovers once the model agrees
    with the label. Suspects are updated whenever a segment is planned, from the effective epoch `start` on, among
    examples with at least two visits. They are never pruned.
    """

    def __init__(
        self, length: int, weight: float, start: float, epochs: Callable[[], float], classes: int | None = None
    ) -> None:
        self.flagged = torch.zeros(length, dtype=torch.bool)
        self._weight, self._start, self._epochs, self._classes = weight, start, epochs, classes

    def of(self, index: Tensor) -> Tensor:
        """Factors s of some examples, float64 `[visits]`."""
        return torch.where(self.flagged[index], self._weight, 1.0).double()

    def recheck(self, record: VisitRecord, memory: ImportanceMemory) -> None:
        """Update the suspects, and rescale the remembered importance of those that changed."""
        if self._epochs() < self._start:
            return
        columns = record.columns()
        flagged = suspects(columns, self._classes) & (columns["visits"] > 1)
        flagged &= columns["loss"] > loss_of_chance(columns, self._classes)
        memory.scale(flagged & ~self.flagged, self._weight)
        memory.scale(self.flagged & ~flagged, 1 / self._weight if self._weight else torch.nan)
        self.flagged = memory.spared = flagged

    def state_dict(self) -> dict[str, Any]:
        """The suspects, as tensors."""
        return {"flagged": self.flagged.clone()}

    def load_state_dict(self, state: Mapping[str, Any], memory: ImportanceMemory) -> None:
        """Restore a [`state_dict`] exactly."""
        self.flagged = memory.spared = read_tensor(state, "flagged", self.flagged.shape, torch.bool)
