"""The pictures of the results: the share of the steps per task, and how far each method is from uniform sampling."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.comparison import (
    CONTROLS,
    OURS,
    UNIFORM,
    Figure,
    Runs,
    differences,
    figures,
    of,
    rivals,
    saves_steps,
    share,
    tasks,
)
from benchmarks.results import digest, mean_and_error
from benchmarks.tables import relative
from benchmarks.tasks import TASKS

_OURS, _GREY, _DARK = "#d1495b", "#a8b0bb", "#374151"
_LEAST = 0.5
"""Smallest share of the steps that is drawn; with fewer, all methods are far below."""
_MOST = 0.95
"""From this share of the steps on, the label is left of the point, and not over the names of the methods."""
_METRIC = 106
"""Position of the metrics beside the bars, in percent."""
_LINE = 0.062
"""Distance between names, relative to the height of a panel."""
_TITLE = 44
"""Characters per line of the titles of panels."""


def plot_savings(runs: Runs, path: Path) -> None:
    """Plot a bar per task with the share of the steps, and the difference in quality beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {
        "Training from scratch": [task for task in tasks(runs) if not TASKS[task].fine_tuning],
        "Fine-tuning": [task for task in tasks(runs) if TASKS[task].fine_tuning],
    }
    kinds = {kind: sorted(names, key=lambda task: share(runs, task, OURS)) for kind, names in kinds.items() if names}
    grid = {"gridspec_kw": {"height_ratios": [len(names) for names in kinds.values()]}, "layout": "constrained"}
    size = (11, 1.2 + 0.36 * sum(map(len, kinds.values())) + 0.4 * len(kinds))
    figure, panels = plt.subplots(len(kinds), 1, figsize=size, squeeze=False, **grid)
    for panel, (kind, names) in zip(panels[:, 0], kinds.items(), strict=True):
        _bars(panel, runs, names)
        panel.set_title(kind, loc="left", fontsize=10, weight="bold")
    head = {"fontsize": 9, "color": _DARK, "va": "bottom", "weight": "bold"}
    panels[0, 0].text(_METRIC, -0.75, "test metric, compared\nwith all steps of Trainer", **head)
    panels[-1, 0].set_xlabel("steps, in % of those of Trainer")
    figure.savefig(path, dpi=110, metadata={"Source": digest(runs)})
    plt.close(figure)


def _bars(panel: Any, runs: Runs, names: list[str]) -> None:
    shares = [100 * share(runs, task, OURS) for task in names]
    places = range(len(names))
    panel.barh(places, [100] * len(names), color="#e5e7eb", height=0.62)
    panel.barh(places, shares, color=_OURS, height=0.62)
    for place, task, of_trainer in zip(places, names, shares, strict=True):
        panel.text(of_trainer - 1, place, f"{of_trainer:.0f} %", color="white", ha="right", va="center", fontsize=9)
        told = relative(runs, task, OURS, figures(runs, task)[0])
        style = {"color": _DARK} if "worse" not in told else {"color": _OURS, "weight": "bold"}
        panel.text(_METRIC, place, told, fontsize=9, va="center", **style)
    panel.axvline(100, color=_DARK, linewidth=0.8)
    panel.set_yticks(places, [TASKS[task].what for task in names], fontsize=9)
    panel.set(xlim=(0, 150), xticks=[0, 25, 50, 75, 100])
    panel.invert_yaxis()
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def plot(runs: Runs, path: Path) -> None:
    """One panel per task: difference in accuracy, or in error relative to uniform sampling, against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = tasks(runs)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False)
    for panel, task in zip(panels.flat, names, strict=False):
        _panel(panel, runs, task)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    figure.tight_layout(h_pad=2, w_pad=1)
    figure.savefig(path, dpi=100, metadata={"Source": digest(runs)})
    plt.close(figure)


def _panel(panel: Any, runs: Runs, task: str) -> None:
    judged = figures(runs, task)[0]
    whole = statistics.mean(judged.of(run) for run in of(runs, task, UNIFORM))
    scale = judged.sign * (1.0 if judged.name == "accuracy" else 100 / whole)  # up is better
    lines = {method: _line(runs, task, method, judged, scale) for method in (*rivals(runs), UNIFORM)}
    lines = {method: points for method, points in lines.items() if points}
    for method, points in lines.items():
        colour, style = (_DARK, "--") if method == UNIFORM else (_GREY, "-")
        panel.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.4, zorder=2)
    panel.axhline(0, color=_DARK, linewidth=0.8, zorder=1)
    at, lowest = share(runs, task, OURS), min(y for _, y in lines[UNIFORM])
    mean, error = (scale * x for x in mean_and_error(differences(runs, task, OURS, judged)))
    lowest = min(lowest, mean - abs(error))
    panel.errorbar(at, mean, abs(error), fmt="o", color=_OURS, markersize=9, capsize=4, linewidth=2, zorder=4)
    highest = mean + abs(error)
    if saves_steps(runs, task) and of(runs, task, CONTROLS[0]):
        place = scale * statistics.mean(differences(runs, task, CONTROLS[0], judged))
        style = {"markersize": 8, "color": _DARK, "fillstyle": "none", "zorder": 3}
        panel.plot(share(runs, task, CONTROLS[0]), place, "o", **style)
        lowest, highest = min(lowest, place), max(highest, place)
    panel.annotate(
        f"ours\n{100 * at:.0f} %",
        (at, mean + abs(error)),
        xytext=(0 if at < _MOST else 6, 6),
        textcoords="offset points",
        color=_OURS,
        weight="bold",
        ha="center" if at < _MOST else "right",
        va="bottom",
        zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
    )
    low = 1.4 * lowest  # what is far below is cut off
    high = max(highest, *(y for points in lines.values() for _, y in points))
    panel.set_ylim(low, high + 0.35 * (high - low))
    step = _LINE * 1.35 * (high - low)
    ends = {method: max(points[-1][1], low) for method, points in lines.items()}
    place = low - step
    for method in sorted(ends, key=ends.__getitem__):
        place = max(ends[method], place + step)
        colour = _DARK if method == UNIFORM else "#6b7280"
        below = " ↓" * (lines[method][-1][1] < low)
        panel.text(1.02, place, method + below, color=colour, fontsize=8, va="center", clip_on=False)
    unit = "accuracy, points" if judged.name == "accuracy" else "squared error, % less"
    panel.set_title(textwrap.fill(f"{task}: {TASKS[task].what}", _TITLE), fontsize=9, loc="left")
    panel.set(xlabel="share of the steps", ylabel=unit, xlim=(_LEAST - 0.05, 1.01))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.2)


def _line(runs: Runs, task: str, method: str, judged: Figure, scale: float) -> list[tuple[float, float]]:
    """Budgets and mean differences."""
    budgets = sorted({run["budget"] for run in runs if (run["task"], run["method"]) == (task, method)})
    found = {budget: differences(runs, task, method, judged, budget) for budget in budgets if budget >= _LEAST}
    return [(budget, scale * statistics.mean(values)) for budget, values in found.items() if values]
