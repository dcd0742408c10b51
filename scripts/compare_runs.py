"""Table and plot of finished runs.

    python scripts/compare_runs.py outputs/quickstart

The folder contains one folder per task, with the output folders of the fine-tuning scripts.
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

FIGURES = ("accuracy", "perplexity", "loss")
"""Of an evaluation, as far as a run has them."""
COLOURS = {"uniform": "#6b7280", "importance": "#d1495b"}


def read_run(folder: Path) -> dict[str, Any]:
    """Task, trainer, results of a finished run, and its curve of accuracy, or of the loss if it has none."""
    results = json.loads((folder / "all_results.json").read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    shown = "accuracy" if "eval_accuracy" in results else "loss"
    evaluations = [log for log in state["log_history"] if f"eval_{shown}" in log]
    curve = [(round(log["epoch"] * results["examples_per_epoch"]), log[f"eval_{shown}"]) for log in evaluations]
    return {
        "task": folder.parent.name,
        "trainer": results["trainer"],
        **{figure: results[f"eval_{figure}"] for figure in FIGURES if f"eval_{figure}" in results},
        "shown": shown,
        "steps": state["global_step"],
        "examples": results["examples_processed"],
        "seconds": results["seconds_of_training"],
        "curve": curve or [(results["examples_processed"], results[f"eval_{shown}"])],
    }


def group(runs: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs that differ only in their seed, by task and trainer; uniform first."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["task"], run["trainer"] != "uniform")):
        groups[run["task"], run["trainer"]].append(run)
    return groups


def table(runs: list[dict[str, Any]]) -> str:
    """Means, with standard errors if there are several seeds, and steps relative to uniform sampling."""
    figures = [figure for figure in FIGURES if any(figure in run for run in runs)]
    rows = [["task", "trainer", "seeds", *figures, "examples processed", "steps", "seconds of training"]]
    groups = group(runs)
    for (task, trainer), same in groups.items():
        full = groups.get((task, "uniform"))
        share = f"{mean(same, 'steps') / mean(full, 'steps'):.0%}" if full else ""
        cells = [mean_with_error(same, figure) if figure in same[0] else "–" for figure in figures]
        cells += [f"{mean(same, 'examples'):,.0f}", share, f"{mean(same, 'seconds'):.1f}"]
        rows.append([task, trainer, str(len(same)), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def mean(runs: list[dict[str, Any]], figure: str) -> float:
    """Mean of one figure."""
    return statistics.mean(run[figure] for run in runs)


def mean_with_error(runs: list[dict[str, Any]], figure: str) -> str:
    """Mean ± standard error, as in `0.9123 ± 0.0045`."""
    error = f" ± {statistics.stdev(run[figure] for run in runs) / len(runs) ** 0.5:.4f}" if len(runs) > 1 else ""
    return f"{mean(runs, figure):.4f}{error}"


def mean_curve(curves: list[list[tuple[int, float]]]) -> list[tuple[float, float]]:
    """Mean at evaluations that all runs share, and the mean of their last ones, which may be at different steps."""
    values = [dict(curve[:-1]) for curve in curves]
    shared = sorted(set.intersection(*map(set, values)))
    ends = [tuple(map(statistics.mean, zip(*(curve[-1] for curve in curves), strict=True)))]
    return [(x, statistics.mean(found[x] for found in values)) for x in shared] + ends


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot evaluations against examples processed: one panel per task, one colour per trainer, thin lines for seeds."""
    tasks = sorted({run["task"] for run in runs})
    figure, panels = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 3.8), squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        of_task = [run for run in runs if run["task"] == task]
        shown = of_task[0]["shown"]
        for (_, trainer), same in group(of_task).items():
            curves = [run["curve"] for run in same]
            for curve in curves if len(curves) > 1 else []:
                panel.plot(*zip(*curve, strict=True), color=COLOURS.get(trainer), linewidth=0.8, alpha=0.35)
            style = {"color": COLOURS.get(trainer), "linewidth": 2, "marker": "o", "ms": 4}
            panel.plot(*zip(*mean_curve(curves), strict=True), label=trainer, **style)
            if trainer == "uniform":
                panel.axhline(mean(same, shown), color=COLOURS[trainer], linewidth=0.8, linestyle="--")
        panel.set(title=task, xlabel="examples processed", ylabel=f"evaluation {shown}")
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> str:
    """Print the table, save the plot next to the runs, and return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="folder with one folder per task, which contain the output folders of runs"
    )
    folder = parser.parse_args(argv).folder
    finished = sorted(path.parent for path in folder.glob("*/*/all_results.json"))
    if not finished:
        sys.exit(f"error: no finished run in {folder}: expected {folder}/TASK/RUN/all_results.json.")
    runs = [read_run(path) for path in finished]
    text = table(runs)
    print(f"\n{text}\n")
    plot(runs, folder / "comparison.png")
    print(f"The plot was saved as {folder / 'comparison.png'}")
    return text


if __name__ == "__main__":
    main()
