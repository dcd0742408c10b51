"""The figures of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_importance.report.texts import readable
from hf_importance.sampling.record import Distribution
from hf_importance.sampling.suspects import loss_of_chance, suspects

_BUSY_SHARE = 0.9  # share of the visits used by `share_with_most_visits`
_NEAR_CHANCE = 0.95  # median loss, relative to that of chance, from which suspects are unreliable


@dataclass
class Findings:
    """Figures of a training run about its examples."""

    columns: dict[str, Tensor]  # of `Columns.all_columns`
    distributions: Sequence[Distribution] = ()  # at several moments
    history: Sequence[Mapping[str, Any]] = ()  # as in `TrainerState.log_history`
    label_names: Mapping[Any, str] = field(default_factory=dict)  # names of the classes, by number; may be empty
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the sampler

    def __post_init__(self) -> None:
        self.columns = {**self.columns, "suspect": suspects(self.columns)}
        numbered = {n: name for n, name in self.label_names.items() if str(n).isdecimal()}  # keys are strings in JSON
        self.label_names = {int(number): readable(str(name)) for number, name in numbered.items()}

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
        logs = [log for log in self.history if f"importance/{name}" in log]
        return [log["step"] for log in logs], [log[f"importance/{name}"] for log in logs]

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

    def figures(self) -> dict[str, str]:
        """The main figures, by name and formatted."""
        variance_ratio, sample_size = self.mean_logged("variance_ratio"), self.mean_logged("effective_sample_size")
        measured = self.columns["importance"].isfinite().double().mean().item()
        figures = {
            "examples": f"{len(self):,}",
            "visits": f"{self.visits:,}",
            "visits per example": f"{self.visits / len(self):.2f}",
            "90% of the visits went to": f"{self.share_with_most_visits:.1%} of the examples",
            "examples measured": f"{measured:.1%}",
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
        ]
        if ratio is not None:
            parts.append(f"second moment of the gradient {ratio:.2f} times that of {self._baseline}")
        if self.pruned:
            parts.append(f"at most {self.pruned:.0%} pruned")
        return "Importance sampling: " + ", ".join(parts) + "."


def _first(values: Tensor, number: int) -> list[int]:
    """Indices of the largest values, largest first, without NaN."""
    known = values.isfinite().nonzero().flatten()
    order = values[known].sort(descending=True, stable=True).indices
    return known[order[:number]].tolist()
