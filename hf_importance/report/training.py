"""The figures of a training run for logs and report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_importance.report.columns import Columns
from hf_importance.report.findings import Findings
from hf_importance.report.tokens import Token
from hf_importance.sampling.effective_steps import EffectiveSteps
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.state import read_number


def divergence(sampler: ImportanceBatchSampler) -> str:
    """A line on a training most of whose losses are not finite, after a pass; empty if they are."""
    known = sampler.memory.known / len(sampler.memory)
    if known > 0.5 or sampler.moments["visits"] < len(sampler.memory):
        return ""
    return (
        f"Training seems to have diverged: the losses of {1 - known:.0%} of the examples are not finite, so their "
        "importances are unknown. Lower the learning rate, or look for inputs that are not finite."
    )


class Training:
    """Figures of a training run, during or after it; `progress` is None if all steps are made."""

    def __init__(
        self,
        sampler: ImportanceBatchSampler,
        columns: Columns,
        progress: EffectiveSteps | None,
        has_lengths: bool,
        token_losses: Callable[[list[int]], Mapping[int, Sequence[Token]]],
    ) -> None:
        self.progress, self.token_losses = progress, token_losses
        self._sampler, self._columns = sampler, columns
        self._has_lengths = has_lengths  # so that the cost of a visit depends on the length of the text
        self._before: dict[str, float] = {}  # moments at the last log

    @property
    def examples(self) -> int:
        """Number of examples on all processes."""
        return self._sampler.shard.length

    @property
    def has_record(self) -> bool:
        """Whether visits are recorded."""
        return self._sampler.record is not None

    def columns(self) -> dict[str, Tensor]:
        """Columns of the examples of all processes, complete in the main process."""
        return self._columns.all_columns()

    def findings(
        self, history: Sequence[Mapping[str, Any]], label_names: Mapping[Any, str], settings: Mapping[str, Any]
    ) -> Findings:
        """Figures of the examples, complete in the main process; the arguments are those of [`Findings`]."""
        return Findings(self.columns(), self._sampler.record.distributions, history, label_names, settings)

    def measured(self) -> dict[str, float]:
        """Figures since the last call, by the names of their logs."""
        memory, visits, moments = self._sampler.memory, self._sampler.visits, self._sampler.moments
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

    def at_end(self, global_step: int) -> dict[str, float]:
        """What is added to the last log of a training that made `global_step` steps; empty if all or none were due."""
        progress = self.progress
        if progress is None or not progress.steps:
            return {}
        logs = {
            "train_effective_epochs": min(progress.value, progress.steps) / progress.steps_per_epoch,
            "train_share_of_steps": global_step / progress.steps,
        }
        tokens = self.share_of_tokens(global_step)
        return logs if tokens is None else logs | {"train_share_of_tokens": tokens}

    def ended(self, global_step: int, backward: float | None = None) -> str:
        """A line on a training whose effective steps were reached after `global_step` steps.

        `backward` is the share of its examples that were propagated back, if that was selective.
        """
        steps, tokens = self.progress.steps, self.share_of_tokens(global_step)
        return (
            f"Importance sampling: ended after {global_step:,} of {steps:,} steps ({global_step / steps:.0%})"
            f"{'' if tokens is None else f', with {tokens:.0%} of the tokens'}"
            f"{'' if backward is None else f', {backward:.0%} of the backward passes'}."
        )

    def divergence(self) -> str:
        """See [`divergence`]."""
        return divergence(self._sampler)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values."""
        return dict(self._before)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`]."""
        self._before = {name: read_number(state, name) for name in state}
