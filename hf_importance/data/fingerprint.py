"""Identification of the training data, to avoid restoring importances for different examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any

import torch
from torch import Tensor

from hf_importance.data.dataset import LABEL_COLUMNS
from hf_importance.randomness import isolated_randomness

_MAX_READ, _MAX_BYTES = 128, 2**22
"""Number of examples that are read; for `datasets`, at least this many bytes."""


def fingerprint(dataset: Any, labels: Iterable[str] = LABEL_COLUMNS) -> dict[str, Any]:
    """Fingerprint of the training data: that of `datasets` if available, and a digest of each column.

    A digest covers evenly spaced examples; for labels in `datasets` or lists of dicts, it covers all examples. Columns
    that cannot be read, or change with every read (random augmentation), have none.

    Args:
        dataset: the training data.
        labels: names of the label columns.
    """
    try:
        with isolated_randomness(owners=(dataset,)):
            if hasattr(dataset, "with_format") and hasattr(dataset, "_fingerprint"):
                return {"datasets": dataset._fingerprint, "columns": _digests_of_arrow(dataset, set(labels))}
            return {"datasets": None, "columns": _digests_of_examples(dataset, set(labels))}
    except Exception:  # arbitrary user data must not stop training
        return {"datasets": None, "columns": {}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe how two results of [`fingerprint`] differ; empty if they agree."""
    if not before or not now or (before["datasets"] is not None and before["datasets"] == now["datasets"]):
        return ""
    common = before["columns"].keys() & now["columns"]
    if not common and before["columns"] and now["columns"]:
        return f"columns {sorted(before['columns'])}, now {sorted(now['columns'])}"
    changed = sorted(str(name) for name in common if before["columns"][name] != now["columns"][name])
    return f"{', '.join(changed)} {'differ' if len(changed) > 1 else 'differs'}" if changed else ""


def _digests_of_examples(dataset: Any, labels: set[str]) -> dict[str, str]:
    examples = range(0, len(dataset), -(-len(dataset) // _MAX_READ))
    first, second = ([_columns_of(dataset[i]) for i in examples] for _ in range(2))
    names = {name for row in first for name in row}
    digests, again = ({name: _digest([row.get(name) for row in rows]) for name in names} for rows in (first, second))
    digests = {name: digest for name, digest in digests.items() if digest and digest == again[name]}
    if isinstance(dataset, (list, tuple)):  # in memory already
        for name in labels & digests.keys():
            digests[name] = _digest([_columns_of(row).get(name) for row in dataset])
    return {name: digest for name, digest in digests.items() if digest}


def _digests_of_arrow(dataset: Any, labels: set[str]) -> dict[str, str]:
    dataset = dataset.with_format("arrow")
    size = max(1, dataset.data.nbytes // max(1, len(dataset.data)))  # of an example
    number = max(_MAX_READ, _MAX_BYTES // size)
    table = dataset[list(range(0, len(dataset), -(-len(dataset) // number)))]
    digests = {name: _digest(table.column(name).to_pylist()) for name in table.column_names}
    for name in labels & set(table.column_names):
        column = dataset.select_columns([name])[:].column(name).combine_chunks()
        values = column.flatten() if hasattr(column, "flatten") and hasattr(column, "offsets") else column
        numbers = values.to_numpy(zero_copy_only=False)
        if numbers.dtype != object:
            digests[name] = _digest([numbers])
    return {name: digest for name, digest in digests.items() if digest}


def _columns_of(example: Any) -> dict[str, Any]:
    if isinstance(example, Mapping):
        return {str(name): value for name, value in example.items()}
    if hasattr(example, "__dict__") and not isinstance(example, Tensor):
        return dict(vars(example))
    return {str(i): value for i, value in enumerate(example)} if isinstance(example, (tuple, list)) else {"": example}


def _digest(values: list[Any]) -> str | None:
    """Digest of values that are the same in every process; None if there are others."""
    digest = hashlib.sha256()
    try:
        for value in values:
            digest.update(_bytes_of(value))
    except (TypeError, RuntimeError, ValueError):
        return None
    return digest.hexdigest()


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (
            f"{value.dtype}{list(value.shape)}".encode()
            + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    if isinstance(value, (Mapping, list, tuple)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return b"".join(_bytes_of(part) for pair in pairs for part in pair) + b";"
    if hasattr(value, "tobytes") and str(getattr(value, "dtype", "")) != "object":  # an array, or a PIL image
        return f"{getattr(value, 'shape', getattr(value, 'size', ''))}".encode() + value.tobytes()
    if value is None or isinstance(value, (str, bytes, bool, int, float, date)):
        return repr(value).encode(errors="surrogatepass") + b","
    raise TypeError(type(value).__name__)
