"""What comes of training that ends when enough was learnt: beside uniform sampling with all steps, and with as many.

Made of the runs of `accuracy` with the budget of the full training.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.results import mean_and_error

_ERROR = "one standard error of the difference"
METHODS = ("uniform", "ours", "uniform, as many steps", "uniform, as many, raised")
"""The last two are controls: is it the sampling, or only fewer steps, or only the higher learning rate?"""


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown: for each task and method the share of the steps, and what was reached with them, ± standard errors."""
    head = ("task", "method", "steps", "accuracy, %", "cross-entropy", "scaled", "seconds")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in _tasks(runs):
        full = statistics.mean(run["steps"] for run in _of(runs, task, "uniform"))
        for method in METHODS:
            found = _of(runs, task, method)
            share = statistics.mean(run["steps"] for run in found) / full
            if "error" in found[0]:
                reached = [f"error {_mean(found, 'error', '.2e')}", "", ""]
            else:
                reached = [_mean(found, "accuracy", ".2f", 100)]
                reached += [_mean(found, figure, ".3f") for figure in ("cross_entropy", "scaled_cross_entropy")]
            seconds = f"{statistics.median(run['seconds'] for run in found):.1f}"
            lines.append("| " + " | ".join([task, method, f"{share:.2f}", *reached, seconds]) + " |")
    return "\n".join(lines)


def _mean(runs: list[dict[str, Any]], figure: str, form: str, scale: float = 1.0) -> str:
    mean, error = mean_and_error([scale * run[figure] for run in runs])
    return f"{mean:{form}} ± {error:{form}}"


def claims(runs: list[dict[str, Any]]) -> str:
    """One paragraph: the mean share of the steps, and on how many tasks nothing was lost."""
    tasks = _tasks(runs)
    shares = {task: share_of_steps(runs, task) for task in tasks}
    worse = {task: found for task in tasks if (found := short_of_uniform(runs, task))}
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    text = (
        f"With nothing set, training took {100 * statistics.mean(shares.values()):.0f} % of the steps in the mean over "
        f"{len(tasks)} tasks, from {100 * shares[least]:.0f} % ({least}) to {100 * shares[most]:.0f} % ({most}). "
    )
    if worse:
        found = ", ".join(f"{task} ({' and '.join(names)})" for task, names in worse.items())
        text += (
            f"On {len(tasks) - len(worse)} of them neither accuracy nor cross-entropy was worse than with all steps of "
            f"`Trainer` by more than {_ERROR}; on the others it was: {found}. "
        )
    else:
        text += f"On none was accuracy or cross-entropy worse than with all steps of `Trainer` by more than {_ERROR}. "
    ahead = [t for t in tasks if all(_score(runs, t, "ours") > _score(runs, t, control) for control in METHODS[2:])]
    return text + (
        f"`Trainer` with a schedule of as many steps, with its own learning rate or a raised one, was behind it on "
        f"{len(ahead)} of the {len(tasks)}."
    )


def _score(runs: list[dict[str, Any]], task: str, method: str) -> float:
    return statistics.mean(run["score"] for run in _of(runs, task, method))


def share_of_steps(runs: list[dict[str, Any]], task: str) -> float:
    """Of ours, in the mean over the seeds."""
    full, ours = (statistics.mean(found["steps"] for found in _of(runs, task, name)) for name in METHODS[:2])
    return ours / full


def short_of_uniform(runs: list[dict[str, Any]], task: str) -> list[str]:
    """In what ours is worse than all steps of uniform by more than a standard error of the difference, and by how much.

    Differences are taken seed by seed, as both begin with the same weights.
    """
    found = []
    pairs = list(zip(_of(runs, task, "ours"), _of(runs, task, "uniform"), strict=True))
    figures = (("accuracy", 100, 2, " points"), ("cross_entropy", -1, 3, ""), ("error", -1, 1, " %"))
    for figure, sign, digits, unit in figures:
        differences = [sign * (ours[figure] - uniform[figure]) for ours, uniform in pairs if figure in ours]
        if figure == "error" and differences:  # in percent of what uniform has
            full = statistics.mean(uniform[figure] for _, uniform in pairs)
            differences = [100 * difference / full for difference in differences]
        if differences:
            mean, error = mean_and_error(differences)
            if mean < -error:
                found.append(f"{figure.replace('_', '-')} by {-mean:.{digits}f} ± {error:.{digits}f}{unit}")
    return found


def _tasks(runs: list[dict[str, Any]]) -> list[str]:
    """Those of which all the methods have runs of at least two seeds."""
    return [task for task in dict.fromkeys(run["task"] for run in runs) if len(_seeds(runs, task)) > 1]


def _seeds(runs: list[dict[str, Any]], task: str) -> set[int]:
    """That all the methods have runs of."""
    seeds: dict[str, set[int]] = {method: set() for method in METHODS}
    for run in runs:
        if run["task"] == task and run["budget"] == 1.0 and run["method"] in seeds:
            seeds[run["method"]].add(run["seed"])
    return set.intersection(*seeds.values())


def _of(runs: list[dict[str, Any]], task: str, method: str) -> list[dict[str, Any]]:
    """Its runs with the whole budget, in the order of the seeds."""
    seeds = _seeds(runs, task)
    found = [run for run in runs if (run["task"], run["method"], run["budget"]) == (task, method, 1.0)]
    return sorted((run for run in found if run["seed"] in seeds), key=lambda run: run["seed"])
