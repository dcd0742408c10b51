"""The figures of a training run for logs and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_importance.report.columns import Columns
from hf_importance.run.schedule import EffectiveEpochs
from hf_importance.sampling.progress import EffectiveVisits
from hf_importance.sampling.record import Distribution
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.state import read_number


class Training:
    """Figures of a training run, during or after it.

    Args:
        sampler: sampler of this process.
        columns: columns of the examples of all processes.
        effective: effective epochs; None if all steps are made.
        has_lengths: whether the cost of a visit depends on the length of the text.
        token_losses: returns the tokens of some examples with their losses.
    """

    def __init__(
        self,
        sampler: ImportanceBatchSampler,
        columns: Columns,
        effective: EffectiveEpochs | None,
        has_lengths: bool,
        token_losses: Callable[[list[int]], Mapping[int, Sequence[Any]]],
    ) -> None:
        self._sampler = sampler
        self._columns = columns
        self._effective = effective
        self._has_lengths = has_lengths
        self.token_losses = token_losses
        self._before: dict[str, float] = {}  # moments at the last log

    @property
    def progress(self) -> EffectiveVisits | None:
        """Effective steps; None if all steps are made."""
        return None if self._effective is None else self._effective.progress

    @property
    def examples(self) -> int:
        """Number of examples on all processes."""
        return self._sampler.shard.length

    @property
    def has_record(self) -> bool:
        """Whether visits are recorded."""
        return self._sampler.record is not None

    @property
    def distributions(self) -> Sequence[Distribution]:
        """See [`record.VisitRecord`]."""
        return self._sampler.record.distributions

    def columns(self) -> dict[str, Tensor]:
        """Columns of the examples of all processes, complete in the main process."""
        return self._columns.all_columns()

    def measured(self) -> dict[str, float]:
        """Figures since the last call, by the names of their logs."""
        memory, visits = self._sampler.memory, self._sampler.visits
        moments = self._sampler.moments
        new = {name: value - self._before.get(name, 0.0) for name, value in moments.items()}
        self._before = moments
        logs = {
            "importance/known": memory.known / len(memory),
            "importance/pruned": 0.0 if visits.pruned is None else visits.pruned.double().mean().item(),
            "importance/uniform_fraction": visits.floor,
        }
        if new["visits"]:
            logs["importance/mean_weight"] = new["weight"] / new["visits"]
            logs["importance/effective_sample_size"] = new["weight"] ** 2 / (new["weight_square"] * new["visits"])
        if new["uniform"]:
            logs["importance/mean"] = new["importance"] / new["inverse_rate"]
            cost = new["cost"] / new["visits"]
            logs["importance/variance_ratio"] = new["ours"] / new["uniform"] * cost
            if self._has_lengths:
                logs["importance/cost"] = cost
        if self.progress is not None:
            logs["importance/effective_epoch"] = self.progress.epochs
        return logs

    def share_of_tokens(self, steps: int) -> float | None:
        """Tokens of this many steps relative to all steps of uniform sampling; None if lengths are unknown.

        With several processes, it is estimated from this one, whose examples are a random part of the data.
        """
        if not self._has_lengths:
            return None
        self._sampler.flush(everything=True)
        moments = self._sampler.moments
        if not moments["visits"]:
            return None
        return steps / self.progress.steps * moments["cost"] / moments["visits"]

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values."""
        return dict(self._before)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`]."""
        self._before = {name: read_number(state, name) for name in state}
