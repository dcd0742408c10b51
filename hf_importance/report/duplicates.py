"""Duplicate texts with different labels: at least one label is wrong, or the text does not determine it."""

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PIECE = 2000  # examples read at a time; those of the first piece decide which columns are compared
_IDENTIFIER = re.compile(r"(.*_)?(id|idx|url|path)|guid|uid|uuid|index|file|filename", re.IGNORECASE)
"""Columns that identify an example instead of describing it."""
_LONGEST = 20_000  # characters that are compared; of longer texts, the length is compared as well


@dataclass(frozen=True)
class Conflict:
    """Examples with the same text and different labels."""

    index: list[int]  # ascending
    labels: list[float]
    text: str  # of the first one; empty if there are only tokens


def conflicts(examples: Any, labels: Tensor) -> list[Conflict]:
    """Groups of duplicate texts with different labels, largest first; empty if examples have no texts.

    Texts are compared without case, spaces and punctuation; if there are only `input_ids`, these are compared. Columns
    that the label determines, such as its name, are ignored. Examples that are computed on access (`set_transform`,
    custom datasets) are not read, and examples with images are not compared. Labels are NaN where unknown.

    >>> import torch
    >>> found = conflicts(["Hello, you!", "hello you", "bye", "Hello  you"], torch.tensor([0.0, 1.0, 1.0, 0.0]))
    >>> found[0].index, found[0].labels
    ([0, 1, 3], [0.0, 1.0, 0.0])
    """
    try:
        columns = _compared_columns(examples, labels.numpy())
        if not columns:
            return []
        starts = range(0, len(labels), _PIECE)
        hashes = np.concatenate([_hashes(_read(examples, columns, start, start + _PIECE)) for start in starts])
        table = pd.DataFrame({"hash": hashes, "label": labels.numpy()})
        table = table[np.isfinite(table["label"]) & (table["hash"] != 0)]
        table = table[table.groupby("hash")["label"].transform("nunique") > 1]
        groups = [group for _, group in table.groupby("hash", sort=False)["label"]]
        groups.sort(key=len, reverse=True)
        found = []
        for group in groups:
            row = _read(examples, columns, group.index[0], group.index[0] + 1).iloc[0]
            text = " / ".join(cell for cell in row if isinstance(cell, str) and cell)
            found.append(Conflict(group.index.tolist(), group.tolist(), text))
        return found
    except Exception as error:  # arbitrary user data must not stop training
        logger.warning(f"The report does not list duplicate texts: {type(error).__name__}: {error}")
        return []


def normalised(text: str) -> str:
    """Normalise a text: lower case, no punctuation, single spaces.

    >>> normalised("Don't  PANIC!")
    'don t panic'
    """
    length = str(len(text)) if len(text) > _LONGEST else ""
    text = unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()
    return " ".join(text.translate(_punctuation()).split()) + length


@functools.cache
def _punctuation() -> dict[int, str]:
    """Map punctuation (except `#`, as in C#) and control characters to spaces."""
    kinds = ("P", "Cc", "Cf")
    codes = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith(kinds))
    return {code: " " for code in codes if chr(code) != "#"}


def _compared_columns(examples: Any, labels: np.ndarray) -> list[str]:
    """Columns with texts that say more than the label, else `input_ids` if there are any, else none."""
    if hasattr(examples, "features") and hasattr(examples, "select_columns"):
        kinds = {type(feature).__name__ for feature in examples.features.values()}
        if kinds & {"Image", "Audio", "Video"} or examples.format["type"] == "custom":
            return []
        kinds = {name: getattr(feature, "dtype", "") for name, feature in examples.features.items()}
        names = [name for name, kind in kinds.items() if kind in ("string", "large_string") or name == "input_ids"]
    elif isinstance(examples, (list, tuple)) and examples and isinstance(examples[0], Mapping):
        names = [] if {"image", "pixel_values"} & set(examples[0]) else list(examples[0])
    else:
        return ["text"] if isinstance(examples, (list, tuple)) and isinstance(examples[0], str) else []
    first = _read(examples, names, 0, _PIECE)
    texts = [name for name in names if any(isinstance(value, str) for value in first[name])]
    varied = first[texts].groupby(labels[: len(first)]).nunique().max() > 1
    informative = [name for name in texts if varied[name] and not _IDENTIFIER.fullmatch(name)]
    return informative or [name for name in names if name == "input_ids"]


def _read(examples: Any, columns: list[str], start: int, stop: int) -> pd.DataFrame:
    """Columns of some examples; a list of texts has a single column."""
    if hasattr(examples, "select_columns"):
        return pd.DataFrame(examples.with_format(None).select_columns(columns)[start:stop], dtype=object)
    rows = examples[start:stop]
    values = {name: [row if isinstance(row, str) else row.get(name) for row in rows] for name in columns}
    return pd.DataFrame(values, dtype=object)


def _hashes(rows: pd.DataFrame) -> np.ndarray:
    """A number for the normalised texts or tokens of each row, uint64 `[rows]`; 0 if there are none."""
    if list(rows) == ["input_ids"]:
        texts = rows["input_ids"].map(_tokens_as_text)
    else:
        texts = rows.map(lambda cell: normalised(cell) if isinstance(cell, str) else "")
        texts = functools.reduce(lambda left, right: left + "\x1f" + right, (texts[name] for name in texts))
    texts = texts.str.strip("\x1f ")
    return np.where(texts == "", 0, pd.util.hash_array(texts.to_numpy(dtype=object)))


def _tokens_as_text(ids: Any) -> str:
    return "" if ids is None or not len(ids) else json.dumps(ids, default=lambda tensor: tensor.tolist())
