"""Texts grouped by length: the padding that is saved, and what the model then reaches.

Visits are sorted by length in mega-batches, and cut into batches of similar length. Those of a mega-batch are drawn
from the longest to the shortest by `Trainer`, and in random order by ours.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from transformers import Trainer, set_seed

from benchmarks.accuracy import evaluate, tokens
from benchmarks.results import grouped, mean_and_error
from benchmarks.task import Rows, collate
from benchmarks.tasks import task_of
from hf_importance import ImportanceConfig, ImportanceTrainer

KEYS = ("epochs", "method", "seed")
TASK = "docstrings"
UNIFORM, OURS = "Trainer", "ImportanceTrainer"
SIZES = (25, 10, 5)
"""Other numbers of batches in a mega-batch than the 50 of transformers, and of ours."""
METHODS: dict[str, tuple[type[Trainer], bool, int | None]] = {
    UNIFORM: (Trainer, False, None),
    f"{UNIFORM}, grouped": (Trainer, True, None),
    OURS: (ImportanceTrainer, False, None),
    f"{OURS}, grouped": (ImportanceTrainer, True, None),
    **{f"{OURS}, grouped by {size} batches": (ImportanceTrainer, True, size) for size in SIZES},
}
"""Class, whether texts are grouped by length, and the number of batches in a mega-batch, where it is another."""


def run(epochs: int, method: str, seed: int) -> dict[str, Any]:
    """One training, and what the model then reaches on test data; seconds are those of the processor."""
    task, (cls, by_length, batches) = task_of(TASK), METHODS[method]
    strategy = {"train_sampling_strategy": "group_by_length"} if by_length else {}
    more = {"importance": ImportanceConfig()} if cls is ImportanceTrainer else {}
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder, _mega_batches_of(batches):
        arguments = task.arguments(folder, epochs * -(-task.examples // task.batch), seed, **strategy)
        rows = Rows(task.train)
        trainer = cls(model=task.model(), args=arguments, train_dataset=rows, data_collator=collate, **more)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    found = {"steps": trainer.state.global_step, "seconds": round(seconds, 2), **tokens(rows)}
    return found | evaluate(trainer.model, task)


def _mega_batches_of(batches: int | None) -> Any:
    return patch("hf_importance.sampling.groups._MAX_BATCHES", batches) if batches else nullcontext()


def tables(runs: list[dict[str, Any]]) -> str:
    """Table in Markdown with a row per method, for each number of epochs."""
    head = ("epochs", "method", "seeds", "padded tokens", "accuracy, %", "cross-entropy", "to `Trainer`")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for epochs in sorted({found["epochs"] for found in runs}):
        same = [found for found in runs if found["epochs"] == epochs]
        padded, accuracy, cross_entropy = (
            {method: values for (method,), values in grouped(same, name, ("method",)).items()}
            for name in ("padded_tokens", "accuracy", "cross_entropy")
        )
        for method in (name for name in METHODS if name in padded):
            share = sum(x / y for x, y in zip(padded[method], padded[UNIFORM], strict=False)) / len(padded[method])
            pairs = zip(cross_entropy[method], cross_entropy[UNIFORM], strict=False)
            difference = _with_error([ours - uniform for ours, uniform in pairs], 1, 3, sign="+")
            cells = [str(epochs), method, str(len(padded[method])), f"{share:.2f}"]
            cells += [_with_error(accuracy[method], 100, 2), _with_error(cross_entropy[method], 1, 3)]
            lines.append("| " + " | ".join([*cells, "" if method == UNIFORM else difference]) + " |")
    return "\n".join(lines)


def _with_error(values: list[float], scale: float, digits: int, sign: str = "") -> str:
    mean, error = (scale * value for value in mean_and_error(values))
    text = f"{mean:{sign}.{digits}f}".replace("-", "−")
    return text if error != error else f"{text} ± {error:.{digits}f}"
