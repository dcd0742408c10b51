"""Methods of `fine_tuning`: `Trainer`, ours, and rivals, which end with the same number of epochs.

To add one, add it to `METHODS`, with settings of importance sampling, a class of `rivals`, or a class of trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from benchmarks.fine_tuning_tasks import Material
from benchmarks.rivals import KAKURENBO, InfoBatch, Rival, RivalTrainer, SelectiveBackprop, SeTa
from benchmarks.task import Batch
from benchmarks.vcas import VCASTrainer
from hf_importance import ImportanceConfig, ImportanceTrainer

UNIFORM, OURS = "Trainer", "ImportanceTrainer"
AS_MANY_SECONDS = "Trainer, as many seconds"


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        settings: settings of importance sampling.
        rival: class of a rival method that chooses examples.
        trainer: class of the trainer, where it is neither of these.
        as_long_as: what the number of steps of `Trainer` follows: steps or seconds that ours took with the same seed.
        acts_from_second_epoch: whether it is `Trainer` in the first epoch, and thus not run in trainings of one.
    """

    settings: ImportanceConfig | None = None
    rival: type[Rival] | None = None
    trainer: type[Trainer] = Trainer
    as_long_as: Literal["steps", "seconds"] | None = None
    acts_from_second_epoch: bool = False

    @property
    def is_rival(self) -> bool:
        """Whether it is a method of others."""
        return self.rival is not None or self.trainer is not Trainer

    def new_trainer(self, model: nn.Module, arguments: TrainingArguments, material: Material, steps: int) -> Trainer:
        """A trainer, with the steps of the schedule of its learning rate."""
        if self.as_long_as is not None or self.rival is not None:
            arguments.max_steps = steps
        common: dict[str, Any] = {"model": model, "args": arguments, "data_collator": material.collate_train}
        if self.settings is not None:
            return ImportanceTrainer(**common, train_dataset=material.train, importance=self.settings)
        if self.rival is None:
            return self.trainer(**common, train_dataset=material.train)
        rival = self.rival(len(material.train), arguments.per_device_train_batch_size, steps)
        rival.ends_by_epochs = True
        return RivalTrainer(model=model, args=arguments, train_dataset=Examples(material), rival=rival)

    def steps(self, full: int, pair: tuple[dict[str, Any], dict[str, Any]] | None) -> int:
        """Steps of the schedule.

        Args:
            full: steps of uniform training.
            pair: finished runs of `Trainer` and of ours with the same seed; only where `as_long_as` is set.
        """
        if self.as_long_as is None:
            return full
        uniform, ours = pair
        return max(1, round(full * ours[self.as_long_as] / uniform[self.as_long_as]))


class Examples(torch.utils.data.Dataset):
    """Training examples as whole batches, which is how [`RivalTrainer`] takes them."""

    def __init__(self, material: Material) -> None:
        self._material = material

    def __len__(self) -> int:
        return len(self._material.train)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._material.train[index]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        return [Batch(self._material.collate_train([self[i] for i in indices]))]

    def take(self, index: Tensor) -> Batch:
        """A batch of these examples."""
        return self.__getitems__(index.tolist())[0]


METHODS = {
    UNIFORM: Method(),
    OURS: Method(ImportanceConfig()),
    "ImportanceTrainer, full backward": Method(ImportanceConfig(backward="full")),
    "uniform draws, selective backward": Method(ImportanceConfig(metric="uniform")),
    "uniform draws, all rows": Method(ImportanceConfig(metric="uniform", backward_tolerance=1e-9)),  # skips tokens
    "VCAS-like": Method(trainer=VCASTrainer),
    "Selective-Backprop": Method(rival=SelectiveBackprop),
    "InfoBatch": Method(rival=InfoBatch, acts_from_second_epoch=True),
    "SeTa": Method(rival=SeTa),
    "KAKURENBO": Method(rival=KAKURENBO, acts_from_second_epoch=True),
    "Trainer, as many steps": Method(as_long_as="steps"),
    AS_MANY_SECONDS: Method(as_long_as="seconds"),
}
"""Methods by name."""
