"""The picture of the results: how far each method is from uniform sampling with all steps."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.comparison import OURS, UNIFORM, Runs, differences, figures, of, rivals, share, tasks
from benchmarks.results import digest, mean_and_error
from benchmarks.tasks import TASKS

_OURS, _GREY, _DARK = "#d1495b", "#9ca3af", "#4b5563"
_GAP = 0.055
"""Between names, of the height of a panel."""


def plot(runs: Runs, path: Path) -> None:
    """A panel per task: the difference in accuracy, or in error in percent of uniform's, against the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = tasks(runs)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False, layout="constrained")
    for panel, task in zip(panels.flat, names, strict=False):
        _panel(panel, runs, task)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=100, metadata={"Source": digest(runs)})
    plt.close(figure)


def _panel(panel: object, runs: Runs, task: str) -> None:
    judged = figures(runs, task)[0]
    whole = abs(statistics.mean(judged.of(run) for run in of(runs, task, UNIFORM)))
    scale = 1.0 if judged.name == "accuracy" else 100 / whole
    ends = {}
    for method in (*rivals(runs), UNIFORM):
        points = {}
        for budget in sorted({run["budget"] for run in runs if (run["task"], run["method"]) == (task, method)}):
            found = differences(runs, task, method, judged, budget)
            if found:
                points[budget] = scale * statistics.mean(found)
        if points:
            colour, style = (_DARK, "--") if method == UNIFORM else (_GREY, "-")
            panel.plot(*zip(*points.items(), strict=True), style, color=colour, linewidth=1.3, zorder=2)
            ends[method] = list(points.items())[-1]
    mean, error = mean_and_error(differences(runs, task, OURS, judged))
    at = share(runs, task, OURS)
    panel.errorbar(
        at, scale * mean, scale * error, fmt="o", color=_OURS, markersize=8, capsize=3, linewidth=2, zorder=4
    )
    panel.annotate(
        f"ours: {100 * at:.0f} % of the steps", (at, scale * mean), (-9, 0), textcoords="offset points",
        color=_OURS, weight="bold", ha="right", va="center", zorder=5,
    )  # fmt: skip
    panel.axhline(0, color=_DARK, linewidth=0.8, zorder=1)
    low, high = panel.get_ylim()
    place = None
    for method, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        place = y if place is None else max(y, place + _GAP * (high - low))
        colour = _DARK if method == UNIFORM else "#6b7280"
        panel.annotate(
            method, (x, y), (x + 0.02, place), color=colour, fontsize=7.5, va="center", annotation_clip=False
        )
    unit = "accuracy, points" if judged.name == "accuracy" else "squared error, %"
    panel.set(title=f"{task}: {TASKS[task].what}", xlabel="share of uniform's steps", ylabel=f"difference in {unit}")
    panel.title.set_fontsize(9)
    panel.set_xlim(right=1.3)
    panel.set_xticks([x / 10 for x in range(3, 11, 1) if x / 10 >= min(p[0] for p in ends.values()) - 0.8])
    if judged.sign < 0:
        panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.2)
