"""Carries the draw with the batch: sampler → data set → collator → training step."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from torch.utils.data import Dataset

from hf_importance.sampler import Draw

DRAW_KEY = "importance_draw"
"""Key of the draw in a collated batch."""


class ImportanceDataset(Dataset):
    """A map-style data set that is asked for a whole [`Draw`] and answers with its examples and the draw.

    The examples are asked from `dataset` at every visit, so that transforms and random augmentation keep working.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draw: Draw) -> tuple[list[Any], Draw]:
        """What `DataLoader` calls with one item of its batch sampler."""
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(draw.index), draw
        return [self.dataset[i] for i in draw.index], draw

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def set_epoch(self, epoch: int) -> None:
        """Passed on to a data set that has it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class ImportanceCollator:
    """Collates the examples with `collate` and puts the draw beside them: one object that no device transfer touches.

    Raises:
        TypeError: if `collate` does not return a mapping.
    """

    def __init__(self, collate: Callable[[list[Any]], MutableMapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples_and_draw: tuple[list[Any], Draw]) -> MutableMapping[str, Any]:
        """What `DataLoader` calls with what it got from [`ImportanceDataset`]."""
        examples, draw = examples_and_draw
        batch = self.collate(examples)
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"data_collator must return a dict of tensors, but returned {type(batch).__name__}: "
                "return a dict whose keys are the arguments of the model's forward."
            )
        batch[DRAW_KEY] = draw
        return batch
