"""The picture of the seconds: what each task takes, and quality against seconds for each method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fine_tuning_methods import AS_MANY_SECONDS, METHODS, OURS, UNIFORM
from benchmarks.fine_tuning_tables import told_points
from benchmarks.pairs import Part, Runs, compared_with_rivals, means_of, parts_of
from benchmarks.results import digest

_OURS, _GREY, _DARK, _LIGHT = "#d1495b", "#7d8794", "#374151", "#e5e7eb"
_METRIC = 104
"""Position of the differences beside the bars, in percent."""
_LEAST = 0.5
"""Points above and below 0 that are shown at least."""
_EDGE = 0.98
"""Share of the seconds from which on names are left of their points."""
_NAMES = {
    OURS: "ours",
    "ImportanceTrainer, full backward": "ours, full backward",
    AS_MANY_SECONDS: "Trainer, as many seconds",
}


def plot_seconds(fine_tuning: Runs, networks: Runs, path: Path) -> Any:
    """Bars with the seconds of ours per task, and the methods as points: seconds and quality relative to `Trainer`.

    Returns:
        The figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, points) = plt.subplots(
        1, 2, figsize=(13, 5), layout="constrained", gridspec_kw={"width_ratios": [1.15, 1]}
    )
    _bars(bars, parts_of(fine_tuning, networks))
    _points(points, fine_tuning)
    figure.savefig(path, dpi=100, metadata={"Source": digest([*fine_tuning, *networks])})
    plt.close(figure)
    return figure


def _bars(panel: Any, parts: Sequence[Part]) -> None:
    place, ticks = 0.0, []
    for part in parts:
        panel.text(0, place, part.title.split(": constants")[0], fontsize=9, weight="bold", va="center", color=_DARK)
        for each in part.ours:
            place += 1
            share = 100 * statistics.mean(each.ratios)
            panel.barh(place, 100, color=_LIGHT, height=0.66)
            panel.barh(place, share, color=_OURS, height=0.66)
            panel.text(share - 1, place, f"{share:.0f} %", color="white", ha="right", va="center", fontsize=9)
            told = told_points(each)
            style = {"color": _OURS, "weight": "bold"} if "worse" in told else {"color": _DARK}
            panel.text(_METRIC, place, told, fontsize=9, va="center", **style)
            ticks.append((place, each.what))
        place += 1.2
    panel.text(_METRIC, 0, "accuracy or F1", fontsize=9, weight="bold", va="center", color=_DARK)
    panel.axvline(100, color=_DARK, linewidth=0.8)
    panel.set_yticks(*zip(*ticks, strict=True), fontsize=9)
    panel.set(xlim=(0, 150), xticks=[0, 25, 50, 75, 100], xlabel="seconds, in % of those of Trainer")
    panel.invert_yaxis()
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _points(panel: Any, runs: Runs) -> None:
    found = {method: means_of(runs, method) for method in METHODS}
    panel.axhline(0, color=_DARK, linewidth=0.8, zorder=1)
    panel.plot(100, 0, "o", color=_DARK, markersize=8)
    panel.annotate("Trainer", (100, 0), xytext=(6, 6), textcoords="offset points", fontsize=9, color=_DARK)
    right = 0  # labels at the right edge, which go to the left of their points, below each other
    for method, cell in found.items():
        if cell is None or method == UNIFORM:
            continue
        follows, of_ours = METHODS[method].as_long_as is not None, METHODS[method].settings is not None
        colour = _DARK if follows else _OURS if of_ours else _GREY
        style = {"color": colour, "markersize": 11 if method == OURS else 7, "zorder": 3}
        panel.plot(100 * cell.seconds, cell.points, "o", fillstyle="full" if method == OURS else "none", **style)
        offset, side = (6, 6), "left"
        if cell.seconds > _EDGE:
            offset, side, right = (-8, -12 - 12 * right), "right", right + 1
        place = {"xy": (100 * cell.seconds, cell.points), "xytext": offset, "textcoords": "offset points", "ha": side}
        weight = "bold" if method == OURS else "normal"
        panel.annotate(_NAMES.get(method, method), **place, fontsize=9, color=colour, weight=weight)
    panel.set(xlabel="seconds, in % of those of Trainer", ylabel="accuracy or F1, points")
    listed = compared_with_rivals(runs)
    tasks, examples = len({each.task for each in listed}), max((each.examples for each in listed), default=0)
    seeds = min((len(each.runs) for each in listed), default=0)
    title = f"{tasks} tasks, {examples:,} examples, {seeds} seed{'s' * (seeds != 1)}: up and left is better"
    panel.set_title(title, loc="left", fontsize=9)
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, -_LEAST), max(high, _LEAST))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.2)
