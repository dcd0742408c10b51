"""Accuracy of trainings: tasks × methods × budgets × seeds. See `comparison` for the evaluation of the runs.

Budget 1 is the full training of a task; budget 0.7 has 70 % of the steps, with the learning rate decaying to zero
within them. The learning rate was tuned for uniform sampling and is the same for all methods.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from transformers import set_seed

from benchmarks.methods import METHODS
from benchmarks.task import Rows, Task, predict
from benchmarks.tasks import task_of

KEYS = ("task", "method", "budget", "seed")


def run(
    task_name: str, method: str, budget: float, seed: int, steps_taken: Mapping[tuple[Any, ...], int] | None = None
) -> dict[str, Any]:
    """Train once and evaluate. `steps_taken` has the number of steps of other runs, by the values of `KEYS`."""
    task, same = task_of(task_name), METHODS[method].as_long_as
    steps = METHODS[method].steps(task, budget) if same is None else (steps_taken or {})[task_name, same, budget, seed]
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = METHODS[method].trainer(task, steps, seed, folder)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logs = [log for log in trainer.state.log_history if "importance/pruned" in log]
    found = {"steps": trainer.state.global_step, "seconds": round(seconds, 2), **tokens(trainer.train_dataset)}
    found |= evaluate(trainer.model, task)
    if logs:
        found["pruned"] = round(logs[-1]["importance/pruned"], 4)
        found["floor"] = logs[-1]["importance/uniform_fraction"]
        ratios = [log["importance/variance_ratio"] for log in logs[1:] if "importance/variance_ratio" in log]
        if ratios:
            found["variance_ratio"] = round(statistics.mean(ratios), 4)
    return found


def settings(key: str, value: Any) -> dict[str, Any] | None:
    """The settings of a task or a method."""
    if key == "task":
        task = task_of(value)
        kept = ("examples", "epochs", "batch", "learning_rate", "weight_decay", "bf16")
        return {name: getattr(task, name) for name in kept}
    return METHODS[value].description() if key == "method" else None


def tokens(rows: Rows) -> dict[str, int]:
    """Number of tokens in training, without and with padding; empty if examples are not texts."""
    return {"tokens": rows.real, "padded_tokens": rows.padded} if rows.padded else {}


def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """Accuracy and cross-entropies on the test data, or the mean squared error; a higher `score` is better."""
    outputs, labels = predict(model, task.test, task.shifts)
    outputs = outputs.double()
    if not task.classes:
        error = nn.functional.mse_loss(outputs.flatten(), labels.double()).item()
        return {"error": error, "score": -error}
    found = {
        "accuracy": (outputs.argmax(1) == labels).double().mean().item(),
        "cross_entropy": nn.functional.cross_entropy(outputs, labels).item(),
        "scaled_cross_entropy": scaled_cross_entropy(outputs, labels),
    }
    return found | {"score": found["accuracy"]} | (task.also(model) if task.also else {})


def scaled_cross_entropy(outputs: Tensor, labels: Tensor) -> float:
    """Cross-entropy after temperature scaling (Guo et al. 2017), which ignores differences in confidence.

    Each half of the data is scaled by the temperature, in [1/20, 20], that is best for the other half.

    Args:
        outputs: `[examples, classes]`.
        labels: `[examples]`.
    """
    halves = [(outputs[start::2], labels[start::2]) for start in (0, 1)]

    def loss(half: tuple[Tensor, Tensor], logarithm: float) -> float:
        return nn.functional.cross_entropy(half[0] / math.exp(logarithm), half[1]).item()

    limit = math.log(20)
    found = [minimize_scalar(lambda x, half=half: loss(half, x), bounds=(-limit, limit)).x for half in halves]
    sizes = [len(half[1]) for half in halves]
    return sum(n * loss(half, x) for n, half, x in zip(sizes, halves, reversed(found), strict=True)) / sum(sizes)
