"""Seconds and quality of trainings, with `Trainer`, ours and rivals in turn in one process."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from benchmarks.fine_tuning_methods import METHODS, OURS, UNIFORM
from benchmarks.fine_tuning_tasks import TASKS, Material, Recipe, Rows
from benchmarks.networks import NETWORKS
from benchmarks.rivals import RivalTrainer
from benchmarks.task import IGNORED
from benchmarks.vcas import VCASTrainer
from hf_importance.backward.places import Survey

KEYS = ("task", "layers", "examples", "epochs", "seed", "method")
RECIPES = TASKS | NETWORKS
"""All tasks by name."""
BATCH = 32
_EVALUATED = 128
_WARM_UP = 0.1
_WEIGHT_DECAY = 0.01


def settings(key: str, value: Any) -> dict[str, Any] | None:
    """What the value of a coordinate stands for."""
    if key == "task":
        return RECIPES[value].settings() | {"batch": BATCH, "weight_decay": _WEIGHT_DECAY, "warm_up": _WARM_UP}
    return None


def points(
    tasks: Iterable[str],
    methods: Iterable[str],
    seeds: Iterable[int],
    examples: int,
    layers: int | None = None,
    epochs: int | None = None,
) -> list[tuple[Any, ...]]:
    """The grid: methods of one task and seed follow each other, in an order that changes with the seed.

    Where it is one epoch, without methods that do nothing in the first one.

    Args:
        tasks: names of tasks.
        methods: names of methods.
        seeds: seeds.
        examples: training examples.
        layers: first layers of the model that are kept; None for all that it has.
        epochs: epochs; None for those of the task.
    """
    found = []
    for seed in seeds:
        for name in tasks:
            task = RECIPES[name]
            place = (name, layers or task.layers, min(examples, task.most or examples), epochs or task.epochs, seed)
            there = [method for method in methods if place[3] > 1 or not METHODS[method].acts_from_second_epoch]
            in_turn = there if seed % 2 else there[::-1]
            found += [(*place, method) for method in in_turn]
    return found


def run(
    name: str,
    layers: int,
    examples: int,
    epochs: int,
    seed: int,
    method: str,
    data: Path,
    models: Path,
    done: Callable[[], Iterable[dict[str, Any]]] = list,
) -> dict[str, Any]:
    """One training, and what the model then reaches on test data.

    Args:
        name: name of the task.
        layers: first layers of the model that are kept.
        examples: training examples.
        epochs: epochs.
        seed: of weights, dropout and batches.
        method: name of the method.
        data: folder of data.
        models: folder of models.
        done: returns the finished runs of the grid.
    """
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    material = _material(recipe, data, models, examples)
    _warm_up(recipe, data, models)
    torch.manual_seed(seed)
    model = recipe.new_model(models, layers, len(material.labels))
    full = _steps(material, epochs)
    place = dict(zip(KEYS, (name, layers, examples, epochs, seed), strict=False))
    steps = METHODS[method].steps(full, _pair(done(), place) if METHODS[method].as_long_as else None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(folder, recipe, epochs, steps, seed)
        trainer = METHODS[method].new_trainer(model, arguments, material, steps)
        start, wall = time.process_time(), time.perf_counter()
        metrics = trainer.train().metrics
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    return {
        **_figures(model, material),
        "seconds": round(seconds, 2),
        "wall_seconds": round(wall, 2),
        "steps": trainer.state.global_step,
        **_cost(trainer, material, epochs, metrics),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


@functools.cache
def _material(recipe: Recipe, data: Path, models: Path, examples: int) -> Material:
    return recipe.read(data, models / recipe.encoder, examples)


def _steps(material: Material, epochs: int) -> int:
    """Steps of uniform training."""
    return epochs * math.ceil(len(material.train) / BATCH)


@functools.cache
def _warm_up(recipe: Recipe, data: Path, models: Path) -> None:
    """Two steps of both trainers, so that the first training of a process does not pay for what is loaded once."""
    material = _material(recipe, data, models, BATCH)
    for method in (UNIFORM, OURS):
        model = recipe.new_model(models, 1, len(material.labels))
        with tempfile.TemporaryDirectory() as folder:
            arguments = _arguments(folder, recipe, epochs=2, steps=2, seed=0)
            METHODS[method].new_trainer(model, arguments, material, steps=2).train()


def _pair(done: Iterable[dict[str, Any]], place: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The finished runs of `Trainer` and ours at a place of the grid."""
    found = {run["method"]: run for run in done if all(run[name] == value for name, value in place.items())}
    if not {UNIFORM, OURS} <= found.keys():
        raise SystemExit(f"error: the number of steps follows from runs of {UNIFORM} and {OURS}; run these first.")
    return found[UNIFORM], found[OURS]


def _cost(trainer: Trainer, material: Material, epochs: int, metrics: dict[str, float]) -> dict[str, float]:
    """Steps, rows that were propagated back and operations of matrix products, relative to uniform training.

    Operations are calculated from the other two: a backward pass has twice those of the forward pass. Not counted is
    that ours also leaves out tokens without a gradient.
    """
    share = trainer.state.global_step / _steps(material, epochs)
    fraction = metrics.get("train_backward_fraction", 1.0)
    operations = share
    if isinstance(trainer, VCASTrainer):
        fraction = trainer.rows[0] / trainer.rows[1]
        operations = share * (1 + 2 * fraction) / 3
    elif isinstance(trainer, RivalTrainer):
        operations = (trainer.trained + trainer.looked_at / 3) / (epochs * len(material.train))
        fraction = trainer.trained / trainer.visited
    elif fraction < 1:
        operations = share * (1 - selectable(trainer.model, material) * (1 - fraction))
    found = {"share_of_steps": share, "backward_fraction": fraction, "operations": operations}
    return {name: round(value, 4) for name, value in found.items()}


def selectable(model: nn.Module, material: Material) -> float:
    """Share of the operations of a step that is in proportion to the rows which are propagated back."""
    model.train()
    survey = Survey(model, BATCH)
    model(**material.collate(material.train[:BATCH]))
    return survey.end(recomputes=False).share


def _arguments(folder: str, recipe: Recipe, epochs: int, steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=epochs,
        learning_rate=recipe.learning_rate,
        warmup_steps=math.ceil(_WARM_UP * steps),
        weight_decay=_WEIGHT_DECAY,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


# ---- figures of a trained model --------------------------------------------------------------------------------------


def _figures(model: nn.Module, material: Material) -> dict[str, float]:
    """Accuracy and cross-entropy, over tokens where these have labels, then also the F1 of entities."""
    outputs, labels = _predict(model, material.test, material)
    every = torch.cat(labels)
    scores = torch.cat(outputs)
    found = {
        "accuracy": (scores.argmax(1) == every).double().mean().item(),
        "cross_entropy": F.cross_entropy(scores, every).item(),
    }
    if "O" in material.labels:
        names = material.labels
        pairs = [
            [[names[i] for i in tags.tolist()] for tags in (y, scores.argmax(1))]
            for y, scores in zip(labels, outputs, strict=True)
        ]
        found["f1"] = entity_f1(pairs)
    return {name: round(value, 5) for name, value in found.items()}


@torch.no_grad()
def _predict(model: nn.Module, rows: Rows, material: Material) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs `[tokens, classes]` and labels `[tokens]` of each example; a single "token" if it has one label."""
    model.eval()
    outputs, labels = [], []
    rows = sorted(rows, key=lambda row: len(row.get("input_ids", ())))  # less padding
    for start in range(0, len(rows), _EVALUATED):
        batch = material.collate(rows[start : start + _EVALUATED])
        wanted = batch.pop("labels")
        scores = model(**batch).logits
        if wanted.dim() == 1:
            wanted, scores = wanted[:, None], scores[:, None]
        for y, score in zip(wanted, scores, strict=True):
            labels.append(y[y != IGNORED])
            outputs.append(score[y != IGNORED])
    return outputs, labels


def entity_f1(pairs: Iterable[tuple[list[str], list[str]]]) -> float:
    """F1 of entities with the right kind, start and end, from pairs of true and predicted tags of a text.

    >>> entity_f1([(["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-ORG"])])
    0.5
    """
    right = true = predicted = 0
    for tags, guesses in pairs:
        entities, guessed = entities_of(tags), entities_of(guesses)
        right, true, predicted = right + len(entities & guessed), true + len(entities), predicted + len(guessed)
    return 2 * right / (true + predicted) if true + predicted else 1.0


def entities_of(tags: list[str]) -> set[tuple[str, int, int]]:
    """Kind, start and end of each entity; one begins at "B-", and at "I-" where none of this kind is going on.

    >>> sorted(entities_of(["B-PER", "B-PER", "I-PER", "O", "I-LOC"]))
    [('LOC', 4, 5), ('PER', 0, 1), ('PER', 1, 3)]
    """
    found, start, kind = set(), 0, None
    for place, tag in enumerate([*tags, "O"]):
        goes_on = tag == f"I-{kind}"
        if kind is not None and not goes_on:
            found.add((kind, start, place))
        if not goes_on:
            start, kind = place, None if tag == "O" else tag[2:]
    return found
