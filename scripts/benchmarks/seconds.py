"""Seconds that full trainings compute in one thread, alternating between `Trainer` and ours."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from transformers import set_seed

from benchmarks.methods import METHODS
from benchmarks.tasks import task_of

KEYS = ("task", "seed")


def run(name: str, seed: int) -> dict[str, Any]:
    """One training of each; the order alternates between seeds."""
    task = task_of(name)
    found = {}
    for method in ("uniform", "ours") if seed % 2 else ("ours", "uniform"):
        set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            trainer = METHODS[method].trainer(task, METHODS[method].steps(task, 1.0), seed, folder)
            start = time.process_time()
            trainer.train()
            found[method] = round(time.process_time() - start, 2)
    return found
