"""Carries the draw along with the batch: sampler → dataset → collator → training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from hf_importance.randomness import isolated_randomness
from hf_importance.sampling.draw import Draw

DRAW_KEY = "importance_draw"
"""Key of the draw in a collated batch."""
LABEL_COLUMNS = ("labels", "label", "label_ids")
_MAX_EXAMPLES, _MAX_MASKS = 1024, 64
"""Examples that a mean over the data is estimated from: a few percent of error, which only scales the learning rate."""
_MASK = 2**14
"""Labels with at least this many elements are masks, which are slow to load."""


class ImportanceDataset(Dataset):
    """A map-style dataset that is indexed by a whole [`Draw`] and returns its examples together with the draw.

    Examples are read from `dataset` at every visit, so transforms and random augmentation keep working.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draw: Draw) -> tuple[list[Any], Draw]:
        """Called by `DataLoader` with one item of its batch sampler."""
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(draw.index), draw
        return [self.dataset[i] for i in draw.index], draw

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def set_epoch(self, epoch: int) -> None:
        """Forward to the dataset if it has this method."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class ImportanceCollator:
    """Collates the examples with `collate` and adds the draw to the batch, an object that ignores device transfers.

    Raises:
        TypeError: if `collate` does not return a mapping.
        ValueError: if it fails because labels are strings.
    """

    def __init__(self, collate: Callable[[list[Any]], MutableMapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples_and_draw: tuple[list[Any], Draw]) -> MutableMapping[str, Any]:
        """Called by `DataLoader` with the output of [`ImportanceDataset`]."""
        examples, draw = examples_and_draw
        try:
            batch = self.collate(examples)
        except (TypeError, ValueError) as error:
            refuse_texts_as_labels(examples[0], error)
            raise
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"data_collator must return a dict of tensors, but returned {type(batch).__name__}: "
                "return a dict whose keys are the arguments of the model's forward."
            )
        lengths = _lengths_in_one_row(examples, batch)
        batch[DRAW_KEY] = draw if lengths is None else replace(draw, lengths=lengths)
        return batch


def _lengths_in_one_row(examples: list[Any], batch: Mapping[str, Any]) -> list[int] | None:
    """Lengths of examples that were concatenated into one row of tokens; None if they were not."""
    tokens = batch.get("input_ids")
    if len(examples) == 1 or not isinstance(tokens, Tensor) or len(tokens) != 1:
        return None
    found = [example.get("input_ids") if isinstance(example, Mapping) else None for example in examples]
    return [len(ids) for ids in found] if all(hasattr(ids, "__len__") for ids in found) else None


def refuse_texts_as_labels(example: Any, error: Exception | None = None) -> None:
    """Check an example whose label could not be read.

    Raises:
        ValueError: if its label is a string.
    """
    for name in LABEL_COLUMNS:
        label = example.get(name) if isinstance(example, Mapping) else None
        label = label[0] if isinstance(label, (list, tuple)) and label else label
        if isinstance(label, str):
            raise ValueError(
                f"Labels must be numbers, but the column {name!r} has the string {label!r}: encode the classes as "
                f"numbers, for example with dataset.class_encode_column({name!r})."
            ) from error


def mean_over_examples(
    dataset: Any, collate: Callable[[list[Any]], MutableMapping[str, Any]], key: str, count: Callable[[Tensor], Tensor]
) -> float:
    """Mean of `count(batch[key])`, `[batch, …] → [batch]`, over the data, or evenly spaced examples if it is large.

    It is the same on all ranks, in every run and for every batch size, and does not affect the random state.
    """
    with isolated_randomness(owners=(dataset, collate)):
        first = collate([dataset[0]])[key]
        most = _MAX_EXAMPLES if first.numel() < _MASK else _MAX_MASKS
        examples = range(0, len(dataset), -(-len(dataset) // most))
        total = int(count(first).sum())
        for i in examples[1:]:
            total += int(count(collate([dataset[i]])[key]).sum())
    return max(total, 1) / len(examples)
