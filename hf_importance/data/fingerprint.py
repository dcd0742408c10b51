"""Identification of the training data, to avoid restoring importances for different examples."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any

import torch
from torch import Tensor

from hf_importance.randomness import isolated_randomness

_MAX_READ, _MAX_BYTES = 128, 2**22  # number of examples that are read; for `datasets`, at least this many bytes
_PIECE = 1000  # labels of `datasets` read at a time


def fingerprint(dataset: Any, labels: Iterable[str] = ("labels", "label", "label_ids")) -> dict[str, Any]:
    """Fingerprint of the training data: that of `datasets` if available, and a digest of each column.

    A digest covers evenly spaced examples; for the columns named in `labels`, in `datasets` or lists of dicts, it
    covers all examples. Columns that cannot be read, or change with every read (random augmentation), have none.
    """
    try:
        with isolated_randomness():
            return {"datasets": getattr(dataset, "_fingerprint", None), "columns": _digests(dataset, set(labels))}
    except Exception:  # arbitrary user data must not stop training
        return {"datasets": None, "columns": {}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe how two results of [`fingerprint`] differ; empty if they agree."""
    if not before or not now or (before["datasets"] is not None and before["datasets"] == now["datasets"]):
        return ""
    common = before["columns"].keys() & now["columns"]
    if not common and before["columns"] and now["columns"]:
        return f"columns {sorted(before['columns'])}, now {sorted(now['columns'])}"
    changed = sorted(name for name in common if before["columns"][name] != now["columns"][name])
    return f"{', '.join(changed)} {'differ' if len(changed) > 1 else 'differs'}" if changed else ""


def _digests(dataset: Any, labels: set[str]) -> dict[str, str]:
    is_stored = hasattr(dataset, "with_format")
    if is_stored:
        dataset = dataset.with_format("arrow")  # without transforms
        number = max(_MAX_READ, _MAX_BYTES * len(dataset.data) // max(1, dataset.data.nbytes))
    else:
        number = _MAX_READ
    index = range(0, len(dataset), -(-len(dataset) // number))
    first, again = (_columns(dataset, index) for _ in range(2))
    digests = {name: _digest(values) for name, values in first.items()}
    digests = {name: digest for name, digest in digests.items() if digest and digest == _digest(again[name])}
    for name in labels & digests.keys():
        if is_stored:
            pieces = dataset.select_columns([name]).iter(_PIECE)
            digests[name] = _digest(piece.column(name).to_pylist() for piece in pieces)
        elif isinstance(dataset, (list, tuple)):
            digests[name] = _digest(_attributes(row).get(name) for row in dataset)
    return {name: digest for name, digest in digests.items() if digest}


def _columns(dataset: Any, index: range) -> dict[str, list[Any]]:
    if hasattr(dataset, "with_format"):
        return dataset[list(index)].to_pydict()
    rows = [_attributes(dataset[i]) for i in index]
    return {name: [row.get(name) for row in rows] for name in {name for row in rows for name in row}}


def _attributes(example: Any) -> Mapping[str, Any]:
    if isinstance(example, Mapping):
        return {str(name): value for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return {str(i): value for i, value in enumerate(example)}
    return vars(example) if hasattr(example, "__dict__") and not isinstance(example, Tensor) else {"": example}


def _digest(values: Iterable[Any]) -> str | None:
    """Digest of values that are the same in every process; None if there are others."""
    digest = hashlib.sha256()
    try:
        for value in values:
            digest.update(json.dumps(value, default=_encoded).encode())
    except (TypeError, RuntimeError, ValueError):
        return None
    return digest.hexdigest()


def _encoded(value: Any) -> Any:
    """A tensor, an array or an image by its bytes, for JSON."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)  # NumPy has no bfloat16
        return [str(value.dtype), list(value.shape), content.numpy().tobytes().hex()]
    if hasattr(value, "tobytes") and str(getattr(value, "dtype", "")) != "object":
        return [getattr(value, "shape", getattr(value, "size", None)), value.tobytes().hex()]
    if isinstance(value, (bytes, date)):
        return repr(value)
    raise TypeError(type(value).__name__)
