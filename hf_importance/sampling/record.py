"""Statistics of every example's visits, for the report and the suspects."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_importance.sampling.state import read_number, read_tensor

OBSERVED = ("label", "loss", "prediction", "probability")
"""What is observed at a visit; NaN where the task does not define it."""
_LOSS = OBSERVED.index("loss")
COLUMNS = (*OBSERVED, "visits", "mean_loss")
QUANTILES = 101
_PER_EXAMPLE = ("seen", "visits", "total_loss", "kept_visits")
_MAX_EXAMPLES = 2**16  # examples that a distribution is computed from


class Distribution(NamedTuple):
    """Percentiles of importances and visits at one moment of training, see [`distribution`]."""

    visits: float  # mean visits per example so far
    importance: Tensor  # [101]
    visits_since: Tensor  # [101], of the visits since the previous moment


class VisitRecord:
    """Per example: number of visits, mean loss, and the last observation; 28 bytes each.

    The mean loss excludes the first visit, when the model may still be untrained, unless it is the only one.

    >>> record = VisitRecord(3)
    >>> for loss in (9.0, 2.0, 1.0):
    ...     record.update(torch.tensor([1]), torch.tensor([[0.0], [loss], [4.0], [0.7]]))
    >>> columns = record.columns()
    >>> columns["visits"], columns["loss"], columns["mean_loss"]
    (tensor([0, 3, 0], dtype=torch.int32), tensor([nan, 1., nan]), tensor([   nan, 1.5000,    nan]))
    """

    def __init__(self, length: int) -> None:
        self._observed = torch.full((len(OBSERVED), length), torch.nan, dtype=torch.float32)
        self._visits = torch.zeros(length, dtype=torch.int32)
        self._total_loss = torch.zeros(length, dtype=torch.float32)
        self._kept_visits = torch.zeros(length, dtype=torch.int32)  # when the last distribution was kept
        self.distributions: list[Distribution] = []

    def update(self, index: Tensor, observed: Tensor) -> None:
        """Record visits in their order, int64 `[visits]`, with the rows in `OBSERVED`, float32 `[4, visits]`."""
        index, visit, count = index.unique(return_inverse=True, return_counts=True)
        place = torch.arange(len(visit))
        first = torch.full_like(index, len(visit)).scatter_reduce_(0, visit, place, "amin")
        last = torch.zeros_like(index).scatter_reduce_(0, visit, place, "amax")
        loss = observed[_LOSS].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        loss[first[self._visits[index] == 0]] = 0.0
        self._total_loss[index] += torch.zeros(len(index), dtype=torch.float32).index_add_(0, visit, loss)
        self._visits[index] += count.int()
        self._observed[:, index] = observed[:, last]

    def columns(self) -> dict[str, Tensor]:
        """The columns named in `COLUMNS`, `[examples]` each: `visits` int32, others float32, NaN if never visited."""
        mean_loss = (self._total_loss / (self._visits - 1)).where(self._visits > 1, self._observed[_LOSS])
        columns = (*self._observed.clone(), self._visits.clone(), mean_loss)
        return dict(zip(COLUMNS, columns, strict=True))

    def keep_distribution(self, importance: Tensor) -> None:
        """Keep the distribution of the current importances, and of the visits since the last call."""
        since = distribution((self._visits - self._kept_visits).float())
        self.distributions.append(Distribution(self._visits.double().mean().item(), distribution(importance), since))
        self._kept_visits.copy_(self._visits)

    def _tensors(self) -> dict[str, Tensor]:
        return dict(zip(_PER_EXAMPLE, (self._observed, self._visits, self._total_loss, self._kept_visits), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return tensors | {"distributions": [tuple(entry) for entry in self.distributions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        for name, tensor in self._tensors().items():
            tensor.copy_(read_tensor(state, name, tensor.shape, tensor.dtype))
        self.distributions = [_read_distribution(*entry) for entry in state["distributions"]]


def _read_distribution(*values: Any) -> Distribution:
    entry = dict(zip(Distribution._fields, values, strict=True))
    percentiles = (read_tensor(entry, name, [QUANTILES], torch.float32) for name in Distribution._fields[1:])
    return Distribution(read_number(entry, "visits"), *percentiles)


def distribution(importance: Tensor) -> Tensor:
    """Minimum, percentiles and maximum of the known values, `[101]`, from at most 65,536 evenly spaced examples."""
    known = importance[:: math.ceil(len(importance) / _MAX_EXAMPLES)]
    known = known[known.isfinite()]
    if not len(known):
        return torch.full((QUANTILES,), torch.nan, dtype=torch.float32)
    return known.quantile(torch.linspace(0, 1, QUANTILES, dtype=known.dtype))


def join(states: Sequence[Mapping[str, Any]], index: Sequence[Tensor | slice], length: int) -> dict[str, Any]:
    """Merge the states of several ranks into one for all examples; `index` holds the examples of each rank."""
    whole = VisitRecord(length).state_dict()
    for state, positions in zip(states, index, strict=True):
        for name in _PER_EXAMPLE:
            local = whole[name][..., positions]
            whole[name][..., positions] = read_tensor(state, name, local.shape, local.dtype)
    return whole | {"distributions": list(states[0]["distributions"])}


def part(state: Mapping[str, Any], index: Tensor | slice) -> dict[str, Any]:
    """The state restricted to some examples."""
    return {**state, **{name: state[name][..., index] for name in _PER_EXAMPLE}}
