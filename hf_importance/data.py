"""Carries the draw with the batch: sampler → data set → collator → training step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_importance.sampling.draw import Draw

DRAW_KEY = "importance_draw"
"""Key of the draw in a collated batch."""
_MOST_EXAMPLES = 1024
"""That a mean over the data is taken of: its error is then a few percent, and only scales the learning rate."""


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


def mean_over_examples(
    dataset: Any, collate: Callable[[list[Any]], MutableMapping[str, Any]], key: str, count: Callable[[Tensor], Tensor]
) -> float:
    """Mean of `count(batch[key])`, `[batch, …] → [batch]`, over the data, or evenly spaced examples if it is large.

    The same on all ranks, in every run, and for every batch size; no random number that training would get is taken.
    """
    examples = range(0, len(dataset), -(-len(dataset) // _MOST_EXAMPLES))
    total = 0
    with _own_randomness():
        collate = copy.deepcopy(collate)  # it may have a generator of its own
        for i in examples:
            total += int(count(collate([dataset[i]])[key]).sum())
    return max(total, 1) / len(examples)


@contextmanager
def _own_randomness() -> Iterator[None]:
    python = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
