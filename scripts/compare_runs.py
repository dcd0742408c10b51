"""Compare finished runs in a table and a plot.

    python scripts/compare_runs.py outputs/quickstart

The folder contains one folder per task, which contains the output folders of the fine-tuning scripts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = ("accuracy", "perplexity", "loss")
"""Metrics of the evaluation that are shown if a run has them."""
COLOURS = {"uniform": "#6b7280", "importance": "#d1495b"}


def read_run(folder: Path) -> dict[str, Any]:
    """Results of a finished run, and its curve of the accuracy, or of the loss if it has no accuracy."""
    results = json.loads((folder / "all_results.json").read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    metric = "accuracy" if "eval_accuracy" in results else "loss"
    evaluations = [log for log in state["log_history"] if f"eval_{metric}" in log]
    curve = [(round(log["epoch"] * results["examples_per_epoch"]), log[f"eval_{metric}"]) for log in evaluations]
    return {
        "task": folder.parent.name,
        "trainer": results["trainer"],
        **{name: results[f"eval_{name}"] for name in METRICS if f"eval_{name}" in results},
        "curve_metric": metric,
        "steps": state["global_step"],
        "examples": results["examples_processed"],
        "seconds": results["seconds_of_training"],
        "curve": curve or [(results["examples_processed"], results[f"eval_{metric}"])],
    }


def group(runs: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Group runs by task and trainer, uniform first; runs of a group only differ in the seed."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["task"], run["trainer"] != "uniform")):
        groups[run["task"], run["trainer"]].append(run)
    return groups


def table(runs: list[dict[str, Any]]) -> str:
    """Table of means, with standard errors for several seeds, and steps relative to uniform sampling."""
    metrics = [name for name in METRICS if any(name in run for run in runs)]
    rows = [["task", "trainer", "seeds", *metrics, "examples processed", "steps", "seconds of training"]]
    groups = group(runs)
    for (task, trainer), same in groups.items():
        uniform = groups.get((task, "uniform"))
        share = f"{mean(same, 'steps') / mean(uniform, 'steps'):.0%}" if uniform else ""
        cells = [mean_with_error(same, name) if name in same[0] else "–" for name in metrics]
        cells += [f"{mean(same, 'examples'):,.0f}", share, f"{mean(same, 'seconds'):.1f}"]
        rows.append([task, trainer, str(len(same)), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def conclusions(runs: list[dict[str, Any]]) -> list[str]:
    """A sentence per task that was run with both trainers."""
    groups, found = group(runs), []
    for task in sorted({run["task"] for run in runs}):
        ours, uniform = groups.get((task, "importance")), groups.get((task, "uniform"))
        if ours and uniform:
            metric = ours[0]["curve_metric"]
            share, difference = mean(ours, "steps") / mean(uniform, "steps"), mean(ours, metric) - mean(uniform, metric)
            found.append(
                f"{task}: importance sampling took {share:.0%} of the steps of Trainer; {metric} {difference:+.4f}"
            )
    return found


def mean(runs: list[dict[str, Any]], name: str) -> float:
    """Mean of one result over runs."""
    return statistics.mean(run[name] for run in runs)


def mean_with_error(runs: list[dict[str, Any]], name: str) -> str:
    """Mean ± standard error, such as `0.9123 ± 0.0045`."""
    error = f" ± {statistics.stdev(run[name] for run in runs) / len(runs) ** 0.5:.4f}" if len(runs) > 1 else ""
    return f"{mean(runs, name):.4f}{error}"


def mean_curve(curves: list[list[tuple[int, float]]]) -> list[tuple[float, float]]:
    """Mean of the curves at the evaluations that all runs have in common, and of their last points.

    The last points may be at different numbers of examples, because training may end at different steps.
    """
    values = [dict(curve[:-1]) for curve in curves]
    shared = sorted(set.intersection(*map(set, values)))
    ends = [tuple(map(statistics.mean, zip(*(curve[-1] for curve in curves), strict=True)))]
    return [(x, statistics.mean(found[x] for found in values)) for x in shared] + ends


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot evaluations against examples processed: one panel per task, one colour per trainer, a thin line per seed."""
    tasks = sorted({run["task"] for run in runs})
    figure, panels = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 3.8), squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        runs_of_task = [run for run in runs if run["task"] == task]
        metric = runs_of_task[0]["curve_metric"]
        for (_, trainer), same in group(runs_of_task).items():
            curves = [run["curve"] for run in same]
            for curve in curves if len(curves) > 1 else []:
                panel.plot(*zip(*curve, strict=True), color=COLOURS.get(trainer), linewidth=0.8, alpha=0.35)
            style = {"color": COLOURS.get(trainer), "linewidth": 2, "marker": "o", "ms": 4}
            panel.plot(*zip(*mean_curve(curves), strict=True), label=trainer, **style)
            if trainer == "uniform":
                line = {"color": COLOURS[trainer], "linewidth": 0.8, "linestyle": "--"}
                panel.axhline(mean(same, metric), label="uniform at its end", **line)
        panel.set(title=task, xlabel="examples processed", ylabel=f"evaluation {metric}")
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> str:
    """Print the table, save the plot next to the runs, and return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="folder with one folder per task, which contains the output folders of its runs"
    )
    folder = parser.parse_args(argv).folder
    finished = sorted(path.parent for path in folder.glob("*/*/all_results.json"))
    if not finished:
        sys.exit(
            f"error: {folder} must contain finished runs, but has no TASK/RUN/all_results.json: pass another folder."
        )
    runs = [read_run(path) for path in finished]
    text = table(runs)
    print("\n".join(["", text, "", *conclusions(runs)]))
    plot(runs, folder / "comparison.png")
    print(f"The plot was saved as {folder / 'comparison.png'}")
    return text


if __name__ == "__main__":
    main()
