"""Training with wrong labels: by default, and with examples whose label is probably wrong weighted less or left out.

Cases are labels changed at random, in much and in little data, and data without wrong labels: ambiguous texts and rare
classes.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, set_seed

from benchmarks.accuracy import evaluate
from benchmarks.from_scratch import with_wrong_labels
from benchmarks.results import grouped, mean_and_error
from benchmarks.task import Columns, Rows, Task, collate, predict
from benchmarks.tasks import task_of
from hf_importance import ImportanceConfig, ImportanceTrainer

KEYS = ("task", "share", "method", "seed")
CASES = (
    ("fashion_mnist", 0.05),
    ("fashion_mnist", 0.1),
    ("fashion_mnist", 0.2),
    ("few_images", 0.05),
    ("few_images", 0.1),
    ("docstrings", 0.0),
    ("imbalanced", 0.0),
)
"""Tasks and shares of wrong labels."""
OURS = {"ours": {}, "ours, left out": {"suspect_weight": 0.0}, "ours, at 0.3": {"suspect_weight": 0.3}}
METHODS = ("uniform", "uniform, generalised cross-entropy", "uniform, without the flagged", *OURS)
_FIGURES = ("steps", "flagged", "accuracy", "accuracy_of_the_last_classes", "cross_entropy", "scaled_cross_entropy")
_RARE = 3
"""Number of rare classes, the last ones of `imbalanced`."""


def run(name: str, share: float, method: str, seed: int) -> dict[str, Any]:
    """One training, or two for "without the flagged", the first of which finds the suspects."""
    task = task_of(name)
    if share:
        task = replace(task, train=with_wrong_labels(task, share, 1000 + seed)[0])
    removed = 0
    if method == "uniform, without the flagged":
        found = _trained(task, seed, ImportanceTrainer, importance=ImportanceConfig(effective_epochs=False)).suspects
        kept = torch.ones(task.examples, dtype=torch.bool)
        kept[found] = False
        removed, task = len(found), replace(task, train={name: column[kept] for name, column in task.train.items()})
    if method in OURS:
        trainer = _trained(task, seed, ImportanceTrainer, importance=ImportanceConfig(**OURS[method]))
        if OURS[method]:
            removed = int(trainer._run.sampler.suspects.flagged.sum())
    else:
        more = {"compute_loss_func": _generalised} if method.endswith("cross-entropy") else {}
        trainer = _trained(task, seed, Trainer, **more)
    outputs, labels = predict(trainer.model, task.test)
    rare = labels >= task.classes - _RARE
    right = (outputs.argmax(1) == labels)[rare].double().mean().item()
    return {
        "steps": trainer.state.global_step,
        "flagged": removed,
        "accuracy_of_the_last_classes": round(right, 5),
        **evaluate(trainer.model, task),
    }


def _trained(task: Task, seed: int, cls: type[Trainer], **more: Any) -> Trainer:
    """Train with the number of steps of the full data, even if examples were removed."""
    set_seed(seed)
    rows: Columns = task.train
    steps = task.epochs * -(-len(rows["labels"]) // task.batch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = task.arguments(folder, steps, seed)
        trainer = cls(model=task.model(), args=arguments, train_dataset=Rows(rows), data_collator=collate, **more)
        trainer.train()
    return trainer


def _generalised(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, q: float = 0.7) -> Tensor:
    """Generalised cross-entropy (1 − p^q)/q (Zhang & Sabuncu, NeurIPS 2018), with their q."""
    p = F.softmax(outputs.logits, dim=1).gather(1, labels[:, None])[:, 0]
    return ((1 - p.clamp(min=1e-7) ** q) / q).mean()


def tables(runs: list[dict[str, Any]]) -> str:
    """Table in Markdown with a row per case and method."""
    head = (
        "data",
        "method",
        "seeds",
        "steps",
        "left out",
        "accuracy, %",
        "of the last three classes",
        "cross-entropy",
        "scaled",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, share in CASES:
        of_case = [found for found in runs if (found["task"], found["share"]) == (task, share)]
        whole = grouped(of_case, "steps", ("method",)).get(("uniform",))
        for method in METHODS:
            same = [found for found in of_case if found["method"] == method]
            if not same or not whole:
                continue
            figures = {name: mean_and_error([found[name] for found in same]) for name in _FIGURES}
            twice = 2 if method == "uniform, without the flagged" else 1
            cells = [f"{task}, {share:.0%} wrong", method, str(len(same))]
            cells += [f"{twice * figures['steps'][0] / whole[0]:.2f}", f"{figures['flagged'][0]:,.0f}"]
            for name in _FIGURES[2:]:
                scale, form = (100, ".2f") if name.startswith("accuracy") else (1, ".3f")
                mean, error = figures[name]
                cells.append(f"{scale * mean:{form}} ± {scale * error:{form}}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
