"""Trainings that start with the importances of another one: with another seed, at the same or another learning rate."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, set_seed

from benchmarks.accuracy import evaluate
from benchmarks.results import mean_and_error
from benchmarks.task import Columns, Rows, Task, collate
from benchmarks.tasks import task_of
from hf_importance import ImportanceConfig, ImportanceTrainer

KEYS = ("task", "examples", "epochs", "rate", "method", "seed")
UNIFORM, OURS = "Trainer", "ours"
KEPT = {"first": "its first pass", "mean": "the mean of its first three passes", "last": "its end"}
"""What the other training leaves. The file that is saved with a model has the mean."""
METHODS = (UNIFORM, OURS, *KEPT)
CASES = (
    ("fashion_mnist", 60_000, 1),
    ("fashion_mnist", 60_000, 3),
    ("fashion_mnist", 60_000, 8),
    ("banking77", 2000, 3),
    ("docstrings", 8000, 8),
    ("digits", 1437, 10),
)
"""Tasks, training examples and epochs."""
RATES = {1.0: METHODS, 0.5: (OURS, "mean")}
"""Learning rates relative to that of the task, with which the other training was made, and methods."""
_OTHER_SEED = 1000
_FIGURES = {"accuracy": (100, "+.2f"), "cross_entropy": (1, "+.3f")}


def points(seeds: Sequence[int], tasks: Sequence[str], epochs: Sequence[int] = ()) -> list[tuple[Any, ...]]:
    """The grid; a case is complete before the next one. By default it has all epochs of the tasks."""
    return [
        (*case, rate, method, seed)
        for case in CASES
        if case[0] in tasks and (not epochs or case[2] in epochs)
        for seed in seeds
        for rate, methods in RATES.items()
        for method in methods
    ]


def run(name: str, examples: int, epochs: int, rate: float, method: str, seed: int) -> dict[str, Any]:
    """One training, after the other one if it starts from that."""
    task = _task(name, examples, epochs)
    start = _kept(name, examples, epochs, seed)[method] if method in KEPT else None
    trainer = _trained(replace(task, learning_rate=rate * task.learning_rate), seed, method, start)
    return {"steps": trainer.state.global_step, "of_steps": _steps(task), **evaluate(trainer.model, task)}


def _task(name: str, examples: int, epochs: int) -> Task:
    """The task with some of its examples, drawn at random, and as many test examples at most."""
    task = task_of(name)
    train, test = (_part(columns, examples) for columns in (task.train, task.test))
    return replace(task, train=train, test=test, epochs=epochs)


def _part(columns: Columns, most: int) -> Columns:
    order = torch.randperm(len(columns["labels"]), generator=torch.Generator().manual_seed(0))
    return columns if len(order) <= most else {name: values[order[:most]] for name, values in columns.items()}


class _FirstPass(TrainerCallback):
    """Keeps the importances at the end of the first epoch."""

    def __init__(self, trainer: ImportanceTrainer) -> None:
        self._trainer, self.importances = trainer, None

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.importances = self._trainer.importances if self.importances is None else self.importances


@functools.cache
def _kept(name: str, examples: int, epochs: int, seed: int) -> dict[str, Tensor]:
    """What a training with another seed leaves."""
    trainer = _trained(_task(name, examples, epochs), _OTHER_SEED + seed, OURS)
    (first,) = (x.importances for x in trainer.callback_handler.callbacks if isinstance(x, _FirstPass))
    mean = trainer._run.columns.for_another_training
    return {"first": first, "mean": mean, "last": trainer.importances}


def _steps(task: Task) -> int:
    return task.epochs * -(-task.examples // task.batch)


def _trained(task: Task, seed: int, method: str, start: Tensor | None = None) -> Trainer:
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        what = {"model": task.model(), "args": task.arguments(folder, _steps(task), seed)}
        what |= {"train_dataset": Rows(task.train), "data_collator": collate}
        if method == UNIFORM:
            trainer = Trainer(**what)
        else:
            trainer = ImportanceTrainer(**what, importance=ImportanceConfig(start_from=start))
            trainer.add_callback(_FirstPass(trainer))
        trainer.train()
    return trainer


def tables(runs: list[dict[str, Any]]) -> str:
    """Table in Markdown with a row per case, learning rate and method; differences are paired by seed."""
    head = ("data", "examples, epochs", "learning rate", "starts from", "share of steps", "steps", "accuracy, points")
    lines = ["| " + " | ".join((*head, "cross-entropy")) + " |", "|" + "---|" * (len(head) + 1)]
    for name, examples, epochs in CASES:
        for rate, methods in RATES.items():
            place = (name, examples, epochs, rate)
            of_case = [found for found in runs if tuple(found[key] for key in KEYS[:4]) == place]
            by_method = {method: {x["seed"]: x for x in of_case if x["method"] == method} for method in methods}
            for method in methods:
                if cells := _cells(by_method[OURS], by_method[method]):
                    start = {UNIFORM: "(`Trainer`)", OURS: "nothing", **KEPT}[method]
                    lines.append(
                        f"| {name} | {examples:,}, {epochs} | {rate:g} | {start} | " + " | ".join(cells) + " |"
                    )
    return "\n".join(lines)


def _cells(ours: dict[int, dict[str, Any]], found: dict[int, dict[str, Any]]) -> list[str]:
    """Share of all steps, and differences to ours that starts from nothing; empty without two pairs."""
    seeds = sorted(ours.keys() & found)
    if len(seeds) < 2:
        return []
    cells = [f"{mean_and_error([found[seed]['steps'] / found[seed]['of_steps'] for seed in seeds])[0]:.3f}"]
    if ours is found:
        figures = {figure: mean_and_error([x[figure] for x in found.values()])[0] for figure in _FIGURES}
        return [*cells, "", f"{100 * figures['accuracy']:.2f} %", f"{figures['cross_entropy']:.3f}"]
    pairs = [(found[seed], ours[seed]) for seed in seeds]
    steps, error = mean_and_error([100 * (x["steps"] / y["steps"] - 1) for x, y in pairs])
    cells.append(f"{steps:+.1f} ± {error:.1f} %")
    for figure, (scale, form) in _FIGURES.items():
        mean, error = mean_and_error([scale * (x[figure] - y[figure]) for x, y in pairs])
        cells.append(f"{mean:{form}} ± {error:{form[1:]}}")
    return cells
