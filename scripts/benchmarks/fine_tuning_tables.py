"""Tables of the runs of `fine_tuning`: seconds and quality relative to `Trainer`, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import tables
from benchmarks.fine_tuning import METHODS, OURS, UNIFORM
from benchmarks.fine_tuning_tasks import TASKS
from benchmarks.results import mean_and_error

Runs = Sequence[dict[str, Any]]
_SETTING = ("task", "layers", "examples", "epochs")
_ENCODERS = {"all-MiniLM-L6-v2": "MiniLM", "dinov2-small": "DINOv2-small"}


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
    def metric(self) -> str:
        """By which the task is judged: accuracy, or F1 where entities are found."""
        return "f1" if "f1" in self.runs[0][0] else "accuracy"

    @property
    def ratios(self) -> list[float]:
        """Seconds relative to `Trainer`."""
        return [ours["seconds"] / uniform["seconds"] for uniform, ours in self.runs]

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
    for setting, found in sorted(settings.items(), key=lambda item: (list(TASKS).index(item[0][0]), item[0])):
        uniform = found.get(UNIFORM, {})
        for method in [method for method in methods if method != UNIFORM and method in found]:
            seeds = sorted(uniform.keys() & found[method].keys())
            if seeds:
                listed.append(Pairs(*setting, method, [(uniform[seed], found[method][seed]) for seed in seeds]))
    return listed


def table(runs: Runs) -> str:
    """Table in Markdown with a row per setting and method."""
    setting = ("task", "layers", "examples × epochs", "seeds", "method")
    cost = ("`Trainer`, seconds", "seconds", "steps", "rows propagated back")
    head = (*setting, *cost, "`Trainer`: accuracy or F1, %", "difference, points", "cross-entropy", "difference")
    lines = [tables.row(head), tables.rule(head)]
    lines += [tables.row(_cells(each)) for each in pairs(runs)]
    return "\n".join(lines)


def _cells(each: Pairs) -> list[str]:
    what = f"**{each.task}**: {TASKS[each.task].what}; {_ENCODERS[TASKS[each.task].encoder]}"
    size = f"{each.examples:,} × {each.epochs}"
    return [
        *(what, str(each.layers), size, str(len(each.runs)), each.method),
        f"{each.mean('seconds', of_ours=False):,.0f}",
        f"{_with_error([100 * ratio for ratio in each.ratios], '.1f')} %",
        tables.percent(each.mean("share_of_steps")),
        tables.percent(each.mean("backward_fraction")),
        f"{100 * each.mean(each.metric, of_ours=False):.2f}",
        _difference(each, each.metric, 100, ".2f", sign=1),
        f"{each.mean('cross_entropy', of_ours=False):.3f}",
        _difference(each, "cross_entropy", 1, ".3f", sign=-1),
    ]


def _difference(each: Pairs, figure: str, scale: float, form: str, sign: int) -> str:
    """The mean ± standard error of a difference; marked if it is worse by more than this error."""
    values = [scale * value for value in each.differences(figure)]
    mean, error = mean_and_error(values)
    return _with_error(values, "+" + form) + (", worse" if sign * mean < -error else "")


def _with_error(values: Sequence[float], form: str) -> str:
    mean, error = mean_and_error(values)
    return _told(mean, form) + ("" if math.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def _told(value: float, form: str) -> str:
    told = f"{value:{form}}"
    return (told.replace("-", "+") if float(told) == 0 else told).replace("-", "−")


# ---- claim -----------------------------------------------------------------------------------------------------------


def claims(runs: Runs, fine_tuning: Runs) -> str:
    """The claim on seconds, and those of `accuracy` on steps."""
    return "\n".join(filter(None, [claim(fine_tuning), tables.claims(runs)]))


def claim(runs: Runs) -> str:
    """What fine-tuning takes with default settings, and on what it was measured; empty without runs."""
    listed = pairs(runs, [OURS])
    if not listed:
        return ""
    shares = [statistics.mean(each.ratios) for each in listed]
    number = len(listed)
    over = f"in the mean over {number} tasks, from {_percents(shares)}" if number > 1 else "on one task"
    return (
        f"- **Fine-tuning** takes {tables.percent(statistics.mean(shares))} of the seconds of `Trainer` {over}, with "
        f"{_quality(listed)}. Measured with {_measured_with(listed)}."
    )


def _percents(shares: Sequence[float]) -> str:
    return f"{tables.percent(min(shares))} to {tables.percent(max(shares))}"


def _quality(listed: Sequence[Pairs]) -> str:
    """Mean over tasks of the mean differences, ± its standard error, where all tasks have several seeds."""
    found = [mean_and_error([100 * value for value in each.differences(each.metric)]) for each in listed]
    mean = _told(statistics.mean(mean for mean, _ in found), "+.2f")
    error = math.hypot(*(error for _, error in found)) / len(found)
    names = {"accuracy": "accuracy", "f1": "F1"}
    metric = " or ".join(names[name] for name in names if any(each.metric == name for each in listed))
    return f"{mean} {'' if math.isnan(error) else f'± {error:.2f} '}points of {metric}"


def _measured_with(listed: Sequence[Pairs]) -> str:
    """Models, size and seeds of the trainings."""
    encoders = " and ".join(dict.fromkeys(_ENCODERS[TASKS[each.task].encoder] for each in listed))
    examples = _range([each.examples for each in listed])
    epochs = _range([each.epochs for each in listed])
    seeds = _range([len(each.runs) for each in listed])
    size = f"{examples} examples, {epochs} epoch{_s(epochs)} and {seeds} seed{_s(seeds)} per task"
    return f"pretrained encoders ({encoders}), {size}, in one thread of a CPU"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _s(number: str) -> str:
    return "" if number == "1" else "s"
