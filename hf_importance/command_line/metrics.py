"""Metrics of `evaluate`, computed with scikit-learn, because `evaluate.load` would download code from the Hub."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from transformers import EvalPrediction


class SingleLabel(evaluate.Metric):
    """Accuracy and macro F1."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(datasets.Value("int64"))

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {
            "accuracy": accuracy_score(references, predictions),
            "f1": f1_score(references, predictions, average="macro", zero_division=0),
        }


class MultiLabel(evaluate.Metric):
    """Accuracy (share of examples with all labels correct) and micro F1."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(datasets.Sequence(datasets.Value("int64")))

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        return {
            "accuracy": accuracy_score(references, predictions),
            "f1": f1_score(references, predictions, average="micro", zero_division=0),
        }


class Regression(evaluate.Metric):
    """Mean squared error and Pearson correlation (0 if predictions or labels are constant)."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(datasets.Value("float64"))

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
        return {
            "mse": mean_squared_error(references, predictions),
            "pearson": 0.0 if constant else float(np.corrcoef(predictions, references)[0, 1]),
        }


def metric_for(problem_type: str, name: str | None = None) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of `Trainer`: the metric `name` of `evaluate`, or else one for the `problem_type`."""
    default = {
        "single_label_classification": SingleLabel,
        "multi_label_classification": MultiLabel,
        "regression": Regression,
    }[problem_type]
    metric = default() if name is None else evaluate.load(name)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=decide(prediction.predictions, problem_type), references=prediction.label_ids)

    return compute


def decide(logits: np.ndarray | tuple[np.ndarray, ...], problem_type: str) -> np.ndarray:
    """Convert logits to classes, to 0 or 1 for each label, or to numbers, by `problem_type`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    if problem_type == "single_label_classification":
        return logits.argmax(-1)
    return (logits > 0).astype(int) if problem_type == "multi_label_classification" else logits.squeeze(-1)


def _info(value: object) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": value, "references": value})
    return evaluate.MetricInfo(description="", citation="", features=features)
