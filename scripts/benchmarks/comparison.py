"""Evaluation of the runs of `accuracy`: which methods are as good with fewer steps, and how certain that is.

Everything is relative to `Trainer` with the full budget, "uniform". Differences are paired by seed, because both start
from the same weights. A method is as good if no figure is worse by more than a standard error of the difference.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.results import mean_and_error
from benchmarks.tasks import TASKS

Runs = list[dict[str, Any]]
UNIFORM, OURS = "uniform", "ours"
CONTROLS = ("uniform, as many steps", "uniform, as many, raised")
"""Controls for the effects of fewer steps and of the raised learning rate."""
OF_ALL_STEPS = (UNIFORM, OURS, *CONTROLS, "uniform, grouped", "ours, grouped")
OWN = (UNIFORM, OURS, *CONTROLS, "ours, grouped", "ours, all steps")
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Figure:
    """A figure by which trainings are compared.

    Args:
        name: name in the runs.
        sign: 1 if higher is better, else −1.
        scale: factor to the displayed unit.
        form: format specification.
    """

    name: str
    sign: int
    scale: float
    form: str

    def of(self, run: dict[str, Any]) -> float:
        """Value in a run, in the displayed unit."""
        return self.scale * run[self.name]


FIGURES = (
    Figure("accuracy", 1, 100, ".2f"),
    Figure("cross_entropy", -1, 1, ".3f"),
    Figure("error", -1, 1, ".3g"),
)


# ---- figures of the runs ---------------------------------------------------------------------------------------------


def tasks(runs: Runs) -> list[str]:
    """Tasks with at least two seeds of both uniform sampling and ours, fine-tuning first."""
    found = []
    for task in TASKS:
        both = [{run["seed"] for run in of(runs, task, method)} for method in (UNIFORM, OURS)]
        if len(both[0] & both[1]) > 1:
            found.append(task)
    return found


def of(runs: Runs, task: str, method: str, budget: float = 1.0) -> Runs:
    """Runs of a task, method and budget, in order of the seeds."""
    found = [run for run in runs if (run["task"], run["method"], run["budget"]) == (task, method, budget)]
    return sorted(found, key=lambda run: run["seed"])


def figures(runs: Runs, task: str) -> list[Figure]:
    """Figures by which a task is judged."""
    (first, *_) = of(runs, task, UNIFORM)
    return [figure for figure in FIGURES if figure.name in first]


def differences(runs: Runs, task: str, method: str, figure: Figure, budget: float = 1.0) -> list[float]:
    """Differences to uniform sampling with the full budget, for the seeds that both have."""
    uniform = {run["seed"]: run for run in of(runs, task, UNIFORM)}
    found = [run for run in of(runs, task, method, budget) if run["seed"] in uniform]
    return [figure.of(run) - figure.of(uniform[run["seed"]]) for run in found]


def shortfalls(runs: Runs, task: str, method: str = OURS, budget: float = 1.0) -> list[str]:
    """Figures in which a method is worse than uniform sampling by more than a standard error, with the difference."""
    found = []
    for figure in figures(runs, task):
        mean, error = mean_and_error(differences(runs, task, method, figure, budget))
        if figure.sign * mean < -error:
            found.append(f"{figure.name.replace('_', '-')} {mean:+{figure.form}} ± {error:{figure.form}}")
    return found


def share(runs: Runs, task: str, method: str, what: str = "steps") -> float | None:
    """Mean steps (or `what`) relative to uniform sampling with the full budget; None if they were not counted."""
    ours, uniform = of(runs, task, method), of(runs, task, UNIFORM)
    if not all(what in run for run in ours + uniform):
        return None
    return statistics.mean(run[what] for run in ours) / statistics.mean(run[what] for run in uniform)


def share_to_match(runs: Runs, task: str, method: str) -> float:
    """Smallest share of the full budget with which a method is as good, by linear interpolation; infinity if none.

    It is at least the smallest budget of the grid.
    """
    of_method = [run for run in runs if (run["task"], run["method"]) == (task, method)]
    budgets = sorted({run["budget"] for run in of_method})
    budgets = [budget for budget in budgets if len(of(runs, task, method, budget)) > 1]
    curves = []
    for figure in figures(runs, task):
        found = [mean_and_error(differences(runs, task, method, figure, budget)) for budget in budgets]
        curves.append([figure.sign * mean + error for mean, error in found])
    for at in (k / 100 for k in range(101)):
        if (
            budgets
            and budgets[0] <= at <= budgets[-1]
            and all(_at(at, budgets, curve) >= -_ROUNDING for curve in curves)
        ):
            return at
    return math.inf


def _at(place: float, places: list[float], values: list[float]) -> float:
    """Linear interpolation between points."""
    for (low, before), (high, after) in itertools.pairwise(zip(places, values, strict=True)):
        if low <= place <= high:
            return before + (after - before) * (place - low) / (high - low)
    return values[places.index(place)]


def rivals(runs: Runs) -> list[str]:
    """Methods of others with runs."""
    found = {run["method"] for run in runs}
    return [method for method in METHODS if method in found and method not in OWN]


def best_rival(runs: Runs, task: str) -> tuple[str, float] | None:
    """The rival with the smallest share to be as good, and that share, maybe infinity; None if no rival was run."""
    there = [name for name in rivals(runs) if len(of(runs, task, name)) > 1]
    return min(((name, share_to_match(runs, task, name)) for name in there), key=lambda found: found[1], default=None)


# ---- tables ----------------------------------------------------------------------------------------------------------


def decision_table(runs: Runs, seconds: Runs = ()) -> str:
    """Table with a row per task: results of `Trainer`, cost of ours, and the best rival.

    Args:
        runs: runs of `accuracy`.
        seconds: runs of `seconds`, on an otherwise idle machine.
    """
    head = ("task", "`Trainer` reaches", "ours", "steps", "tokens", "seconds", "best rival")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in tasks(runs):
        reached, changed = [], []
        for figure in figures(runs, task):
            mean, _ = mean_and_error([figure.of(run) for run in of(runs, task, UNIFORM)])
            unit = " %" if figure.scale == 100 else ""
            reached.append(f"{mean:{figure.form}}{unit}")
            mean, error = mean_and_error(differences(runs, task, OURS, figure))
            changed.append(f"{mean:+{figure.form}} ± {error:{figure.form}}")
        rival = best_rival(runs, task)
        cells = [
            f"**{task}**: {TASKS[task].what}",
            ", ".join(reached),
            ", ".join(changed) + ("" if not shortfalls(runs, task) else " (short)"),
            _percent(share(runs, task, OURS)),
            _percent(share(runs, task, OURS, "tokens")),
            _percent(share_of_seconds(seconds, task)),
            "" if rival is None else "none" if math.isinf(rival[1]) else f"{_percent(rival[1])} ({rival[0]})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def share_of_seconds(seconds: Runs, task: str) -> float | None:
    """Median ratio of seconds over pairs; None without pairs."""
    found = [run["ours"] / run["uniform"] for run in seconds if run["task"] == task]
    return statistics.median(found) if found else None


def claims(runs: Runs) -> str:
    """One paragraph: mean share of the steps, and number of tasks without a loss of quality."""
    names = tasks(runs)
    if not names:
        return ""
    shares = {task: share(runs, task, OURS) for task in names}
    tuned = [shares[task] for task in names if TASKS[task].fine_tuning]
    short = {task: found for task in names if (found := shortfalls(runs, task))}
    text = (
        f"With nothing set, training took {100 * statistics.mean(shares.values()):.0f} % of the steps in the mean over "
        f"{len(names)} tasks, from {_percent(min(shares.values()))} ({min(shares, key=shares.get)}) to "
        f"{_percent(max(shares.values()))} ({max(shares, key=shares.get)})"
    )
    if tuned:
        text += f"; {100 * statistics.mean(tuned):.0f} % in the mean over the {len(tuned)} that fine-tune"
    text += (
        f". On {len(names) - len(short)} of them no figure was worse than with all steps of `Trainer` by more than a "
        "standard error of the difference"
    )
    if short:
        text += "; on the others it was: " + "; ".join(f"{task} ({', '.join(found)})" for task, found in short.items())
    return text + "." + _ahead(runs)


def _ahead(runs: Runs) -> str:
    """A sentence on the comparison with the control with as many steps."""
    both = [task for task in tasks(runs) if of(runs, task, CONTROLS[0])]
    if not both:
        return ""

    def is_ahead(task: str) -> bool:
        return all(
            figure.sign * statistics.mean(differences(runs, task, OURS, figure))
            > figure.sign * statistics.mean(differences(runs, task, CONTROLS[0], figure))
            for figure in figures(runs, task)
        )

    number = sum(map(is_ahead, both))
    return f" `Trainer` with a schedule of as many steps was behind it in every figure on {number} of {len(both)}."


def whole_table(runs: Runs) -> str:
    """Table of results ± standard errors of the methods that run with the full budget."""
    head = ("task", "method", "seeds", "steps", "tokens", "accuracy, % / error", "cross-entropy", "scaled", "written")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in tasks(runs):
        for method in OF_ALL_STEPS:
            found = of(runs, task, method)
            if not found:
                continue
            (first, *_) = found
            cells = [task, method, str(len(found)), _percent(share(runs, task, method))]
            cells.append(_percent(share(runs, task, method, "tokens")))
            cells.append(_mean(found, "accuracy", ".2f", 100) if "accuracy" in first else _mean(found, "error", ".3g"))
            cells += [_mean(found, name, ".3f") for name in ("cross_entropy", "scaled_cross_entropy")]
            cells.append(_mean(found, "written", ".2f"))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(runs: Runs, figure: str, form: str, scale: float = 1.0) -> str:
    if figure not in runs[0]:
        return ""
    mean, error = mean_and_error([scale * run[figure] for run in runs])
    return f"{mean:{form}}" if math.isnan(error) else f"{mean:{form}} ± {error:{form}}"


def match_table(runs: Runs) -> str:
    """Table of the share of the full budget with which each method is as good; "never" counts as 1 in the mean."""
    found = {run["method"] for run in runs}
    names = [method for method in METHODS if method in found & {UNIFORM, "ours, all steps", *rivals(runs)}]
    lines = ["| task | ours | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    columns: dict[str, list[float]] = {OURS: [], **{name: [] for name in names}}
    for task in tasks(runs):
        columns[OURS].append(math.inf if shortfalls(runs, task) else share(runs, task, OURS))
        for name in names:
            there = any((run["task"], run["method"]) == (task, name) for run in runs)
            columns[name].append(share_to_match(runs, task, name) if there else math.nan)
        lines.append(f"| {task} | " + " | ".join(_share(found[-1]) for found in columns.values()) + " |")
    if not columns[OURS]:
        return "\n".join(lines)
    means = [statistics.mean(min(x, 1.0) for x in found if not math.isnan(x)) for found in columns.values()]
    lines.append("| mean | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines)


def _share(value: float) -> str:
    return "" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.2f}"


def figures_table(runs: Runs) -> str:
    """Table by task, method and budget: accuracy ± standard error in percent (cross-entropy), or squared error."""
    budgets = sorted({run["budget"] for run in runs})
    lines = ["| task | method | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " |"]
    lines.append("|" + "---|" * (2 + len(budgets)))
    for task in tasks(runs):
        for method in [name for name in METHODS if not METHODS[name].whole]:
            rows = [of(runs, task, method, budget) for budget in budgets]
            if any(rows):
                lines.append(f"| {task} | {method} | " + " | ".join(map(_cell, rows)) + " |")
    return "\n".join(lines)


def _cell(runs: Runs) -> str:
    if not runs:
        return ""
    if "error" in runs[0]:
        return _mean(runs, "error", ".3g")
    return f"{_mean(runs, 'accuracy', '.2f', 100)} ({statistics.mean(run['cross_entropy'] for run in runs):.3f})"
