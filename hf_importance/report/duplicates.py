"""Duplicate texts with different labels: at least one label is wrong, or the text does not determine it."""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils import logging
from transformers.utils.logging import tqdm

logger = logging.get_logger(__name__)

_PIECE = 1000
"""Rows of `datasets` read at a time."""
_SAMPLE = 2000
"""Rows used to decide whether a column is informative."""
_LARGE = 200_000
"""Show a progress bar from this many examples on."""
_NAMES = ("id", "idx", "guid", "uid", "uuid", "index", "url", "path", "file", "filename")
"""Columns that identify an example instead of describing it."""
_STRINGS = ("string", "large_string")
_LONGEST = 20_000
"""Characters that are compared; of longer texts, the length is compared as well."""


@dataclass(frozen=True)
class Conflict:
    """Examples with the same text and different labels.

    Args:
        index: positions of the examples, ascending.
        labels: their labels.
        text: text of the first one; empty if there are only tokens.
    """

    index: list[int]
    labels: list[float]
    text: str


def conflicts(examples: Any, labels: Tensor, quiet: bool = False) -> list[Conflict]:
    """Groups of duplicate texts with different labels, largest first; empty if examples have no texts.

    Texts are compared without case, spaces and punctuation; if there are only `input_ids`, these are compared. Columns
    that the label determines, such as its name, are ignored. Examples that are computed on access (`set_transform`,
    custom datasets) are not read, and examples with images are not compared.

    Args:
        examples: examples as shown in the report.
        labels: float32 `[examples]`, NaN where unknown.
        quiet: whether to hide the progress bar.

    >>> import torch
    >>> found = conflicts(["Hello, you!", "hello you", "bye", "Hello  you"], torch.tensor([0.0, 1.0, 1.0, 0.0]))
    >>> found[0].index, found[0].labels
    ([0, 1, 3], [0.0, 1.0, 0.0])
    """
    try:
        source = _source(examples, labels)
        if source is None:
            return []
        keys = np.zeros(len(labels), dtype=np.int64)  # 0: no text
        bar = tqdm(source.rows(), total=len(labels), disable=quiet or len(labels) < _LARGE, desc="Comparing texts")
        for i, said in enumerate(bar):
            keys[i] = hash(said) if said else 0
        groups = _groups_with_conflicts(keys, labels)
        return [Conflict(group.tolist(), labels[group].tolist(), source.text(int(group[0]))) for group in groups]
    except Exception as error:  # arbitrary user data must not stop training
        logger.warning(f"The report does not list duplicate texts: {type(error).__name__}: {error}")
        return []


def normalised(text: str) -> str:
    """Normalise a text: lower case, no punctuation, single spaces.

    >>> normalised("Don't  PANIC!")
    'don t panic'
    """
    more = str(len(text)) if len(text) > _LONGEST else ""
    text = unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()
    return " ".join(text.translate(_punctuation()).split()) + more


@functools.cache
def _punctuation() -> dict[int, str]:
    """Map punctuation (except `#`, as in C#) and control characters to spaces."""
    kinds = ("P", "Cc", "Cf")
    found = {code: " " for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith(kinds)}
    del found[ord("#")]
    return found


def _groups_with_conflicts(keys: np.ndarray, labels: Tensor) -> list[np.ndarray]:
    """Groups of positions with the same key and different labels."""
    values = labels.numpy()
    index = np.flatnonzero(np.isfinite(values) & (keys != 0))
    index = index[np.argsort(keys[index], kind="stable")]
    if not len(index):
        return []
    ends = np.flatnonzero(np.diff(keys[index])) + 1
    starts = np.concatenate([[0], ends])
    differ = np.minimum.reduceat(values[index], starts) < np.maximum.reduceat(values[index], starts)
    groups = [group for group, several in zip(np.split(index, ends), differ, strict=True) if several]
    return sorted(groups, key=len, reverse=True)


# ---- texts of examples -----------------------------------------------------------------------------------------------


class _DatasetColumns:
    """Columns of `datasets`, read in pieces."""

    def __init__(self, dataset: Any, columns: Sequence[str]) -> None:
        self._table = dataset.with_format("arrow").select_columns(list(columns))
        self._texts = list(columns) != ["input_ids"]

    def rows(self) -> Iterator[Any]:
        """Normalised text of each example, or its tokens."""
        for start in range(0, len(self._table), _PIECE):
            columns = self._table[start : start + _PIECE].columns
            for row in zip(*(column.to_pylist() for column in columns), strict=True):
                yield _joined(row) if self._texts else _hashable(row[0] or ())

    def text(self, index: int) -> str:
        """Text of an example, unmodified."""
        if not self._texts:
            return ""
        return " / ".join(x for column in self._table[index : index + 1].columns for x in column.to_pylist() if x)


class _ListedTexts:
    """A list of texts, or of rows with texts."""

    def __init__(self, examples: Sequence[Any], columns: Sequence[str]) -> None:
        self._examples, self._columns = examples, columns

    def rows(self) -> Iterator[Any]:
        """See [`_DatasetColumns.rows`]."""
        for example in self._examples:
            strings = self._strings(example)
            if strings or not isinstance(example, Mapping):
                yield _joined(strings)
            else:
                yield _hashable(example.get("input_ids", ()))

    def text(self, index: int) -> str:
        """Text of an example, unmodified."""
        return " / ".join(self._strings(self._examples[index]))

    def _strings(self, example: Any) -> list[str]:
        if isinstance(example, str):
            return [example]
        if not isinstance(example, Mapping):
            return []
        return [example[name] for name in self._columns if isinstance(example.get(name), str)]


def _source(examples: Any, labels: Tensor) -> _DatasetColumns | _ListedTexts | None:
    """The texts of the examples, or None if they cannot be compared."""
    if hasattr(examples, "with_format") and hasattr(examples, "features"):
        kinds = {name: feature for name, feature in (examples.features or {}).items()}
        pictures = any(type(kind).__name__ in ("Image", "Audio", "Video") for kind in kinds.values())
        if pictures or not hasattr(examples, "select_columns") or examples.format["type"] == "custom":
            return None
        strings = [name for name, kind in kinds.items() if getattr(kind, "dtype", "") in _STRINGS]
        first = examples.with_format(None).select_columns(strings)[:_SAMPLE] if strings else {}
        columns = [name for name in strings if _is_informative(name, first[name], labels)]
        columns = columns or (["input_ids"] if "input_ids" in kinds else [])
        return _DatasetColumns(examples, columns) if columns else None
    if not isinstance(examples, (list, tuple)) or not examples:
        return None
    rows = [example for example in examples[:_SAMPLE] if isinstance(example, Mapping)]
    if any(name in rows[0] for name in ("pixel_values", "image")) if rows else False:
        return None
    names = dict.fromkeys(name for row in rows for name, x in row.items() if isinstance(x, str))
    found = [name for name in names if _is_informative(name, [row.get(name) for row in rows], labels)]
    return _ListedTexts(examples, found)


def _is_informative(name: str, values: Sequence[Any], labels: Tensor) -> bool:
    """Whether a column holds more than an identifier or the label."""
    if name.lower() in _NAMES or name.lower().endswith(("_id", "_idx", "_url", "_path")):
        return False
    of_label: dict[float, Any] = {}
    return any(
        of_label.setdefault(label, value) != value
        for label, value in zip(labels[: len(values)].tolist(), values, strict=True)
        if label == label
    )


def _joined(texts: Sequence[str | None]) -> str:
    return "\x1f".join(normalised(text) for text in texts if text).strip("\x1f ")


def _hashable(ids: Any) -> Any:
    """Convert tokens to nested tuples, also of several texts."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return tuple(map(_hashable, ids)) if isinstance(ids, (list, tuple)) else ids
