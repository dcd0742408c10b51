"""Runs of `fine_tuning` and `networks` paired by seed with those of `Trainer`, and means over tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from benchmarks.fine_tuning import RECIPES
from benchmarks.fine_tuning_methods import AS_MANY_SECONDS, METHODS, OURS, UNIFORM, share_of_seconds
from benchmarks.fine_tuning_tasks import ENCODERS
from benchmarks.networks import NETWORKS
from benchmarks.results import mean_and_error

Runs = Sequence[dict[str, Any]]
_SETTING = ("task", "layers", "examples", "epochs")
_ONE_ERROR = 0.16
"""Probability of a normal variable to be below minus one standard deviation."""
LOOKED_AT = "constants of selective backward were chosen with these tasks in view"
UNTOUCHED = "not looked at when they were chosen"


@dataclass(frozen=True)
class Pairs:
    """Trainings of `Trainer` and of a method in one setting, by the seeds that both have.

    Args:
        task: name of the task.
        layers: layers of the model.
        examples: training examples.
        epochs: epochs.
        method: name of the method.
        runs: run of `Trainer` and run of the method, for each seed.
    """

    task: str
    layers: int
    examples: int
    epochs: int
    method: str
    runs: list[tuple[dict[str, Any], dict[str, Any]]]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What is the same for all methods."""
        return self.task, self.layers, self.examples, self.epochs

    @property
    def what(self) -> str:
        """The task in words."""
        recipe = RECIPES[self.task]
        return f"{recipe.what}; {ENCODERS[recipe.encoder]}" if recipe.encoder else recipe.what

    @property
    def metric(self) -> str:
        """By which the task is judged: accuracy, or F1 where entities are found."""
        return "f1" if "f1" in self.runs[0][0] else "accuracy"

    @property
    def ratios(self) -> list[float]:
        """Seconds relative to `Trainer`; where `Trainer` itself makes fewer steps, these."""
        if METHODS[self.method].as_long_as is not None:
            return [run["share_of_steps"] for _, run in self.runs]
        return [share_of_seconds(uniform, run) for uniform, run in self.runs]

    @property
    def points(self) -> list[float]:
        """Differences to `Trainer` in accuracy or F1, in points."""
        return [100 * value for value in self.differences(self.metric)]

    def differences(self, figure: str) -> list[float]:
        """Differences to `Trainer`."""
        return [ours[figure] - uniform[figure] for uniform, ours in self.runs]

    def mean(self, figure: str, of_ours: bool = True) -> float:
        """Mean over seeds of a figure, of the method or of `Trainer`."""
        return statistics.mean(pair[of_ours][figure] for pair in self.runs)


def pairs(runs: Runs, methods: Iterable[str] = METHODS) -> list[Pairs]:
    """The pairs of all settings, in the order of the tasks; without settings where one of both was not run."""
    settings: dict[tuple[Any, ...], dict[str, dict[int, Any]]] = {}
    for run in runs:
        of_setting = settings.setdefault(tuple(run[name] for name in _SETTING), {})
        of_setting.setdefault(run["method"], {})[run["seed"]] = run
    listed = []
    for setting, found in sorted(settings.items(), key=lambda item: (list(RECIPES).index(item[0][0]), item[0])):
        uniform = found.get(UNIFORM, {})
        for method in [method for method in methods if method != UNIFORM and method in found]:
            seeds = sorted(uniform.keys() & found[method].keys())
            if seeds:
                listed.append(Pairs(*setting, method, [(uniform[seed], found[method][seed]) for seed in seeds]))
    return listed


def largest(listed: Iterable[Pairs]) -> list[Pairs]:
    """Of each task and method the setting with the most examples."""
    found: dict[tuple[str, str], Pairs] = {}
    for each in listed:
        key = each.task, each.method
        if key not in found or each.examples > found[key].examples:
            found[key] = each
    return list(found.values())


# ---- ours -----------------------------------------------------------------------------------------------------------


def parts(fine_tuning: Runs, networks: Runs) -> list[tuple[str, list[Pairs], dict[tuple[Any, ...], Pairs]]]:
    """Title, pairs of ours, and pairs of `Trainer` with as many seconds by their setting."""
    control = {each.setting: each for each in pairs([*fine_tuning, *networks], [AS_MANY_SECONDS])}
    listed = largest(pairs([*fine_tuning, *networks], [OURS]))
    parts = {
        f"fine-tuning; {LOOKED_AT}": [each for each in listed if kind(each) == "looked at"],
        f"fine-tuning; {UNTOUCHED}": [each for each in listed if kind(each) == "untouched"],
        "from scratch; not looked at": [each for each in listed if kind(each) == "network"],
    }
    return [(title, found, control) for title, found in parts.items() if found]


def kind(each: Pairs) -> str:
    if each.task in NETWORKS:
        return "network"
    return "untouched" if RECIPES[each.task].is_untouched else "looked at"


def mean_over_tasks(listed: Sequence[Pairs], of: Callable[[Pairs], list[float]]) -> tuple[float, float]:
    """Mean over tasks of the means over seeds, and its standard error; NaN if a task has one seed."""
    found = [mean_and_error(of(each)) for each in listed]
    return statistics.mean(mean for mean, _ in found), math.hypot(*(error for _, error in found)) / len(found)


def worse_by_holm(listed: Iterable[Pairs], level: float = _ONE_ERROR) -> list[str]:
    """Tasks that are worse than `Trainer` in accuracy or F1, with the correction of Holm (1979) over the tasks.

    By one-sided t-tests of the paired differences, at a level that is one standard error for a single task with many
    seeds. Tasks with one seed are left out.
    """
    values = {}
    for each in listed:
        mean, error = mean_and_error(each.points)
        if len(each.runs) > 1:
            t = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
            values[each.task] = stats.t.cdf(t, len(each.runs) - 1)
    worse = []
    for rank, (task, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        if value > level / (len(values) - rank):
            break
        worse.append(task)
    return worse


# ---- all methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """Means of a method over tasks, relative to `Trainer`; a task where it does nothing counts as `Trainer`."""

    seconds: float
    operations: float
    points: float
    of_tasks: dict[str, Pairs | None]


def means_of(runs: Runs, method: str) -> Means | None:
    """The means over the tasks of the settings in which rivals were run; None if the method was not run on all."""
    listed = _compared(pairs(runs))
    tasks = list(dict.fromkeys(each.task for each in listed))
    found = {each.task: each for each in listed if each.method == method}
    missing = set(tasks) - found.keys()
    if not found or (missing and not METHODS[method].skips_epochs):
        return None
    of_tasks = {task: found.get(task) for task in tasks}

    def mean(of: Callable[[Pairs], float], as_trainer: float) -> float:
        return statistics.mean(as_trainer if each is None else of(each) for each in of_tasks.values())

    return Means(
        mean(lambda each: statistics.mean(each.ratios), 1.0),
        mean(lambda each: each.mean("operations"), 1.0),
        mean(lambda each: statistics.mean(each.points), 0.0),
        of_tasks,
    )


def _compared(listed: Sequence[Pairs]) -> list[Pairs]:
    """The pairs of settings where methods of others were run."""
    of_others = {"VCAS-like", *(name for name, method in METHODS.items() if method.rival is not None)}
    settings = {each.setting for each in listed if each.method in of_others}
    return [each for each in listed if each.setting in settings]
