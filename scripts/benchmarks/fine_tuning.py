"""Seconds of fine-tuning pretrained encoders, with `Trainer` and ours in turn in one process."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from benchmarks.fine_tuning_tasks import TASKS, Material, Recipe, Rows
from benchmarks.task import IGNORED
from hf_importance import ImportanceConfig, ImportanceTrainer

KEYS = ("task", "layers", "examples", "epochs", "seed", "method")
UNIFORM, OURS = "Trainer", "ImportanceTrainer"
METHODS: dict[str, ImportanceConfig | None] = {
    UNIFORM: None,
    OURS: ImportanceConfig(),
    "ImportanceTrainer, full backward": ImportanceConfig(backward="full"),
    "ImportanceTrainer, backward_tolerance 0.05": ImportanceConfig(backward_tolerance=0.05),
}
"""Methods by name; None is `Trainer`."""
BATCH = 32
_EVALUATED = 128
_WARM_UP = 0.1
_WEIGHT_DECAY = 0.01


def settings(key: str, value: Any) -> dict[str, Any] | None:
    """What the value of a coordinate stands for."""
    if key == "task":
        return TASKS[value].settings() | {"batch": BATCH, "weight_decay": _WEIGHT_DECAY, "warm_up": _WARM_UP}
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
            task = TASKS[name]
            place = (name, layers or task.layers, examples, epochs or task.epochs, seed)
            in_turn = list(methods) if seed % 2 else list(methods)[::-1]
            found += [(*place, method) for method in in_turn]
    return found


def run(
    name: str, layers: int, examples: int, epochs: int, seed: int, method: str, data: Path, models: Path
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
    """
    torch.set_num_threads(1)
    recipe = TASKS[name]
    material = _material(recipe, data, models, examples)
    torch.manual_seed(seed)
    model = recipe.new_model(models, layers, len(material.labels))
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(folder, recipe, len(material.train), epochs, seed)
        trainer = _trainer(method, model, arguments, material)
        start, wall = time.process_time(), time.perf_counter()
        metrics = trainer.train().metrics
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    return {
        **_figures(model, material),
        "seconds": round(seconds, 2),
        "wall_seconds": round(wall, 2),
        "steps": trainer.state.global_step,
        "share_of_steps": round(metrics.get("train_share_of_steps", 1.0), 4),
        "backward_fraction": round(metrics.get("train_backward_fraction", 1.0), 4),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


@functools.cache
def _material(recipe: Recipe, data: Path, models: Path, examples: int) -> Material:
    return recipe.read(data, models / recipe.encoder, examples)


def _arguments(folder: str, recipe: Recipe, examples: int, epochs: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=epochs,
        learning_rate=recipe.learning_rate,
        warmup_steps=math.ceil(_WARM_UP * examples * epochs / BATCH),
        weight_decay=_WEIGHT_DECAY,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def _trainer(method: str, model: nn.Module, arguments: TrainingArguments, material: Material) -> Trainer:
    config = METHODS[method]
    what = {"model": model, "args": arguments, "train_dataset": material.train, "data_collator": material.collate}
    return Trainer(**what) if config is None else ImportanceTrainer(importance=config, **what)


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
