"""Runs of `fine_tuning` and `networks` paired by seed with those of `Trainer`, and means over tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from benchmarks.fine_tuning import RECIPES
from benchmarks.fine_tuning_methods import AS_MANY_SECONDS, METHODS, OURS, UNIFORM
from benchmarks.fine_tuning_tasks import ENCODERS
from benchmarks.networks import NETWORKS
from benchmarks.results import mean_and_error

Runs = Sequence[dict[str, Any]]
_SETTING = ("task", "layers", "examples", "epochs")
_ONE_ERROR = 0.16
"""Probability of a normal variable to be below minus one standard deviation."""
LOOKED_AT = "fine-tuning: constants of selective backward were chosen with these in view"
UNTOUCHED = "fine-tuning: not looked at before"
FROM_SCRATCH = "from scratch: not looked at before"


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
        return [run["seconds"] / uniform["seconds"] for uniform, run in self.runs]

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
    """Of each task and method the setting with the most examples, and with the layers and epochs of the task."""
    found: dict[tuple[str, str], Pairs] = {}
    for each in listed:
        key, recipe = (each.task, each.method), RECIPES[each.task]
        is_usual = (each.layers, each.epochs) == (recipe.layers, recipe.epochs)
        if is_usual and (key not in found or each.examples > found[key].examples):
            found[key] = each
    return list(found.values())


# ---- ours -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Tasks of one kind, with default settings.

    Args:
        title: the kind.
        ours: pairs of ours.
        controls: pairs of `Trainer` with as many seconds by task, in the setting with the most examples.
    """

    title: str
    ours: list[Pairs]
    controls: dict[str, Pairs]


def parts_of(fine_tuning: Runs, networks: Runs) -> list[Part]:
    """The tasks with which constants were chosen, those that were not looked at, and networks from scratch."""
    controls = {each.task: each for each in largest(pairs([*fine_tuning, *networks], [AS_MANY_SECONDS]))}
    by_title: dict[str, list[Pairs]] = {title: [] for title in (LOOKED_AT, UNTOUCHED, FROM_SCRATCH)}
    for each in largest(pairs([*fine_tuning, *networks], [OURS])):
        by_title[title_of(each)].append(each)
    return [Part(title, ours, controls) for title, ours in by_title.items() if ours]


def title_of(each: Pairs) -> str:
    """The kind of a task."""
    if each.task in NETWORKS:
        return FROM_SCRATCH
    return UNTOUCHED if RECIPES[each.task].is_untouched else LOOKED_AT


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
    compared = compared_with_rivals(runs)
    found = {each.setting: each for each in compared if each.method == method}
    settings = list(dict.fromkeys(each.setting for each in compared))
    as_trainer = {setting for setting in settings if METHODS[method].acts_from_second_epoch and setting[-1] == 1}
    if not found or set(settings) - found.keys() - as_trainer:
        return None
    of_tasks = {setting[0]: found.get(setting) for setting in settings}

    def mean(of: Callable[[Pairs], float], as_trainer: float) -> float:
        return statistics.mean(as_trainer if each is None else of(each) for each in of_tasks.values())

    return Means(
        mean(lambda each: statistics.mean(each.ratios), 1.0),
        mean(lambda each: each.mean("operations"), 1.0),
        mean(lambda each: statistics.mean(each.points), 0.0),
        of_tasks,
    )


def compared_with_rivals(runs: Runs) -> list[Pairs]:
    """The pairs of the settings of each task where most methods were run, if one of these is of others."""
    by_setting: dict[tuple[Any, ...], list[Pairs]] = {}
    for each in pairs(runs):
        by_setting.setdefault(each.setting, []).append(each)
    best: dict[str, list[Pairs]] = {}
    for (task, *_), found in by_setting.items():
        if any(METHODS[each.method].is_rival for each in found) and len(found) > len(best.get(task, ())):
            best[task] = found
    return [each for found in best.values() for each in found]
