"""The figures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_importance.report.texts import readable
from hf_importance.sampling.record import Distribution, loss_of_chance, suspects

_MAX_CLASSES = 1000
"""Maximum number of classes that are listed."""
_BUSY_SHARE = 0.9
"""Share of the visits used by `share_with_most_visits`."""
_NEAR_CHANCE = 0.95
"""Median loss, relative to that of chance, from which suspects are unreliable."""


@dataclass(frozen=True)
class ClassFindings:
    """Figures of the examples with one label.

    Args:
        name: name of the class.
        examples: number of examples.
        importance: mean importance.
        relative_visits: visits per example, relative to those of all examples.
        suspects: number of suspects.
        mean_loss: mean loss over the visits.
    """

    name: str
    examples: int
    importance: float
    relative_visits: float
    suspects: int
    mean_loss: float


@dataclass
class Findings:
    """Figures of a training run about its examples.

    Args:
        columns: `importance`, `pruned`, `record.COLUMNS`, and optionally `down_weighted`, `[examples]` each.
        distributions: percentiles of importances and visits at several moments.
        history: logs, as in `TrainerState.log_history`.
        label_names: names of the classes, by number or in order; may be empty.
        settings: settings of the sampler.
    """

    columns: dict[str, Tensor]
    distributions: Sequence[Distribution] = ()
    history: Sequence[Mapping[str, Any]] = ()
    label_names: Mapping[Any, str] | Sequence[str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.columns = {**self.columns, "suspect": suspects(self.columns)}
        names = self.label_names
        pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
        numbered = ((number, name) for number, name in pairs if str(number).isdecimal())  # keys are strings in JSON
        self.label_names = {int(number): readable(str(name)) for number, name in numbered}

    def __len__(self) -> int:
        return len(self.columns["importance"])

    @property
    def visits(self) -> int:
        """Total number of visits."""
        return int(self.columns["visits"].sum())

    @property
    def share_with_most_visits(self) -> float:
        """Smallest share of the examples with 90 % of the visits; 0.9 if all have the same, 0 without visits."""
        visits = self.columns["visits"].sort(descending=True).values.cumsum(0, dtype=torch.float64)
        return int((visits < _BUSY_SHARE * visits[-1]).sum() + (visits[-1] > 0)) / len(self)

    @property
    def measured_share(self) -> float:
        """Share of the examples whose importance is known."""
        return self.columns["importance"].isfinite().double().mean().item()

    @property
    def pruned(self) -> float:
        """Largest logged share of pruned examples."""
        return max([self.columns["pruned"].double().mean().item(), *self.logged("pruned")[1]])

    @cached_property
    def is_classification(self) -> bool:
        """Whether examples have a single class label."""
        return bool(self.columns["probability"].isfinite().any())

    @cached_property
    def is_near_chance(self) -> bool:
        """Whether at least half of the mean losses are hardly below that of chance, so that suspects are unreliable."""
        losses = self.columns["mean_loss"][self.columns["probability"].isfinite()]
        return losses.nanmedian().item() >= _NEAR_CHANCE * loss_of_chance(self.columns)

    def logged(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the log `importance/<name>`."""
        found = [(log["step"], log[f"importance/{name}"]) for log in self.history if f"importance/{name}" in log]
        return [step for step, _ in found], [value for _, value in found]

    def mean_logged(self, name: str) -> float | None:
        """Mean of a log; None if it was not logged."""
        _, values = self.logged(name)
        return sum(values) / len(values) if values else None

    def hardest(self, number: int) -> list[int]:
        """Indices of the examples with the largest importance."""
        return _first(self.columns["importance"], number)

    def most_suspect(self, number: int) -> list[int]:
        """Indices of the suspects with the largest mean loss."""
        return _first(self.columns["mean_loss"].where(self.columns["suspect"], torch.nan), number)

    def name_of(self, number: float) -> str:
        """Name of a class, or the formatted number if there are no classes."""
        if number != number:
            return "–"
        if self.is_classification:
            return str(self.label_names.get(int(number), int(number)))
        return f"{number:.4g}"

    def names_of(self, numbers: Tensor) -> tuple[list[str], Tensor]:
        """Names of the classes that occur, and the position of each example's class among them, −1 where unknown."""
        known = numbers.isfinite()
        found, which = numbers[known].unique(return_inverse=True)
        return list(map(self.name_of, found.tolist())), torch.full(numbers.shape, -1).masked_scatter_(known, which)

    def by_class(self) -> list[ClassFindings]:
        """Figures per class, most suspects first; empty if examples have no single label."""
        if not self.is_classification:
            return []
        names, which = self.names_of(self.columns["label"])
        labelled = which >= 0
        which = which[labelled]

        def total(values: Tensor) -> Tensor:
            values = values[labelled].double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            return torch.zeros(len(names), dtype=torch.float64).index_add_(0, which, values)

        def mean(name: str) -> Tensor:
            return total(self.columns[name]) / total(self.columns[name].isfinite())

        examples = total(labelled)
        visits = total(self.columns["visits"]) / examples * len(self) / max(self.visits, 1)
        figures = (examples, mean("importance"), visits, total(self.columns["suspect"]), mean("mean_loss"))
        rows = zip(names, *(figure.tolist() for figure in figures), strict=True)
        found = [ClassFindings(name, int(n), q, visits, int(s), loss) for name, n, q, visits, s, loss in rows]
        return sorted(found, key=lambda row: (-row.suspects, -row.mean_loss))[:_MAX_CLASSES]

    def confused_pairs(self, number: int) -> list[tuple[str, str, int]]:
        """Label, prediction and number of suspects, most frequent pairs first."""
        chosen = self.columns["suspect"] & (self.columns["label"] != self.columns["prediction"])
        pairs = torch.stack([self.columns[name][chosen] for name in ("label", "prediction")], 1)
        pairs, counts = pairs.unique(dim=0, return_counts=True)
        order = counts.sort(descending=True, stable=True).indices[:number].tolist()
        return [(self.name_of(pairs[i, 0].item()), self.name_of(pairs[i, 1].item()), int(counts[i])) for i in order]

    def figures(self) -> dict[str, str]:
        """The main figures, by name and formatted."""
        variance_ratio, sample_size = self.mean_logged("variance_ratio"), self.mean_logged("effective_sample_size")
        figures = {
            "examples": f"{len(self):,}",
            "visits": f"{self.visits:,}",
            "visits per example": f"{self.visits / len(self):.2f}",
            "90% of the visits went to": f"{self.share_with_most_visits:.1%} of the examples",
            "examples measured": f"{self.measured_share:.1%}",
        }
        if self.pruned:
            figures["examples pruned"] = f"up to {self.pruned:.1%}"
        if sample_size is not None:
            figures["effective sample size"] = f"{sample_size:.3f} of the visits"
        if variance_ratio is not None:
            figures["second moment of the gradient"] = f"{variance_ratio:.3f} times that of {self._baseline}"
            if (cost := self.mean_logged("cost")) is not None:
                figures["tokens per visit"] = f"{cost:.3f} times those of uniform sampling"
        if self.is_classification:
            number = int(self.columns["suspect"].sum())
            figures["suspected label errors"] = f"{number:,} ({number / len(self):.1%})"
            if self.is_near_chance:
                figures["suspected label errors"] += ", unreliable: the model is hardly better than chance"
        if "down_weighted" in self.columns:
            number, weight = int(self.columns["down_weighted"].sum()), self.settings.get("suspect_weight", 0.0)
            action = "excluded from the loss" if weight == 0 else f"with weight {weight:g} in the loss"
            figures["suspects at the end"] = f"{number:,} {action}"
        return figures

    @property
    def _baseline(self) -> str:
        return "uniform sampling at equal cost" if self.logged("cost")[1] else "uniform sampling"

    def summary(self) -> str:
        """A one-line summary."""
        ratio = self.mean_logged("variance_ratio")
        parts = [
            f"{self.visits:,} visits of {len(self):,} examples",
            f"90% of them on {self.share_with_most_visits:.0%} of the examples",
            *([] if ratio is None else [f"second moment of the gradient {ratio:.2f} times that of {self._baseline}"]),
            *([f"at most {self.pruned:.0%} pruned"] if self.pruned else []),
        ]
        return "Importance sampling: " + ", ".join(parts) + "."


def _first(values: Tensor, number: int) -> list[int]:
    """Indices of the largest values, largest first, without NaN."""
    known = values.isfinite().nonzero().flatten()
    order = values[known].sort(descending=True, stable=True).indices
    return known[order[:number]].tolist()
