"""Methods of choosing the training examples: importance sampling, `Trainer`, and the methods in `rivals`.

To add a method, add it to `METHODS`, with an `ImportanceConfig`, a class of `rivals`, or neither.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import Trainer

from benchmarks.rivals import ESWP, KAKURENBO, EvolvedSampling, InfoBatch, Rival, RivalTrainer, SeTa, SeTaHalf
from benchmarks.task import Rows, Task, collate
from hf_importance import ImportanceConfig, ImportanceTrainer


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        settings: settings of importance sampling.
        rival: class of a rival method. With neither, the method is `Trainer`.
        as_long_as: name of a method whose runs determine the number of steps.
        raised: whether the learning rate is raised by the square root of the factor between full and actual steps.
        whole: whether it only runs with the budget of the full training.
        by_length: whether texts are grouped by length; only runs on texts of different length.
    """

    settings: ImportanceConfig | None = None
    rival: type[Rival] | None = None
    as_long_as: str | None = None
    raised: bool = False
    whole: bool = False
    by_length: bool = False

    @property
    def cost(self) -> float:
        """Cost of a step, in steps of uniform training."""
        return 1.0 if self.rival is None else self.rival.cost

    def description(self) -> dict[str, Any]:
        """All settings in a form for JSON."""
        strategy = {"train_sampling_strategy": "group_by_length"} if self.by_length else {}
        if self.as_long_as is not None:
            return {"class": Trainer.__name__, "as_long_as": self.as_long_as, "raised": self.raised}
        if self.settings is None:
            name = Trainer.__name__ if self.rival is None else self.rival.__name__
            return {"class": name, "cost": self.cost, **strategy}
        settings = {name: value for name, value in asdict(self.settings).items() if name != "start_from"}  # see `reuse`
        return {"sampling": self.settings.sampling, **settings, **strategy}

    def runs_at(self, budget: float, of_texts: bool) -> bool:
        """Whether the method runs with this budget, on texts or on other data."""
        return (budget == 1.0 or not self.whole) and (of_texts or not self.by_length)

    def steps(self, task: Task, budget: float) -> int:
        """Number of steps with this share of the compute of the full training."""
        visits = round(budget * task.examples)
        return round(task.epochs * -(-visits // task.batch) / self.cost)

    def trainer(self, task: Task, steps: int, seed: int, folder: str) -> Trainer:
        """Create a trainer for this number of steps."""
        if self.raised:
            full = self.steps(task, 1.0)
            task = replace(task, learning_rate=task.learning_rate * math.sqrt(full / steps))
        strategy = {"train_sampling_strategy": "group_by_length"} if self.by_length else {}
        common = {"model": task.model(), "args": task.arguments(folder, steps, seed, **strategy)}
        common |= {"train_dataset": Rows(task.train), "data_collator": collate}
        if self.settings is not None:
            return ImportanceTrainer(**common, importance=self.settings)
        if self.rival is not None:
            return RivalTrainer(**common, rival=self.rival(task.examples, task.batch, steps))
        return Trainer(**common)


METHODS = {
    "uniform": Method(),
    "uniform, grouped": Method(by_length=True, whole=True),
    "ours": Method(ImportanceConfig(), whole=True),
    "ours, grouped": Method(ImportanceConfig(), by_length=True, whole=True),
    "uniform, as many steps": Method(as_long_as="ours", whole=True),
    "uniform, as many, raised": Method(as_long_as="ours", raised=True, whole=True),
    "ours, all steps": Method(ImportanceConfig(effective_epochs=False)),
    "paper": Method(ImportanceConfig.paper()),
    "InfoBatch": Method(rival=InfoBatch),
    "ES": Method(rival=EvolvedSampling),
    "ESWP": Method(rival=ESWP),
    "KAKURENBO": Method(rival=KAKURENBO),
    "SeTa": Method(rival=SeTa),
    "SeTa, half": Method(rival=SeTaHalf),
}
