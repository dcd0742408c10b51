"""Tables of the report: examples, classes, confusions, and how they are written."""

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_importance.report.duplicates import Conflict
from hf_importance.report.findings import Findings
from hf_importance.report.texts import cut, readable

_MAX_CLASSES = 1000  # maximum number of classes that are listed
_LABELS = 10  # labels shown per group of duplicates
_FORMULA = ("=", "+", "-", "@")  # prefixes that spreadsheets interpret as a formula


def examples_table(findings: Findings) -> pd.DataFrame:
    """One row per training example, in order; null where unknown."""
    columns = {name: column.numpy() for name, column in findings.columns.items()}
    table = pd.DataFrame({"index": np.arange(len(findings))})
    for name in ("label", "prediction"):
        table[name] = _whole(columns[name]) if findings.is_classification else columns[name]
    if findings.is_classification and findings.label_names:
        for name in ("label", "prediction"):
            names = {number: findings.name_of(number) for number in table[name].dropna().unique()}
            table[f"{name}_name"] = table[name].map(names)
    for name in ("probability", "loss", "mean_loss"):
        table[name] = columns[name]
    suspects = columns["suspect"] if findings.is_classification else [None] * len(findings)
    table["suspect"] = pd.array(suspects, "boolean")
    for name in ("importance", "visits", "pruned"):
        table[name] = columns[name]
    return table


def _whole(numbers: np.ndarray) -> pd.api.extensions.ExtensionArray:
    return pd.arrays.IntegerArray(np.nan_to_num(numbers).astype(np.int64), np.isnan(numbers))


def classes_table(findings: Findings) -> pd.DataFrame:
    """Figures of the examples with each label, most suspects first; empty if examples have no single label.

    Its columns are the name of the class, the number of `examples`, their mean `importance`, `relative_visits` (per
    example, relative to all examples), the number of `suspects`, and the `mean_loss` over the visits.
    """
    if not findings.is_classification:
        return pd.DataFrame()
    columns = ("label", "importance", "visits", "suspect", "mean_loss")
    table = pd.DataFrame({name: findings.columns[name].numpy() for name in columns}).replace([np.inf, -np.inf], np.nan)
    table = table.groupby("label").agg(
        examples=("visits", "size"),
        importance=("importance", "mean"),
        relative_visits=("visits", "mean"),
        suspects=("suspect", "sum"),
        mean_loss=("mean_loss", "mean"),
    )
    table["relative_visits"] *= len(findings) / max(findings.visits, 1)
    table.insert(0, "name", [findings.name_of(label) for label in table.index])
    return table.sort_values(["suspects", "mean_loss"], ascending=False).head(_MAX_CLASSES)


def confusions(findings: Findings, number: int) -> list[tuple[str, str, int]]:
    """Label, prediction and number of suspects, most frequent pairs first."""
    columns = ("label", "prediction", "suspect")
    table = pd.DataFrame({name: findings.columns[name].numpy() for name in columns})
    table = table[table["suspect"] & (table["label"] != table["prediction"])]
    counts = table.groupby(["label", "prediction"]).size().sort_values(ascending=False, kind="stable")
    return [(findings.name_of(a), findings.name_of(b), n) for (a, b), n in counts.head(number).items()]


def conflicts_table(findings: Findings, conflicts: Sequence[Conflict]) -> pd.DataFrame:
    """Number of the group, position and label of each example of the conflicts."""
    rows = [
        (group, index, findings.name_of(label))
        for group, conflict in enumerate(conflicts)
        for index, label in zip(conflict.index, conflict.labels, strict=True)
    ]
    return pd.DataFrame(rows, columns=["group", "index", "label"])


def shown_conflict(findings: Findings, conflict: Conflict) -> dict[str, Any]:
    """Text of a conflict, and the examples with each label."""
    of_label: dict[float, list[int]] = {}
    for i, label in zip(conflict.index, conflict.labels, strict=True):
        of_label.setdefault(label, []).append(i)
    first = {findings.name_of(label): index for label, index in list(of_label.items())[:_LABELS]}
    return {"text": cut(readable(conflict.text), 200), "labels": first, "more": max(0, len(of_label) - _LABELS)}


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a csv file with escaped formulas; without rows, remove the file of an earlier report."""
    path.unlink(missing_ok=True)
    if len(table):
        table.map(_escape_formula).to_csv(path, index=False, quoting=csv.QUOTE_ALL, errors="replace")


def _escape_formula(cell: Any) -> Any:
    """Prepend an apostrophe to cells that a spreadsheet would evaluate, except numbers.

    >>> _escape_formula("=1+1"), _escape_formula("-1.5")
    ("'=1+1", '-1.5')
    """
    if not isinstance(cell, str) or not cell.strip().startswith(_FORMULA):
        return cell
    with contextlib.suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"
