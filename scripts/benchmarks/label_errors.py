"""Detection of wrong labels, after some labels were changed at random: ranking of examples, and suspects.

Baselines are the loss of the trained model, and confident learning (Northcutt et al. 2021, with cleanlab) on
out-of-fold probabilities from five more trainings.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import Trainer, set_seed

from benchmarks.from_scratch import with_wrong_labels
from benchmarks.results import grouped, mean_and_error
from benchmarks.task import Columns, Rows, Task, collate, predict
from benchmarks.tasks import task_of
from hf_importance import ImportanceConfig, ImportanceTrainer

KEYS = ("task", "share", "seed")
TASKS = ("fashion_mnist", "digits", "docstrings")
SHARES = (0.05, 0.1, 0.2)
RANKINGS = {
    "mean_loss": "mean loss of the visits (ours)",
    "final_loss": "loss of the trained model",
    "self_confidence": "cleanlab, self-confidence",
    "normalized_margin": "cleanlab, normalised margin",
}
SETTINGS = ImportanceConfig(effective_epochs=False)
"""Settings with which all passes are made."""
_FOLDS = 5


def run(name: str, share: float, seed: int) -> dict[str, Any]:
    """One training of ours and five for cleanlab: AUROC, precision at the number of wrong labels, and suspects."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    task = task_of(name)
    train, wrong = with_wrong_labels(task, share, 1000 + seed)
    labels, wrong = train["labels"].numpy(), wrong.numpy()
    start = time.perf_counter()
    trainer = _trained(partial(ImportanceTrainer, importance=SETTINGS), task, train, seed)
    seconds = time.perf_counter() - start
    findings = trainer._findings()
    logits = predict(trainer.model, train)[0].double()
    final_loss = torch.nn.functional.cross_entropy(logits, train["labels"], reduction="none")
    probability = _out_of_fold(task, train, seed)
    start_of_rival = time.perf_counter() - start - seconds
    scores = {"mean_loss": findings.columns["mean_loss"].numpy(), "final_loss": final_loss.numpy()}
    for method in ("self_confidence", "normalized_margin"):
        scores[method] = -get_label_quality_scores(labels, probability, method=method)
    found = {"seconds": round(seconds, 1), "seconds_of_cleanlab": round(start_of_rival, 1), "wrong": int(wrong.sum())}
    for ranking, score in scores.items():
        found[f"auroc_{ranking}"] = round(float(roc_auc_score(wrong, score)), 5)
        found[f"precision_{ranking}"] = round(float(wrong[np.argsort(-score)[: wrong.sum()]].mean()), 5)
    flagged = {"ours": findings.columns["suspect"].numpy(), "cleanlab": find_label_issues(labels, probability)}
    for whose, chosen in flagged.items():
        found[f"flagged_{whose}"] = int(chosen.sum())
        found[f"flagged_right_{whose}"] = int((chosen & wrong).sum())
    return found


def _trained(cls: Callable[..., Trainer], task: Task, train: Columns, seed: int) -> Trainer:
    set_seed(seed)
    steps = task.epochs * -(-len(train["labels"]) // task.batch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = task.arguments(folder, steps, seed)
        trainer = cls(model=task.model(), args=arguments, train_dataset=Rows(train), data_collator=collate)
        trainer.train()
    return trainer


def _out_of_fold(task: Task, train: Columns, seed: int) -> np.ndarray:
    """Probabilities from models not trained on the example, float64 `[examples, classes]`."""
    probability = torch.zeros(len(train["labels"]), task.classes, dtype=torch.float64)
    fold = torch.randperm(len(probability), generator=torch.Generator().manual_seed(seed)) % _FOLDS
    for k in range(_FOLDS):
        rest, held_out = _part(train, fold != k), _part(train, fold == k)
        probability[fold == k] = predict(_trained(Trainer, task, rest, seed).model, held_out)[0].double().softmax(1)
    return probability.numpy()


def _part(columns: Columns, mask: Tensor) -> Columns:
    return {name: column[mask] for name, column in columns.items()}


def tables(runs: list[dict[str, Any]]) -> str:
    """Tables in Markdown of the rankings and of the suspects."""
    shares = sorted({found["share"] for found in runs})
    lines = ["| data | ranked by | " + " | ".join(f"{share:.0%} wrong" for share in shares) + " |"]
    lines.append("|---|---|" + "---|" * len(shares))
    for task in dict.fromkeys(found["task"] for found in runs):
        for ranking, words in RANKINGS.items():
            auroc, precision = (
                grouped(runs, f"{figure}_{ranking}", ("task", "share")) for figure in ("auroc", "precision")
            )
            cells = []
            for share in shares:
                mean, error = mean_and_error(auroc[task, share])
                cells.append(f"{mean:.3f} ± {error:.3f} ({mean_and_error(precision[task, share])[0]:.3f})")
            lines.append(f"| {task} | {words} | " + " | ".join(cells) + " |")
    lines += ["", "| data | flagged by | " + " | ".join(f"{share:.0%} wrong" for share in shares) + " |"]
    lines.append("|---|---|" + "---|" * len(shares))
    for task in dict.fromkeys(found["task"] for found in runs):
        for whose in ("ours", "cleanlab"):
            cells = []
            for share in shares:
                same = [found for found in runs if (found["task"], found["share"]) == (task, share)]
                flagged, right, wrong = (
                    sum(found[name] for found in same)
                    for name in (f"flagged_{whose}", f"flagged_right_{whose}", "wrong")
                )
                cells.append(f"{right / max(flagged, 1):.2f}, {right / wrong:.2f}")
            lines.append(f"| {task} | {whose} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
