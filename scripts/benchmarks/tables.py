"""Tables of the README files, made from the runs of `accuracy`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.comparison import (
    CONTROLS,
    OF_ALL_STEPS,
    OURS,
    UNIFORM,
    Figure,
    Runs,
    at_same_steps,
    best_at_same_steps,
    best_rival,
    compared_rivals,
    differences,
    figures,
    has_rivals,
    is_ahead_of,
    is_as_good,
    is_worse,
    of,
    rivals,
    saves_steps,
    share,
    share_of_seconds,
    share_to_match,
    tasks,
    whole_share,
)
from benchmarks.methods import METHODS
from benchmarks.results import mean_and_error
from benchmarks.tasks import TASKS

_MINUS = str.maketrans("-", "−")


def claims(runs: Runs) -> str:
    """List of claims: mean shares of the steps, tasks without a loss of quality, comparison with the control."""
    names = tasks(runs)
    lines = []
    shares = [share(runs, task, OURS) for task in names if not TASKS[task].fine_tuning]
    if shares:
        lines.append(
            f"- **Training from scratch** took {percent(statistics.mean(shares))} of the steps on average over "
            f"{len(shares)} task{'s' * (len(shares) > 1)}, from {percent(min(shares))} to {percent(max(shares))}."
        )
    if names:
        good = [task for task in names if is_as_good(runs, task)]
        mean = statistics.mean(whole_share(runs, task) for task in names)
        lines.append(
            f"- **Quality**, judged without selective backward: on {len(good)} of {_number(names)} every metric was at "
            "least as good as with all steps of `Trainer`, within one standard error of the difference. On the others "
            "at least one was "
            f"worse; with these counted as no saving, the mean share of the steps is {percent(mean)}."
        )
    judged = [task for task in names if saves_steps(runs, task) and of(runs, task, CONTROLS[0])]
    if judged:
        ahead = sum(is_ahead_of(runs, task, CONTROLS[0]) for task in judged)
        lines.append(
            "- **Control**: `Trainer` given only that reduced number of steps, with its schedule shortened to match, "
            f"was worse in every metric on {ahead} of the {_number(judged)} where steps were saved and this was run."
        )
    met = [task for task in names if has_rivals(runs, task)]
    if met:
        first = sum(best_at_same_steps(runs, task) == OURS for task in met)
        names = ["the sampler of the paper" if name == "paper" else name for name in compared_rivals(runs)]
        others = ", ".join(name.replace(", half", " (half)") for name in names)
        lines.append(
            f"- **Competing methods** ({others}) with as many steps as ours all had a worse accuracy or error on "
            f"{'all' if first == len(met) else f'{first} of the'} {_number(met)} where they were run."
        )
    return "\n".join(lines)


def _number(names: list[str]) -> str:
    return f"{len(names)} task{'s' * (len(names) > 1)}"


def relative(runs: Runs, task: str, method: str, figure: Figure) -> str:
    """Difference to uniform sampling ± standard error, in points of accuracy, percent of its error, or cross-entropy.

    Marked as worse if it is, by more than the standard error. Empty without runs.
    """
    found = differences(runs, task, method, figure)
    if not found:
        return ""
    mean, error = mean_and_error(found)
    unit, form, whole = "", ".3f", 1.0
    if figure.name == "accuracy":
        unit, form = " points", ".2f"
    elif figure.name == "error":
        unit, form = " % error", ".1f"
        whole = statistics.mean(figure.of(run) for run in of(runs, task, UNIFORM)) / 100
    told = f"{mean / whole:+{form}}"
    told = told.replace("-", "+") if float(told) == 0 else told
    if not math.isnan(error):
        told += f" ± {error / whole:{form}}"
    return told.translate(_MINUS) + unit + (", worse" if is_worse(runs, task, figure, method) else "")


def decision_table(runs: Runs, seconds: Runs = ()) -> str:
    """Table with a row per task: results of `Trainer`, differences and cost of ours, and the best rival.

    Args:
        runs: runs of `accuracy`.
        seconds: runs of `seconds`, on an otherwise idle machine.
    """
    reached = ("`Trainer`: accuracy, % / error", "ours", "`Trainer`: cross-entropy", "ours")
    head = ("task", "seeds", *reached, "steps", "tokens", "seconds", "best other")
    lines = [row(head), rule(head)]
    for task in tasks(runs):
        cells = [f"**{task}**: {TASKS[task].what}", str(len(of(runs, task, OURS)))]
        for figure in figures(runs, task):
            mean, _ = mean_and_error([figure.of(run) for run in of(runs, task, UNIFORM)])
            cells += [f"{mean:{figure.form}}", relative(runs, task, OURS, figure)]
        cells += [""] * (6 - len(cells))
        cells += [percent(share(runs, task, OURS, what)) for what in ("steps", "tokens")]
        cells.append(percent(share_of_seconds(seconds, task)))
        rival = best_rival(runs, task)
        cells.append("" if rival is None else "none" if math.isinf(rival[1]) else f"{percent(rival[1])} ({rival[0]})")
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def rule(cells: Sequence[str]) -> str:
    """The line below the head of a table."""
    return "|" + "---|" * len(cells)


def percent(share: float | None) -> str:
    """A share in percent; empty for None."""
    return "" if share is None else f"{100 * share:.0f} %"


def whole_table(runs: Runs) -> str:
    """Table of results ± standard errors of the methods that run with the full budget, also of one seed."""
    head = ("task", "method", "seeds", "steps", "tokens", "accuracy, % / error", "cross-entropy", "scaled", "written")
    lines = [row(head), rule(head)]
    for task in tasks(runs, seeds=1):
        for method in OF_ALL_STEPS:
            found = of(runs, task, method)
            if not found:
                continue
            (first, *_) = found
            cells = [task, method, str(len(found)), percent(share(runs, task, method))]
            cells.append(percent(share(runs, task, method, "tokens")))
            cells.append(_mean(found, "accuracy", ".2f", 100) if "accuracy" in first else _mean(found, "error", ".3g"))
            cells += [_mean(found, name, ".3f") for name in ("cross_entropy", "scaled_cross_entropy")]
            cells.append(_mean(found, "written", ".2f"))
            lines.append(row(cells))
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
        columns[OURS].append(share(runs, task, OURS) if is_as_good(runs, task) else math.inf)
        for name in names:
            there = any((run["task"], run["method"]) == (task, name) for run in runs)
            columns[name].append(share_to_match(runs, task, name) if there else math.nan)
        lines.append(f"| {task} | " + " | ".join(_share(found[-1]) for found in columns.values()) + " |")
    if not columns[OURS]:
        return "\n".join(lines)
    compared = [name for name in columns if name not in METHODS or not METHODS[name].by_length]
    common = [k for k in range(len(columns[OURS])) if not any(math.isnan(columns[name][k]) for name in compared)]
    if common:
        means = {name: statistics.mean(min(columns[name][k], 1.0) for k in common) for name in compared}
        cells = [f"{means[name]:.2f}" if name in means else "" for name in columns]
        lines.append(row([f"mean of the {len(common)} with all", *cells]))
    return "\n".join(lines)


def same_table(runs: Runs) -> str:
    """Table of the differences to uniform sampling with the full budget, at the share of the steps that ours took.

    In points of accuracy or percent of the error; the best of each task is in bold.
    """
    names = [OURS, UNIFORM, *compared_rivals(runs)]
    lines = [row(["task", "steps", *names]), rule(["task", "steps", *names])]
    for task in tasks(runs):
        if not has_rivals(runs, task):
            continue
        figure = figures(runs, task)[0]
        values, best = at_same_steps(runs, task), best_at_same_steps(runs, task)
        whole = 1.0 if figure.name == "accuracy" else statistics.mean(map(figure.of, of(runs, task, UNIFORM))) / 100
        cells = [f"{values[name] / whole:+.1f}".translate(_MINUS) if name in values else "" for name in names]
        cells = [f"**{cell}**" if name == best else cell for name, cell in zip(names, cells, strict=True)]
        lines.append(row([task, percent(share(runs, task, OURS)), *cells]))
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
