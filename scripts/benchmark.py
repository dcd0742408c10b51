"""Benchmarks of accuracy, cost and detection of label errors.

    python scripts/benchmark.py accuracy             # tasks × methods × budgets × seeds: hours on two cores
    python scripts/benchmark.py accuracy --quick     # ten minutes
    python scripts/benchmark.py seconds              # seconds that full trainings compute, in one thread
    python scripts/benchmark.py fine_tuning          # seconds of fine-tuning pretrained encoders: hours
    python scripts/benchmark.py networks             # seconds of small networks from scratch: hours
    python scripts/benchmark.py backward             # step time and memory with selective backward
    python scripts/benchmark.py families             # models for which gradients become dense in between
    python scripts/benchmark.py overhead             # step time relative to Trainer, on an otherwise idle machine
    python scripts/benchmark.py draws                # cost of a draw, for 10³ … 10⁹ examples
    python scripts/benchmark.py label_errors         # detection of wrong labels
    python scripts/benchmark.py suspects             # training with wrong labels, and without suspects
    python scripts/benchmark.py grouping             # texts grouped by length
    python scripts/benchmark.py reuse                # training that starts with the importances of another one
    python scripts/benchmark.py pages                # update plots and tables of all parts in the README files
    python scripts/benchmark.py picture              # update the picture of a report in the README

Each part fills a file in scripts/results, or `--output`. Existing runs are not repeated, so a grid can be interrupted
and resumed. `--show` prints the tables of the file without running anything. Without BENCHMARK_DATA=FOLDER, only the
tasks with embedded data are run; see scripts/results/README.md for the contents of that folder, and for how to add a
task or a method.
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
from benchmarks import (
    accuracy,
    backward,
    comparison,
    draws,
    families,
    fine_tuning,
    fine_tuning_methods,
    fine_tuning_tables,
    grouping,
    label_errors,
    overhead,
    pages,
    picture,
    results,
    reuse,
    seconds,
    suspects,
    tables,
)
from benchmarks.methods import METHODS
from benchmarks.tasks import TASKS


def run_accuracy(arguments: argparse.Namespace) -> str:
    """Run tasks × methods × budgets × seeds; also draw the plots."""
    path = _file_of(arguments)
    seeds, budgets = range(1, arguments.seeds + 1), arguments.budgets
    if arguments.quick:
        seeds, budgets = (1,), (0.7, 1.0)
    grid = [
        (task, method, budget, seed)
        for seed, task, method in itertools.product(seeds, arguments.tasks, arguments.methods)
        for budget in budgets or TASKS[task].budgets
        if METHODS[method].runs_at(budget, TASKS[task].of_texts)
    ]
    for bound in (False, True):  # methods with the number of steps of another method run after it
        points = [point for point in grid if bound == (METHODS[point[1]].as_long_as is not None)]
        steps = {tuple(found[key] for key in accuracy.KEYS): found["steps"] for found in results.load(path)["runs"]}
        run = functools.partial(accuracy.run, steps_taken=steps)
        runs = _filled(arguments, accuracy.KEYS, points, run, accuracy.settings)
    parts = [tables.decision_table(runs), tables.whole_table(runs), tables.match_table(runs)]
    pages.draw_accuracy(runs, path)
    return "\n\n".join([*parts, tables.figures_table(runs)])


def run_seconds(arguments: argparse.Namespace) -> str:
    """Run tasks × seeds, sequentially."""
    arguments.processes = 1
    grid = ((task, seed) for seed, task in itertools.product(range(1, arguments.seeds + 1), arguments.tasks))
    runs = _filled(arguments, seconds.KEYS, grid, seconds.run)
    return "\n".join(f"{task}: {comparison.share_of_seconds(runs, task)}" for task in {run["task"]: 0 for run in runs})


def run_fine_tuning(arguments: argparse.Namespace) -> str:
    """Run tasks × methods × seeds, sequentially."""
    if not arguments.show and None in (arguments.data, arguments.models):
        raise SystemExit("error: fine_tuning needs --data and --models (see scripts/results/README.md).")
    return _run_trainings(arguments)


def run_networks(arguments: argparse.Namespace) -> str:
    """Run tasks × methods × seeds, sequentially."""
    if not arguments.show and arguments.data is None:
        raise SystemExit("error: networks needs --data (see scripts/results/README.md).")
    arguments.models = Path()
    return _run_trainings(arguments)


def _run_trainings(arguments: argparse.Namespace) -> str:
    arguments.processes = 1
    seeds = range(1, arguments.seeds + 1)
    size = (arguments.examples, arguments.layers, arguments.epochs)
    grid = fine_tuning.points(arguments.tasks, arguments.methods, seeds, *size)
    done = functools.partial(_runs_in, _file_of(arguments))
    run = functools.partial(fine_tuning.run, data=arguments.data, models=arguments.models, done=done)
    for bound in (False, True):  # methods with the number of steps or seconds of another method run after it
        points = [point for point in grid if bound == (fine_tuning_methods.METHODS[point[-1]].as_long_as is not None)]
        runs = _filled(arguments, fine_tuning.KEYS, points, run, fine_tuning.settings)
    return fine_tuning_tables.table(runs)


def run_overhead(arguments: argparse.Namespace) -> str:
    """Run models × workers, sequentially."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    models = arguments.models or (overhead.BASE if cuda else overhead.SMALL)
    grid = ((model, workers, device) for model, workers in itertools.product(models, arguments.workers))
    arguments.processes = 1
    return overhead.tables(_filled(arguments, overhead.KEYS, grid, overhead.run))


def run_backward(arguments: argparse.Namespace) -> str:
    """Run models × ways × lengths, sequentially."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    batch = arguments.batch or (32 if cuda else 20)
    grid = [
        (model, arguments.layers or backward.MODELS[model][1], batch, tokens, way, lengths, device)
        for model, tokens in itertools.product(arguments.models, arguments.tokens or ((128, 512) if cuda else (16,)))
        for way, lengths in itertools.product(backward.WAYS, backward.LENGTHS)
        if lengths == backward.FULL or model.startswith("BERT")
    ]
    arguments.processes = 1
    return backward.tables(_filled(arguments, backward.KEYS, grid, backward.run))


def run_families(arguments: argparse.Namespace) -> str:
    """Find the dense detours of all families of models."""
    grid = ((name,) for name in arguments.families or families.names())
    arguments.processes = 1
    return families.tables(_filled(arguments, families.KEYS, grid, families.run))


def run_draws(arguments: argparse.Namespace) -> str:
    """Run samplers × numbers of examples, sequentially."""
    arguments.processes = 1
    grid = itertools.product(draws.SAMPLERS, draws.EXAMPLES)
    return draws.tables(_filled(arguments, draws.KEYS, grid, draws.run))


def run_label_errors(arguments: argparse.Namespace) -> str:
    """Run tasks × shares of wrong labels × seeds."""
    seeds = range(1, arguments.seeds + 1)
    grid = itertools.product(seeds, arguments.shares, arguments.tasks)
    points = ((task, share, seed) for seed, share, task in grid)
    return label_errors.tables(_filled(arguments, label_errors.KEYS, points, label_errors.run))


def run_suspects(arguments: argparse.Namespace) -> str:
    """Run cases × methods × seeds."""
    cases = [case for case in suspects.CASES if case[0] in arguments.tasks]
    grid = itertools.product(range(1, arguments.seeds + 1), cases, arguments.methods)
    points = ((*case, method, seed) for seed, case, method in grid)
    return suspects.tables(_filled(arguments, suspects.KEYS, points, suspects.run))


def run_grouping(arguments: argparse.Namespace) -> str:
    """Run epochs × methods × seeds."""
    grid = itertools.product(arguments.epochs, range(1, arguments.seeds + 1), arguments.methods)
    points = ((epochs, method, seed) for epochs, seed, method in grid)
    return grouping.tables(_filled(arguments, grouping.KEYS, points, grouping.run))


def run_reuse(arguments: argparse.Namespace) -> str:
    """Run cases × learning rates × methods × seeds, sequentially: the other training is kept in the process."""
    arguments.processes = 1
    grid = reuse.points(range(1, arguments.seeds + 1), arguments.tasks, arguments.epochs)
    return reuse.tables(_filled(arguments, reuse.KEYS, grid, reuse.run))


def run_pages(_: argparse.Namespace) -> str:
    """Update the plots, and the tables in the pages."""
    pages.update()
    return f"Updated the tables in {' and '.join(pages.PAGES)}"


def run_picture(_: argparse.Namespace) -> str:
    """Update the picture of a report in the README."""
    picture.draw()
    return f"Saved the picture as {picture.PICTURE}"


def _file_of(arguments: argparse.Namespace) -> Path:
    return arguments.output or results.FOLDER / f"{arguments.part}.json"


def _runs_in(path: Path) -> list[dict[str, Any]]:
    return results.load(path)["runs"]


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


def _tasks_at_hand() -> list[str]:
    everything = "BENCHMARK_DATA" in os.environ
    return [name for name, task in TASKS.items() if task.embedded or (everything and not task.slow)]


def new_parser() -> argparse.ArgumentParser:
    """The argument parser of all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, help="file of results, instead of the one in scripts/results")
    common.add_argument("--processes", type=int, default=os.cpu_count())
    common.add_argument("--seeds", type=int, default=5)
    common.add_argument("--show", action="store_true", help="print tables without running anything")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("accuracy", parents=[common], help="accuracy by budget")
    part.add_argument("--quick", action="store_true", help="one seed, two budgets")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=_tasks_at_hand())
    part.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    part.add_argument(
        "--budgets", nargs="+", type=float, help="shares of the full training (default: those of the task)"
    )
    part = parts.add_parser("seconds", parents=[common], help="seconds of full trainings")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=_tasks_at_hand())
    both = [fine_tuning_methods.UNIFORM, fine_tuning_methods.OURS]
    trainings = (
        ("fine_tuning", fine_tuning.TASKS, 4000, ("data", "models"), "seconds of fine-tuning pretrained encoders"),
        ("networks", fine_tuning.NETWORKS, 12_000, ("data",), "seconds of training networks from scratch"),
    )
    for name, tasks, examples, folders, purpose in trainings:
        part = parts.add_parser(name, parents=[common], help=purpose)
        part.set_defaults(seeds=3)
        for folder in folders:
            default = os.environ.get(f"BENCHMARK_{folder.upper()}")
            part.add_argument(f"--{folder}", type=Path, default=default and Path(default), help=f"folder of {folder}")
        part.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks))
        part.add_argument("--methods", nargs="+", choices=fine_tuning_methods.METHODS, default=both)
        part.add_argument("--examples", type=int, default=examples, help="training examples")
        part.add_argument("--layers", type=int, help="layers (default: those of the task)")
        part.add_argument("--epochs", type=int, help="epochs (default: those of the task)")
    part = parts.add_parser("overhead", parents=[common], help="step time relative to Trainer")
    part.add_argument("--models", nargs="+", choices=overhead.MODELS)
    part.add_argument("--workers", nargs="+", type=int, default=[0, 4])
    part = parts.add_parser("backward", parents=[common], help="step time and memory with selective backward")
    part.add_argument("--models", nargs="+", choices=backward.MODELS, default=list(backward.MODELS))
    part.add_argument("--layers", type=int, help="number of blocks (default: those of the model)")
    part.add_argument("--batch", type=int, help="examples of a step (default: 32 on a GPU, 20 on a CPU)")
    part.add_argument(
        "--tokens", nargs="+", type=int, help="tokens or patches (default: 128 512 on a GPU, 16 on a CPU)"
    )
    part = parts.add_parser("families", parents=[common], help="models whose gradients selective backward makes dense")
    part.add_argument("--families", nargs="+", help="names (default: all that the tests know)")
    part = parts.add_parser("draws", parents=[common], help="cost of a draw")
    part = parts.add_parser("label_errors", parents=[common], help="detection of wrong labels")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=list(label_errors.TASKS))
    part.add_argument("--shares", nargs="+", type=float, default=list(label_errors.SHARES))
    part = parts.add_parser("suspects", parents=[common], help="training with wrong labels, and without suspects")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=list(dict(suspects.CASES)))
    part.add_argument("--methods", nargs="+", choices=suspects.METHODS, default=list(suspects.METHODS))
    part = parts.add_parser("grouping", parents=[common], help="texts grouped by length")
    part.add_argument("--epochs", type=int, nargs="+", default=[2])
    part.add_argument("--methods", nargs="+", choices=grouping.METHODS, default=list(grouping.METHODS))
    part = parts.add_parser("reuse", parents=[common], help="training that starts with importances of another one")
    part.set_defaults(seeds=3)
    names = list(dict.fromkeys(task for task, *_ in reuse.CASES))
    part.add_argument("--tasks", nargs="+", choices=names, default=names)
    part.add_argument("--epochs", nargs="+", type=int, default=(), help="epochs (default: all that are run of a task)")
    parts.add_parser("pages", help="update plots and tables in the README files")
    parts.add_parser("picture", help="update the picture of a report")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = new_parser().parse_args(argv)
    run = {
        "accuracy": run_accuracy,
        "fine_tuning": run_fine_tuning,
        "networks": run_networks,
        "backward": run_backward,
        "families": run_families,
        "overhead": run_overhead,
        "draws": run_draws,
        "label_errors": run_label_errors,
        "seconds": run_seconds,
        "suspects": run_suspects,
        "grouping": run_grouping,
        "reuse": run_reuse,
        "pages": run_pages,
        "picture": run_picture,
    }[arguments.part]
    print(run(arguments))


if __name__ == "__main__":
    main()
