"""Labels of classification and regression: their column, names and numbers, and what the model makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import datasets
from transformers import Trainer

from hf_importance.command_line.arguments import LabelArguments
from hf_importance.command_line.data_sets import require_column
from hf_importance.command_line.metrics import decide, metric_for


def label_column(chosen: dict[str, datasets.Dataset], data: LabelArguments) -> str | None:
    """The column with the labels. The data for --do_predict need not have one: None if there is no other data."""
    usual, name_of_flag = ("label", "labels"), "--label_column_name"
    found = [
        require_column(rows, data.label_column_name, usual, name_of_flag)
        for use, rows in chosen.items()
        if use != "predict" or data.label_column_name in rows.column_names or {*usual} & {*rows.column_names}
    ]
    return found[0] if found else None


def drop_missing_labels(chosen: dict[str, datasets.Dataset], label: str | None) -> dict[str, datasets.Dataset]:
    """Without the labels of the data to predict, if some are missing there (empty, or −1 as in many test sets).

    Raises:
        ValueError: if a label is missing elsewhere.
    """
    kept = {}
    for use, rows in chosen.items():
        if label in rows.column_names and any(value in (None, -1) for value in _labels_of(rows, label)):
            if use != "predict":
                raise ValueError(f"The {use} data has rows without a label in the column {label!r}: remove them.")
            rows = rows.remove_columns(label)
        kept[use] = rows
    return kept


def _labels_of(rows: datasets.Dataset, label: str) -> set[Any]:
    """All different ones. Class labels are numbers here; a number that is no class may be −1."""
    values, feature = rows.with_format(None)[label], rows.features[label]
    if isinstance(feature, datasets.List):
        return {value for row in values for value in (row if row is not None else [None])}
    missing = (None, -1) if isinstance(feature, datasets.ClassLabel) else (None,)
    return {None if value in missing else value for value in values}


def label_names(chosen: dict[str, datasets.Dataset], label: str) -> list[str]:
    """The labels, in the order of their numbers: those of the data set if it knows them, else of the training data."""
    feature = chosen["train"].features[label]
    feature = feature.feature if isinstance(feature, datasets.List) else feature
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    return [str(value) for value in sorted(_labels_of(chosen["train"], label))]


def label_reader(rows: datasets.Dataset, label: str, numbers: dict[str, int]) -> Callable[[Any], int]:
    """From a label as the data has it to its number in the model, whose `label2id` is `numbers`.

    Labels are known by their names. Whole numbers are also taken as they are, for models whose labels have no names of
    their own (LABEL_0, …).
    """
    feature = rows.features[label]
    feature = feature.feature if isinstance(feature, datasets.List) else feature
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def read(value: Any) -> int:
        name = str(value) if names is None else names[value]
        if name in numbers:
            return numbers[name]
        if isinstance(value, int) and 0 <= value < len(numbers):
            return value
        raise ValueError(f"The column {label!r} has the label {name!r}, but the model only knows {list(numbers)[:20]}.")

    return read


def head_settings(names: list[str], problem_type: str) -> dict[str, Any]:
    """What the config of a model says of its labels."""
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "num_labels": len(names),
        "label2id": numbers,
        "id2label": dict(enumerate(names)),
        "problem_type": problem_type,
    }


def settings_for_labels(problem_type: str, metric_name: str | None) -> dict[str, Any]:
    """How labels are trained, evaluated and predicted: arguments of `run`."""
    return {
        "predict": functools.partial(_predict, problem_type=problem_type),
        "compute_metrics": metric_for(problem_type, metric_name),
        "loss_is_scaled_for_ga": False,  # transformers issue 47688: else accumulation multiplies the step
    }


def _predict(
    trainer: Trainer, rows: datasets.Dataset, problem_type: str
) -> tuple[list[str | list[str] | float], dict[str, float]]:
    """For each row the name of its class, those of the labels it has, or its number; and the metrics."""
    output = trainer.predict(rows, metric_key_prefix="predict")
    names, decisions = trainer.model.config.id2label, decide(output.predictions, problem_type).tolist()
    if problem_type == "single_label_classification":
        decisions = [names[k] for k in decisions]
    elif problem_type == "multi_label_classification":
        decisions = [[names[k] for k, present in enumerate(row) if present] for row in decisions]
    return decisions, output.metrics
