"""Which example each row of a batch is made of, where a collator leaves examples out or makes several rows of one."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.trainer_utils import RemoveColumnsCollator

from hf_importance.randomness import isolated_randomness

ROWS_KEY = "importance_rows"
"""Key under which a collator may say of which example each row is: its place in the list that the collator got."""
UNKNOWN = -1
"""Place of a row of which this is not known."""
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)

Collate = Callable[[list[Any]], MutableMapping[str, Any]]


# ---- the collator of the user ----------------------------------------------------------------------------------------


def users_collator(collate: Any) -> Any:
    """The collator that the user wrote, inside the one of `Trainer` that removes columns, and partial functions."""
    inner = getattr(collate, "data_collator", None) if isinstance(collate, RemoveColumnsCollator) else None
    inner = collate.func if isinstance(collate, partial) else inner
    return collate if inner is None else users_collator(inner)


def name_of(collate: Any) -> str:
    """Name of the user's collator, for messages."""
    collate = users_collator(collate)
    return getattr(collate, "__qualname__", type(collate).__qualname__)


def twin_of(collate: Any) -> Any:
    """A collator in the same state, with its own containers and generators; a function is the same."""
    if not hasattr(collate, "__dict__") or hasattr(collate, "__code__") or hasattr(collate, "__func__"):
        return collate
    twin = copy.copy(collate)
    for name, value in vars(collate).items():
        if isinstance(value, torch.Generator):
            vars(twin)[name] = value.clone_state()
        elif isinstance(value, (list, dict, set)):
            vars(twin)[name] = copy.copy(value)
        elif isinstance(value, _GENERATORS):
            vars(twin)[name] = copy.deepcopy(value)
        elif value is users_collator(collate):
            vars(twin)[name] = twin_of(value)
    return twin


# ---- rows ------------------------------------------------------------------------------------------------------------


def places_of_rows(
    batch: MutableMapping[str, Any], examples: Sequence[Any], collate: Collate, label_names: Collection[str]
) -> list[int] | None:
    """The place in `examples` of each row of a batch; None if every example has one row, in order.

    A collator says it in `batch["importance_rows"]`, which is taken out. If it does not, and there are fewer rows than
    examples, or an example is None, each is collated on its own to see which were left out, and labels are compared.
    Where that does not tell either, all places are [`UNKNOWN`].

    Raises:
        ValueError: if what the collator says is not one place for each row.

    >>> def collate(numbers):
    ...     return {"labels": torch.tensor([number for number in numbers if number >= 0])}
    >>> places_of_rows(collate([7, -1, 9]), [7, -1, 9], collate, ["labels"])
    [0, 2]
    """
    told, rows = batch.pop(ROWS_KEY, None), number_of_rows(batch, len(examples), label_names)
    if told is not None:
        return _validated(told, rows, len(examples))
    if rows == len(examples) and not any(example is None for example in examples):
        return None
    kept = _kept(batch, examples, twin_of(collate), label_names) if rows <= len(examples) else []
    return kept if len(kept) == rows else [UNKNOWN] * rows


def places_in(parts: Sequence[int]) -> list[int]:
    """The place of each row, if the examples make so many rows each, in order.

    >>> places_in([1, 0, 2])
    [0, 2, 2]
    """
    return [place for place, rows in enumerate(parts) for _ in range(rows)]


def number_of_rows(batch: Mapping[str, Any], examples: int, label_names: Collection[str]) -> int:
    """Rows of a batch of so many examples, by its labels, or by its other values if these agree; else as many."""
    sizes = [_size(batch[name]) for name in label_names if name in batch]
    sizes = sizes or [_size(value) for value in batch.values()]
    distinct = {size for size in sizes if size is not None}
    return examples if examples in distinct or len(distinct) != 1 else distinct.pop()


def _size(value: Any) -> int | None:
    """Length of a tensor or list, or of the first tensor in a nested value; None if it has none."""
    if isinstance(value, (list, tuple)):
        return len(value)
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(leaves[0]) if leaves else None


def _validated(told: Any, rows: int, examples: int) -> list[int]:
    try:
        places = [operator.index(place) for place in (told.tolist() if hasattr(told, "tolist") else told)]
    except TypeError:
        places = None
    if places is None or len(places) != rows or not all(0 <= place < examples for place in places):
        raise ValueError(
            f"data_collator must return in batch[{ROWS_KEY!r}] the place of the example of each of its {rows} rows, "
            f"integers in 0 … {examples - 1}, but returned {told}."
        )
    return places


def _kept(
    batch: Mapping[str, Any], examples: Sequence[Any], collate: Collate, label_names: Collection[str]
) -> list[int]:
    """Places of the examples that make a row on their own; none if these have other labels, or several rows."""
    kept: list[int] = []
    for place, example in enumerate(examples):
        try:
            with isolated_randomness():
                alone = collate([example])
                rows = number_of_rows(alone, 1, label_names)
        except Exception:  # there is no batch of bad examples only
            continue
        if rows > 1 or (rows and not _has_label_of_row(alone, batch, len(kept), label_names)):
            return []
        kept += [place] * rows
    return kept


def _has_label_of_row(
    alone: Mapping[str, Any], batch: Mapping[str, Any], row: int, label_names: Collection[str]
) -> bool:
    """Whether the label of a batch of one is that of this row, as far as both are numbers."""
    for name in label_names:
        one, all_of_them = alone.get(name), batch.get(name)
        is_number = isinstance(one, Tensor) and isinstance(all_of_them, Tensor) and one.dim() == all_of_them.dim() == 1
        if is_number and (row >= len(all_of_them) or not torch.equal(one[0], all_of_them[row])):
            return False
    return True
