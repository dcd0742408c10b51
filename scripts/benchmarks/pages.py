"""The tables and plots of the README files, made from the files of results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    backward,
    comparison,
    draws,
    families,
    fine_tuning_tables,
    grouping,
    label_errors,
    overhead,
    results,
    reuse,
    suspects,
    tables,
)
from benchmarks.plot import plot, plot_savings
from benchmarks.plot_seconds import plot_seconds

ROOT = Path(__file__).parent.parent.parent
PAGES = ("README.md", "scripts/results/README.md")
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "saved": (("accuracy", "fine_tuning", "networks"), fine_tuning_tables.claims),
    "minutes": (("fine_tuning",), fine_tuning_tables.minutes_table),
    "headline": (("fine_tuning", "networks"), fine_tuning_tables.headline_table),
    "methods": (("fine_tuning",), fine_tuning_tables.methods_table),
    "trainings": (("fine_tuning", "networks"), fine_tuning_tables.table),
    "decision": (("accuracy", "seconds"), tables.decision_table),
    "whole": (("accuracy",), tables.whole_table),
    "match": (("accuracy",), tables.match_table),
    "same": (("accuracy",), tables.same_table),
    "figures": (("accuracy",), tables.figures_table),
    "backward": (("backward",), backward.tables),
    "families": (("families",), families.tables),
    "overhead": (("overhead",), overhead.tables),
    "draws": (("draws",), draws.tables),
    "label_errors": (("label_errors",), label_errors.tables),
    "suspects": (("suspects",), suspects.tables),
    "grouping": (("grouping",), grouping.tables),
    "reuse": (("reuse",), reuse.tables),
}
"""Tables of the pages by name: the files that they are made from, and the function that makes them."""


def with_tables(text: str, folder: Path = results.FOLDER) -> str:
    """Insert the tables of the files between the marks `<!-- NAME -->` and `<!-- /NAME -->` of a text."""
    for name, (parts, table) in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start in text:
            before, rest = text.split(start)
            runs = [runs_of(part, folder) for part in parts]
            text = f"{before}{start}\n{table(*runs)}\n\n{end}{rest.split(end)[1]}"
    return text


def update() -> None:
    """Update the plots, and the tables in the pages."""
    draw_accuracy(runs_of("accuracy"), results.FOLDER / "accuracy.json")
    plot_seconds(runs_of("fine_tuning"), runs_of("networks"), results.FOLDER / "seconds.png")
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(with_tables(text), encoding="utf-8")


def runs_of(part: str, folder: Path = results.FOLDER) -> list[dict[str, Any]]:
    """The runs of a part."""
    return results.load(folder / f"{part}.json")["runs"]


def draw_accuracy(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot the runs of `accuracy` beside their file, if there are enough."""
    if comparison.tasks(runs):
        plot(runs, path.with_suffix(".png"))
        plot_savings(runs, path.with_name("savings.png"))
