"""What comes of a budget: tasks × methods × budgets × seeds.

Budget 1 is the full training of a task; with 0.5 there are half of the steps, in which the learning rate decays to zero
as well. The learning rate was tuned for uniform sampling and is the same for all.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from transformers import set_seed

from benchmarks.methods import METHODS
from benchmarks.results import digest, grouped, mean_and_error
from benchmarks.tasks import Task, predict, task_of

KEYS = ("task", "method", "budget", "seed")
BUDGETS = (0.3, 0.5, 0.7, 1.0, 1.5)
_RESAMPLES = 1000
_COLOURS = {"uniform": "#6b7280", "ours, all steps": "#d1495b"}


def run(
    task_name: str, method: str, budget: float, seed: int, steps_taken: Mapping[tuple[Any, ...], int] | None = None
) -> dict[str, Any]:
    """Train once; what came of it. `steps_taken` has the steps of other methods, by the values of `KEYS`."""
    task, same = task_of(task_name), METHODS[method].as_long_as
    steps = METHODS[method].steps(task, budget) if same is None else (steps_taken or {})[task_name, same, budget, seed]
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = METHODS[method].trainer(task, steps, seed, folder)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logs = [log for log in trainer.state.log_history if "importance/pruned" in log]
    found = {"steps": trainer.state.global_step, "seconds": round(seconds, 2), **evaluate(trainer.model, task)}
    if logs:
        found["pruned"] = round(logs[-1]["importance/pruned"], 4)
        found["floor"] = logs[-1]["importance/uniform_fraction"]
        ratios = [log["importance/variance_ratio"] for log in logs[1:] if "importance/variance_ratio" in log]
        if ratios:
            found["variance_ratio"] = round(statistics.mean(ratios), 4)
    return found


def settings(key: str, value: Any) -> dict[str, Any] | None:
    """What a task or a method of a run stands for."""
    if key == "task":
        task = task_of(value)
        kept = ("epochs", "batch", "learning_rate", "weight_decay", "bf16")
        return {"examples": len(task.train["labels"]), **{name: getattr(task, name) for name in kept}}
    return METHODS[value].description() if key == "method" else None


def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """Of the test data: accuracy and cross-entropies, or the mean squared error; `score` is what should be high."""
    outputs, labels = predict(model, task.test).double(), task.test["labels"]
    if not task.classes:
        error = nn.functional.mse_loss(outputs.flatten(), labels.double()).item()
        return {"error": error, "score": -error}
    accuracy = (outputs.argmax(1) == labels).double().mean().item()
    return {
        "accuracy": accuracy,
        "cross_entropy": nn.functional.cross_entropy(outputs, labels).item(),
        "scaled_cross_entropy": scaled_cross_entropy(outputs, labels),
        "score": accuracy,
    }


def scaled_cross_entropy(outputs: Tensor, labels: Tensor) -> float:
    """Cross-entropy after temperature scaling (Guo et al. 2017): whether what is lost is confidence only.

    Each half of the data is divided by the temperature, in [1/20, 20], that is best for the other half.

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


# ---- compute to match ------------------------------------------------------------------------------------------------


def budget_to_reach(curve: dict[float, float], target: float) -> float:
    """The least budget at which the line through the points reaches the target; infinity if it never does."""
    points = sorted(curve.items())
    if points[0][1] >= target:
        return points[0][0]
    for (low, before), (high, after) in itertools.pairwise(points):
        if after >= target:
            return low + (high - low) * (target - before) / (after - before)
    return float("inf")


def compute_to_match(runs: list[dict[str, Any]], task: str, method: str) -> tuple[float, float, float] | None:
    """The share of uniform's full budget at which the method is as good; with the 5 % and 95 % of a bootstrap.

    The least budget of the grid is as low as it can tell. The bootstrap draws seeds, the same for both. None without
    runs of uniform at budget 1 or of the method.
    """
    scores = grouped([found for found in runs if found["task"] == task], "score", ("method", "budget"))
    target = scores.get(("uniform", 1.0), [])
    curve = {budget: values for (name, budget), values in scores.items() if name == method}
    if not target or not curve:
        return None
    seeds = min(len(target), *map(len, curve.values()))
    rng = random.Random(0)

    def reached(chosen: list[int]) -> float:
        means = {budget: statistics.mean(values[i] for i in chosen) for budget, values in curve.items()}
        return budget_to_reach(means, statistics.mean(target[i] for i in chosen))

    drawn = sorted(reached(rng.choices(range(seeds), k=seeds)) for _ in range(_RESAMPLES))
    return reached(list(range(seeds))), drawn[_RESAMPLES // 20], drawn[-_RESAMPLES // 20]


# ---- tables and plot -------------------------------------------------------------------------------------------------


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown: compute to match, mean ranks, and the figures of uniform and ours; of equal budgets."""
    runs = of_equal_budgets(runs)
    ours = [found for found in runs if found["method"] in _COLOURS]
    return "\n\n".join([match_table(runs), rank_table(runs), figures_table(ours)])


def of_equal_budgets(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the methods that end when they have learnt enough."""
    return [found for found in runs if found["method"] not in METHODS or not METHODS[found["method"]].whole]


def figures_table(runs: list[dict[str, Any]]) -> str:
    """For each task, method and budget: accuracy ± standard error (cross-entropy) in percent, or the squared error."""
    budgets = sorted({found["budget"] for found in runs})
    lines = ["| task | method | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " |"]
    lines.append("|" + "---|" * (2 + len(budgets)))
    for task in _in_order(runs, "task"):
        for method in _methods(runs):
            same = [found for found in runs if (found["task"], found["method"]) == (task, method)]
            if same:
                cells = [_cell([found for found in same if found["budget"] == budget]) for budget in budgets]
                lines.append(f"| {task} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    if "error" in runs[0]:
        mean, error = mean_and_error([found["error"] for found in runs])
        return f"{mean:.3g} ± {error:.1g}"
    mean, error = mean_and_error([found["accuracy"] for found in runs])
    entropy = statistics.mean(found["cross_entropy"] for found in runs)
    return f"{100 * mean:.2f} ± {100 * error:.2f} ({entropy:.3f})"


def details(runs: list[dict[str, Any]]) -> str:
    """Markdown: the figures of all methods, and what they took."""
    return "\n\n".join([figures_table(runs), seconds_table(runs)]) + "\n"


def seconds_table(runs: list[dict[str, Any]]) -> str:
    """Median seconds of a training with budget 1. They were not run alone: read no small difference out of it."""
    tasks = _in_order(runs, "task")
    lines = ["| seconds, budget 1 | " + " | ".join(tasks) + " |", "|" + "---|" * (1 + len(tasks))]
    seconds = grouped([found for found in runs if found["budget"] == 1.0], "seconds", ("task", "method"))
    for method in _methods(runs):
        cells = [f"{statistics.median(found):.1f}" if (found := seconds[task, method]) else "" for task in tasks]
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def match_table(runs: list[dict[str, Any]]) -> str:
    """Compute to match, with its interval."""
    tasks = _in_order(runs, "task")
    lines = ["| method | " + " | ".join(tasks) + " |", "|" + "---|" * (1 + len(tasks))]
    for method in _methods(runs):
        cells = []
        for task in tasks:
            found = compute_to_match(runs, task, method)
            cells.append("" if found is None else f"{_share(found[0])} ({_share(found[1])}–{_share(found[2])})")
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(value: float) -> str:
    return "never" if value == float("inf") else f"{value:.2f}"


def _methods(runs: list[dict[str, Any]]) -> list[str]:
    """Those that there are runs of; also of versions before this one."""
    found = _in_order(runs, "method")
    return [method for method in METHODS if method in found] + [method for method in found if method not in METHODS]


def _in_order(runs: list[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(found[name] for found in runs))


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, or error, against budget: a panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    source, runs = digest(runs), of_equal_budgets(runs)
    tasks = _in_order(runs, "task")
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for panel, task in zip(panels.flat, tasks, strict=False):
        of_task = [found for found in runs if found["task"] == task]
        figure_name = "error" if "error" in of_task[0] else "accuracy"
        values = grouped(of_task, figure_name, ("method", "budget"))
        for i, method in enumerate(_methods(runs)):
            points = {budget: mean_and_error(found) for (name, budget), found in values.items() if name == method}
            if points:
                budgets = sorted(points)
                mean, error = zip(*(points[budget] for budget in budgets), strict=True)
                emphasis = method in _COLOURS
                style = {"color": _COLOURS.get(method, f"C{i}"), "linewidth": 2.2 if emphasis else 0.9, "marker": "."}
                panel.errorbar(budgets, mean, error, label=method, alpha=1.0 if emphasis else 0.6, **style)
        panel.set(title=task, xlabel="budget", ylabel=f"test {figure_name}")
        if figure_name == "error":
            panel.set_yscale("log")
        panel.grid(alpha=0.25)
    for panel in panels.flat[len(tasks) :]:
        panel.set_axis_off()
    most = max(panels.flat, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    figure.legend(*most.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Source": source})
    plt.close(figure)


def rank_table(runs: list[dict[str, Any]]) -> str:
    """For each method and budget the mean rank over the tasks, 1 is best; of tasks that all methods have runs of."""
    scores = grouped(runs, "score", KEYS[:3])
    budgets = sorted({found["budget"] for found in runs})
    methods = _methods(runs)
    ranks: dict[tuple[str, float], list[int]] = defaultdict(list)
    for task, budget in itertools.product(_in_order(runs, "task"), budgets):
        means = {m: statistics.mean(scores[task, m, budget]) for m in methods if (task, m, budget) in scores}
        if len(means) == len(methods):
            for rank, method in enumerate(sorted(means, key=means.__getitem__, reverse=True), 1):
                ranks[method, budget].append(rank)
    lines = ["| mean rank | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " |"]
    lines.append("|" + "---|" * (1 + len(budgets)))
    for method in methods:
        cells = [f"{statistics.mean(found):.1f}" if (found := ranks[method, budget]) else "" for budget in budgets]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
