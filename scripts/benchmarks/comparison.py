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


def tasks(runs: Runs, seeds: int = 2) -> list[str]:
    """Tasks with at least two `seeds` of both uniform sampling and ours, fine-tuning first."""
    found = []
    for task in TASKS:
        both = [{run["seed"] for run in of(runs, task, method)} for method in (UNIFORM, OURS)]
        if len(both[0] & both[1]) >= seeds:
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


def is_worse(runs: Runs, task: str, figure: Figure, method: str = OURS) -> bool:
    """Whether a method is worse than uniform sampling with the full budget by more than a standard error."""
    mean, error = mean_and_error(differences(runs, task, method, figure))
    return figure.sign * mean < -error


def is_as_good(runs: Runs, task: str) -> bool:
    """Whether ours is worse in no metric."""
    return not any(is_worse(runs, task, figure) for figure in figures(runs, task))


def saves_steps(runs: Runs, task: str) -> bool:
    """Whether ours takes at least 1 % fewer steps; otherwise the control equals uniform sampling."""
    return share(runs, task, OURS) < 0.99


def is_ahead_of(runs: Runs, task: str, control: str) -> bool:
    """Whether the mean of ours is better in every metric, over the seeds that both have."""
    seeds = {run["seed"] for run in of(runs, task, control)}
    common = [run for run in runs if run["seed"] in seeds]
    return all(
        figure.sign * statistics.mean(differences(common, task, OURS, figure))
        > figure.sign * statistics.mean(differences(common, task, control, figure))
        for figure in figures(runs, task)
    )


def share(runs: Runs, task: str, method: str, what: str = "steps") -> float | None:
    """Mean steps (or `what`) relative to uniform sampling with the full budget; None if they were not counted."""
    ours, uniform = of(runs, task, method), of(runs, task, UNIFORM)
    if not all(what in run for run in ours + uniform):
        return None
    return statistics.mean(run[what] for run in ours) / statistics.mean(run[what] for run in uniform)


def budgets_of(runs: Runs, task: str, method: str) -> list[float]:
    """Budgets at which a method has at least two seeds, ascending."""
    budgets = sorted({run["budget"] for run in runs if (run["task"], run["method"]) == (task, method)})
    return [budget for budget in budgets if len(of(runs, task, method, budget)) > 1]


def share_to_match(runs: Runs, task: str, method: str) -> float:
    """Smallest share of the full budget with which a method is as good, by linear interpolation; infinity if none.

    It is at least the smallest budget of the grid.
    """
    budgets, curves = budgets_of(runs, task, method), []
    for figure in figures(runs, task):
        found = [mean_and_error(differences(runs, task, method, figure, budget)) for budget in budgets]
        curves.append([figure.sign * mean + error for mean, error in found])
    for at in (k / 100 for k in range(101)):
        values = [_interpolated(at, budgets, curve) for curve in curves]
        if all(value is not None and value >= -_ROUNDING for value in values):
            return at
    return math.inf


def difference_at(runs: Runs, task: str, method: str, figure: Figure, at: float) -> float | None:
    """Mean difference to uniform sampling with the full budget, at a share of it; None outside of the budgets run."""
    budgets = budgets_of(runs, task, method)
    values = [statistics.mean(differences(runs, task, method, figure, budget)) for budget in budgets]
    return _interpolated(at, budgets, values)


def compared_rivals(runs: Runs) -> list[str]:
    """Rivals that sample differently; not those that only arrange batches."""
    return [name for name in rivals(runs) if not METHODS[name].by_length]


def has_rivals(runs: Runs, task: str) -> bool:
    """Whether at least one of them was run on the task, with several seeds."""
    return any(budgets_of(runs, task, name) for name in compared_rivals(runs))


def at_same_steps(runs: Runs, task: str) -> dict[str, float]:
    """Mean difference to uniform sampling with the full budget, by method, at the share of the steps that ours took.

    In the first metric of the task, for ours, uniform sampling and rivals with budgets around that share.
    """
    figure, at = figures(runs, task)[0], share(runs, task, OURS)
    found = {OURS: statistics.mean(differences(runs, task, OURS, figure))}
    found |= {name: difference_at(runs, task, name, figure, at) for name in (UNIFORM, *compared_rivals(runs))}
    return {name: value for name, value in found.items() if value is not None}


def best_at_same_steps(runs: Runs, task: str) -> str:
    """The method with the best of these means."""
    found, sign = at_same_steps(runs, task), figures(runs, task)[0].sign
    return max(found, key=lambda name: sign * found[name])


def _interpolated(place: float, places: list[float], values: list[float]) -> float | None:
    """Linear interpolation between points; None outside of them."""
    for (low, before), (high, after) in itertools.pairwise(zip(places, values, strict=True)):
        if low <= place <= high:
            return before + (after - before) * (place - low) / (high - low)
    return values[places.index(place)] if place in places else None


def rivals(runs: Runs) -> list[str]:
    """Methods of others with runs."""
    found = {run["method"] for run in runs}
    return [method for method in METHODS if method in found and method not in OWN]


def best_rival(runs: Runs, task: str) -> tuple[str, float] | None:
    """The rival with the smallest share to be as good, and that share, maybe infinity; None if no rival was run."""
    there = [name for name in rivals(runs) if len(of(runs, task, name)) > 1]
    return min(((name, share_to_match(runs, task, name)) for name in there), key=lambda found: found[1], default=None)


def whole_share(runs: Runs, task: str) -> float:
    """The share of the steps if ours is as good; 1 otherwise, as one would use `Trainer`."""
    return share(runs, task, OURS) if is_as_good(runs, task) else 1.0


def share_of_seconds(seconds: Runs, task: str) -> float | None:
    """Median ratio of seconds over pairs; None without pairs."""
    found = [run["ours"] / run["uniform"] for run in seconds if run["task"] == task]
    return statistics.median(found) if found else None
