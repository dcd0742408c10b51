"""Benchmarks: what importance sampling saves, what it costs, what it finds.

    python scripts/benchmark.py accuracy             # tasks × methods × budgets × seeds: an hour on two cores
    python scripts/benchmark.py accuracy --quick     # ten minutes
    python scripts/benchmark.py overhead             # a step over one of Trainer; nothing else should run meanwhile
    python scripts/benchmark.py draws                # a draw, for 10³ … 10⁹ examples
    python scripts/benchmark.py label_errors         # are wrong labels found?
    python scripts/benchmark.py texts                # of their natural length: padding, tokens, what is written
    python scripts/benchmark.py readme               # puts the tables of all of them into the README

Each part fills a file in scripts/results, or `--output`. What is already there is not run again, so that a grid may be
interrupted and gone on with. `--show` prints the tables that are made of the file, and runs nothing. The tasks with
Fashion-MNIST need FASHION_MNIST=PATH, an npz file with train_images, train_labels, test_images, test_labels. The task
banking77, minutes per run and only done where it is named, needs BANKING77=PATH, a folder with train.csv and test.csv,
and takes its model from the Hub, or from MINILM=PATH.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import accuracy, draws, effective, label_errors, overhead, results, texts
from benchmarks.methods import METHODS
from benchmarks.tasks import TASKS

TABLES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]] = {
    "saved": ("accuracy", effective.claims),
    "effective": ("accuracy", effective.tables),
    "accuracy": ("accuracy", accuracy.tables),
    "overhead": ("overhead", overhead.tables),
    "draws": ("draws", draws.tables),
    "label_errors": ("label_errors", label_errors.tables),
    "texts": ("texts", texts.tables),
}
"""What stands between which marks of the README: made of which file, and how."""


def run_accuracy(arguments: argparse.Namespace) -> str:
    """Tasks × methods × budgets × seeds; also draws the plot."""
    path = _file_of(arguments)
    seeds, budgets = range(1, arguments.seeds + 1), arguments.budgets
    if arguments.quick:
        seeds, budgets = (1,), (0.5, 1.0)
    grid = itertools.product(seeds, arguments.tasks, arguments.methods, budgets)
    grid = [(task, method, budget, seed) for seed, task, method, budget in grid]
    for bound in (False, True):  # those that have as many steps as others have taken come after them
        points = [point for point in grid if METHODS[point[1]].runs_at(point[2], bound)]
        steps = {tuple(found[key] for key in accuracy.KEYS): found["steps"] for found in results.load(path)["runs"]}
        run = functools.partial(accuracy.run, steps_taken=steps)
        runs = _filled(arguments, accuracy.KEYS, points, run, accuracy.settings)
    accuracy.plot(runs, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(accuracy.details(runs), encoding="utf-8")
    return "\n\n".join([effective.tables(runs), accuracy.tables(runs)])


def run_overhead(arguments: argparse.Namespace) -> str:
    """Models × workers, one after the other."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    models = arguments.models or (overhead.BASE if cuda else overhead.SMALL)
    grid = ((model, workers, device) for model, workers in itertools.product(models, arguments.workers))
    arguments.processes = 1
    return overhead.tables(_filled(arguments, overhead.KEYS, grid, overhead.run))


def run_draws(arguments: argparse.Namespace) -> str:
    """Samplers × numbers of examples, one after the other."""
    arguments.processes = 1
    grid = itertools.product(draws.SAMPLERS, draws.EXAMPLES)
    return draws.tables(_filled(arguments, draws.KEYS, grid, draws.run))


def run_label_errors(arguments: argparse.Namespace) -> str:
    """Tasks × shares of wrong labels × seeds."""
    seeds = range(1, arguments.seeds + 1)
    grid = itertools.product(seeds, arguments.shares, arguments.tasks)
    points = ((task, share, seed) for seed, share, task in grid)
    return label_errors.tables(_filled(arguments, label_errors.KEYS, points, label_errors.run))


def run_texts(arguments: argparse.Namespace) -> str:
    """Tasks × methods × seeds."""
    grid = itertools.product(range(1, arguments.seeds + 1), arguments.tasks, arguments.methods)
    points = ((task, method, seed) for seed, task, method in grid)
    return texts.tables(_filled(arguments, texts.KEYS, points, texts.run))


def with_tables(text: str, folder: Path = results.FOLDER) -> str:
    """The text with the tables of the files between its marks, `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, (part, tables) in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start in text:
            before, rest = text.split(start)
            runs = results.load(folder / f"{part}.json")["runs"]
            text = f"{before}{start}\n{tables(runs)}\n\n{end}{rest.split(end)[1]}"
    return text


def run_readme(_: argparse.Namespace) -> str:
    """Put the tables into the README."""
    readme = Path(__file__).parent.parent / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return f"The tables were put into {readme}"


def _file_of(arguments: argparse.Namespace) -> Path:
    return arguments.output or results.FOLDER / f"{arguments.part}.json"


def _filled(
    arguments: argparse.Namespace,
    keys: Sequence[str],
    grid: Iterable[tuple[Any, ...]],
    run: Callable[..., Any],
    *settings: Callable[[str, Any], dict[str, Any] | None],
) -> list[dict[str, Any]]:
    if not arguments.show:
        results.fill(_file_of(arguments), keys, grid, run, arguments.processes, *settings)
    return results.load(_file_of(arguments))["runs"]


def new_parser() -> argparse.ArgumentParser:
    """Of the flags of all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, help="the file of results, if not the one in scripts/results")
    common.add_argument("--processes", type=int, default=os.cpu_count())
    common.add_argument("--seeds", type=int, default=5)
    common.add_argument("--show", action="store_true", help="run nothing")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("accuracy", parents=[common], help="what comes of a budget?")
    part.add_argument("--quick", action="store_true", help="one seed, two budgets")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=[task for task in TASKS if task != "banking77"])
    part.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    part.add_argument("--budgets", nargs="+", type=float, default=list(accuracy.BUDGETS))
    part = parts.add_parser("overhead", parents=[common], help="what does a step cost?")
    part.add_argument("--models", nargs="+", choices=overhead.MODELS)
    part.add_argument("--workers", nargs="+", type=int, default=[0, 4])
    part = parts.add_parser("draws", parents=[common], help="what does a draw cost?")
    part = parts.add_parser("label_errors", parents=[common], help="are wrong labels found?")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=list(label_errors.TASKS))
    part.add_argument("--shares", nargs="+", type=float, default=list(label_errors.SHARES))
    part = parts.add_parser("texts", parents=[common], help="what of texts of their natural length?")
    part.add_argument("--tasks", nargs="+", choices=texts.TASKS, default=list(texts.TASKS))
    part.add_argument("--methods", nargs="+", choices=texts.METHODS, default=list(texts.METHODS))
    parts.add_parser("readme", help="put the tables into the README")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = new_parser().parse_args(argv)
    run = {
        "accuracy": run_accuracy,
        "overhead": run_overhead,
        "draws": run_draws,
        "label_errors": run_label_errors,
        "texts": run_texts,
        "readme": run_readme,
    }[arguments.part]
    print(run(arguments))


if __name__ == "__main__":
    main()
