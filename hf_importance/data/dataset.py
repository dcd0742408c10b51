"""Carries the draw along with the batch: sampler → dataset → collator → training step."""

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from hf_importance.data.rows import ROWS_KEY, UNKNOWN, Collate, number_of_rows, places_in, places_of_rows
from hf_importance.randomness import isolated_randomness

DRAW_KEY = "importance_draw"  # key of the draw in a collated batch; it stays there until the training step takes it out
LABEL_COLUMNS = ("labels", "label", "label_ids")
_MAX_EXAMPLES, _MAX_MASKS = 1024, 64
"""Examples that a mean over the data is estimated from: a few percent of error, which only scales the learning rate."""
_MASK = 2**14  # labels with at least this many elements are masks, which are slow to load


class ImportanceDataset(Dataset):
    """A map-style dataset that is indexed by a whole draw and returns its examples together with the draw."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draw: Any) -> tuple[list[Any], Any]:
        """Called by `DataLoader` with one item of its batch sampler."""
        if not hasattr(self.dataset, "__getitems__"):
            return [self.dataset[i] for i in draw.index], draw
        examples = self.dataset.__getitems__(draw.index)
        return examples, draw if len(examples) == len(draw.index) else self._with_places(draw, examples)

    def _with_places(self, draw: Any, examples: Any) -> Any:
        """The draw, with the place in its index of each example, of which the dataset left some out, or made several.

        A single one may be a whole batch.
        """
        number, numbers = len(examples), []
        if number == 1 or not isinstance(examples, list):
            return draw
        for i in draw.index:
            try:
                with isolated_randomness():
                    numbers.append(len(self.dataset.__getitems__([i])))
            except Exception:  # it cannot return nothing
                numbers.append(0)
        return replace(draw, rows=places_in(numbers) if sum(numbers) == number else [UNKNOWN] * number)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def set_epoch(self, epoch: int) -> None:
        """Forward to the dataset if it has this method."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class ImportanceCollator:
    """Collates the examples with `collate` and adds the draw to the batch, an object that ignores device transfers.

    Args:
        collate: collator of the user.
        label_names: names of the labels, by which the rows of a batch are counted; None if batches need not have one
            row per example, as those of known trainers.
    """

    def __init__(self, collate: Collate, label_names: Collection[str] | None = None) -> None:
        self.collate, self._label_names = collate, label_names

    def __call__(self, examples_and_draw: tuple[list[Any], Any]) -> MutableMapping[str, Any]:
        """Called by `DataLoader` with the output of [`ImportanceDataset`]."""
        examples, draw = examples_and_draw
        try:
            batch = self.collate(examples)
        except (RuntimeError, TypeError, ValueError) as error:
            for example in examples:
                validate_labels(example, error)
            raise
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"data_collator must return a dict of tensors, but returned {type(batch).__name__}: "
                "return a dict whose keys are the arguments of the model's forward."
            )
        tokens = batch.get("input_ids")
        if self._label_names is None:
            batch.pop(ROWS_KEY, None)
        if len(examples) > 1 and isinstance(tokens, Tensor) and len(tokens) == 1:  # concatenated into one row
            rows = [example.get("input_ids") if isinstance(example, Mapping) else None for example in examples]
            draw = replace(draw, lengths=[len(r) for r in rows] if all(hasattr(r, "__len__") for r in rows) else None)
        elif self._label_names is not None:
            size, special = len(draw.index), draw.rows is not None or ROWS_KEY in batch
            special = special or any(example is None for example in examples)
            if special or number_of_rows(batch, size, self._label_names) != size:
                places = places_of_rows(batch, examples, self.collate, self._label_names)
                draw = draw if places is None else replace(draw, rows=_composed(draw.rows, places))
        batch[DRAW_KEY] = draw
        return batch


def _composed(of_examples: list[int] | None, places: list[int]) -> list[int]:
    """The place of each row in a draw, of whose examples the dataset has returned these."""
    if of_examples is None:
        return places
    return [of_examples[place] if place != UNKNOWN else UNKNOWN for place in places]


def validate_labels(example: Any, error: Exception | None = None) -> None:
    """Raise a `ValueError` if the label of an example, which could not be read, is a string, a dict or missing."""
    for name in LABEL_COLUMNS:
        if not isinstance(example, Mapping) or name not in example:
            continue
        label = example[name]
        if label is None or isinstance(label, Mapping):
            raise ValueError(
                f"Labels must be numbers, but the column {name!r} has {label!r} in an example: "
                f"{'remove these examples' if label is None else 'make a column of the number in it'}."
            ) from error
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

    It is the same on all ranks, in every run and for every batch size.
    """
    with isolated_randomness():
        first = collate([dataset[0]])[key]
        most = _MAX_EXAMPLES if first.numel() < _MASK else _MAX_MASKS
        examples = range(0, len(dataset), -(-len(dataset) // most))
        total = int(count(first).sum())
        for i in examples[1:]:
            total += int(count(collate([dataset[i]])[key]).sum())
    return max(total, 1) / len(examples)
