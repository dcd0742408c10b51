"""Equal texts whose labels differ: at least one of them is wrong, or the label cannot be told from the text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils.logging import tqdm

_PIECE = 10_000
"""Rows of `datasets` at a time."""
_LARGE = 200_000
"""Examples, from which on a progress bar is shown."""
_NAMES = ("id", "idx", "guid", "uid", "uuid", "index", "url", "path", "file", "filename")
"""Columns that tell an example from others, instead of what it says."""
_LONGEST = 20_000
"""Characters that are compared."""


@dataclass(frozen=True)
class Conflict:
    """Examples that say the same and have several labels.

    Args:
        index: of the examples, ascending.
        labels: of each.
        text: of the first one, as it is; empty where there are only tokens.
    """

    index: list[int]
    labels: list[float]
    text: str


def conflicts(examples: Any, labels: Tensor, quiet: bool = False) -> list[Conflict]:
    """Groups of equal texts with different labels, the largest first; none where examples have no texts.

    Texts are equal if their words are, whatever their case, spaces and punctuation; where there are only `input_ids`,
    if those are. What is made when asked for (by `set_transform`, by a data set of one's own) is not read.

    Args:
        examples: as the report shows them.
        labels: float32 `[examples]`, NaN where unknown.
        quiet: show no progress bar.

    >>> import torch
    >>> found = conflicts(["Hello, you!", "hello you", "bye", "Hello  you"], torch.tensor([0.0, 1.0, 1.0, 0.0]))
    >>> found[0].index, found[0].labels
    ([0, 1, 3], [0.0, 1.0, 0.0])
    """
    keys = _keys(examples, quiet or len(labels) < _LARGE)
    if keys is None:
        return []
    known = np.isfinite(labels.numpy()) & (keys != 0)
    index = np.flatnonzero(known)
    index = index[np.argsort(keys[index], kind="stable")]
    ends = np.flatnonzero(np.diff(keys[index])) + 1
    starts = np.concatenate([[0], ends])
    values = labels.numpy()[index]
    if not len(index):
        return []
    several = np.minimum.reduceat(values, starts) < np.maximum.reduceat(values, starts)
    groups = [group for group, differ in zip(np.split(index, ends), several, strict=True) if differ]
    groups.sort(key=len, reverse=True)
    return [Conflict(group.tolist(), labels[group].tolist(), _text(examples[int(group[0])])) for group in groups]


def normalised(text: str) -> str:
    """Its words, in lower case, with a space between them.

    >>> normalised("Don't  PANIC!")
    'don t panic'
    """
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()))


def _keys(examples: Any, quiet: bool) -> np.ndarray | None:
    """int64 `[examples]`: equal where texts are; 0 where there is none. None where there are no texts at all."""
    rows = _rows(examples)
    if rows is None:
        return None
    keys = np.zeros(len(examples), dtype=np.int64)
    for i, said in enumerate(tqdm(rows, total=len(examples), disable=quiet, desc="Comparing texts")):
        keys[i] = hash(said) if said else 0
    return keys


def _rows(examples: Any) -> Iterator[Any] | None:
    """What each example says: a normalised text or a tuple of tokens; None or empty if nothing."""
    if hasattr(examples, "with_format") and hasattr(examples, "features"):
        return _stored(examples)
    if isinstance(examples, (list, tuple)) and examples:
        return (_said(example) for example in examples)
    return None


def _stored(dataset: Any) -> Iterator[Any] | None:
    if dataset.format["type"] == "custom":
        return None
    columns = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    columns = [name for name in columns if not _is_name(name)]
    tokens = not columns and "input_ids" in dataset.features
    if not columns and not tokens:
        return None
    return _read(dataset.select_columns(columns or ["input_ids"]).with_format("arrow"), _told if columns else _tokens)


_STRINGS = ("string", "large_string")


def _read(table: Any, said: Callable[[tuple[Any, ...]], Any]) -> Iterator[Any]:
    for start in range(0, len(table), _PIECE):
        piece = table[start : start + _PIECE]
        yield from map(said, zip(*(column.to_pylist() for column in piece.columns), strict=True))


def _told(strings: tuple[str | None, ...]) -> str:
    return "\x1f".join(normalised(text) for text in strings if text)


def _tokens(row: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(row[0] or ())


def _said(example: Any) -> Any:
    if isinstance(example, str):
        return normalised(example)
    if not isinstance(example, Mapping):
        return None
    strings = tuple(x for name, x in example.items() if isinstance(x, str) and not _is_name(name))
    if strings:
        return _told(strings)
    ids = example.get("input_ids")
    return None if ids is None else tuple(ids.tolist() if hasattr(ids, "tolist") else ids)


def _is_name(column: str) -> bool:
    return column.lower() in _NAMES or column.lower().endswith(("_id", "_idx", "_url", "_path"))


def _text(example: Any) -> str:
    if isinstance(example, str):
        return example
    strings = [x for name, x in example.items() if isinstance(x, str) and not _is_name(name)]
    return " / ".join(strings)
