"""Labels of classification and regression: columns, names and ids, and predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import datasets
from transformers import Trainer

from hf_importance.command_line.arguments import LabelArguments
from hf_importance.command_line.data_files import require_column
from hf_importance.command_line.metrics import decide, metric_for


def label_column(chosen: dict[str, datasets.Dataset], data: LabelArguments) -> str | None:
    """The column with the labels; None if there is only data for `--do_predict`, which does not need labels.

    Raises:
        ValueError: if there is no such column.
    """
    defaults, flag = ("label", "labels"), "--label_column_name"
    found = [
        require_column(rows, data.label_column_name, defaults, flag)
        for use, rows in chosen.items()
        if use != "predict" or data.label_column_name in rows.column_names or {*defaults} & {*rows.column_names}
    ]
    return found[0] if found else None


def drop_missing_labels(chosen: dict[str, datasets.Dataset], label: str | None) -> dict[str, datasets.Dataset]:
    """Remove the labels of the data for `--do_predict` if any is missing (empty, or −1 as in many test sets).

    Raises:
        ValueError: if a label is missing in the data for training or evaluation.
    """
    kept = {}
    for use, rows in chosen.items():
        if label in rows.column_names and any(value in (None, -1) for value in _labels_of(rows, label)):
            if use != "predict":
                raise ValueError(f"The {use} data has rows without a label in the column {label!r}: remove these rows.")
            rows = rows.remove_columns(label)
        kept[use] = rows
    return kept


def _labels_of(rows: datasets.Dataset, label: str) -> set[Any]:
    """The distinct labels, None for a missing one; classes as ids. −1 is only a missing label for classes."""
    values, feature = rows.with_format(None)[label], rows.features[label]
    if isinstance(feature, datasets.List):
        return {value for row in values for value in (row if row is not None else [None])}
    missing = (None, -1) if isinstance(feature, datasets.ClassLabel) else (None,)
    return {None if value in missing else value for value in values}


def label_names(chosen: dict[str, datasets.Dataset], label: str) -> list[str]:
    """Names of the labels in the order of their ids, from the features of the dataset, or else sorted."""
    feature = chosen["train"].features[label]
    feature = feature.feature if isinstance(feature, datasets.List) else feature
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    return [str(value) for value in sorted(_labels_of(chosen["train"], label))]


def label_reader(rows: datasets.Dataset, label: str, label2id: dict[str, int]) -> Callable[[Any], int]:
    """A function from a label in the data to its id in the model.

    Labels are identified by name. An integer that is not a name is used as the id, for models whose labels are unnamed
    (LABEL_0, …).

    Args:
        rows: the data.
        label: the column with the labels.
        label2id: ids of the labels by name, from the config of the model.

    Returns:
        The function. It raises a ValueError for a label that the model does not have.
    """
    feature = rows.features[label]
    feature = feature.feature if isinstance(feature, datasets.List) else feature
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def read(value: Any) -> int:
        name = str(value) if names is None else names[value]
        if name in label2id:
            return label2id[name]
        if isinstance(value, int) and 0 <= value < len(label2id):
            return value
        raise ValueError(
            f"The column {label!r} has the label {name!r}, but the model only has the labels {list(label2id)[:20]}: "
            "remove these rows, or train on data with this label."
        )

    return read


def head_settings(names: list[str], problem_type: str) -> dict[str, Any]:
    """Settings of the labels in the config of a model."""
    return {
        "num_labels": len(names),
        "label2id": {name: number for number, name in enumerate(names)},
        "id2label": dict(enumerate(names)),
        "problem_type": problem_type,
    }


def settings_for_labels(problem_type: str, metric_name: str | None) -> dict[str, Any]:
    """Arguments of [`fine_tuning.run`] for data with labels."""
    return {
        "predict": functools.partial(_predict, problem_type=problem_type),
        "compute_metrics": metric_for(problem_type, metric_name),
        "loss_is_scaled_for_ga": False,  # else accumulation multiplies the gradient (transformers issue 47688)
    }


def _predict(
    trainer: Trainer, rows: datasets.Dataset, problem_type: str
) -> tuple[list[str | list[str] | float], dict[str, float]]:
    """Predict the class, the list of labels, or the number of each example, and compute the metrics."""
    output = trainer.predict(rows, metric_key_prefix="predict")
    names, decisions = trainer.model.config.id2label, decide(output.predictions, problem_type).tolist()
    if problem_type == "single_label_classification":
        decisions = [names[k] for k in decisions]
    elif problem_type == "multi_label_classification":
        decisions = [[names[k] for k, present in enumerate(row) if present] for row in decisions]
    return decisions, output.metrics
