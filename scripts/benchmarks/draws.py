"""Cost of a draw by number of examples: time per batch, to the first batch and per segment, and memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.sampler import ImportanceBatchSampler

KEYS = ("sampler", "examples")
EXAMPLES = tuple(10**power for power in range(3, 10))
BATCH = 32
_BATCHES = 200
_PATIENCE = 20.0  # seconds


def _importances(examples: int) -> Tensor:
    """Importances as of a trained model: a few are large."""
    return torch.rand(examples).pow_(8)


class _Ours:
    """Our sampler during training: importances are known, and each batch is measured again with the same result."""

    def __init__(self, examples: int, sampling: str, known: bool = True) -> None:
        self.sampler = ImportanceBatchSampler(ImportanceMemory(examples), BATCH, sampling=sampling)
        if known:
            self.sampler.restart(_importances(examples), passes=1)

    def __iter__(self) -> Iterator[Any]:
        while True:
            for draw in self.sampler:
                self.sampler.mark_used(draw)
                known = self.sampler.memory.importances[draw.index]
                self.sampler.update(draw, known.where(known.isfinite(), _importances(len(known)))[None])
                yield draw

    def plan(self) -> None:
        """The work between two draws when a segment is planned."""
        self.sampler.flush()
        self.sampler.visits.plan(BATCH)

    def bytes(self) -> int:
        """Bytes of all tensors that are kept, just after a segment was planned."""
        self.plan()
        visits = self.sampler.visits
        parts = [self.sampler.memory, visits, getattr(visits, "_strata", None)]
        held = [value for part in parts if part is not None for value in vars(part).values()]
        storages = [tensor.untyped_storage() for tensor in held if isinstance(tensor, Tensor)]
        batch = isinstance(visits, IndependentVisits)  # otherwise a segment
        planned = 0 if batch else sum(column.nbytes for column in self.sampler._planned)
        return planned + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _cumulative(examples: int) -> Iterator[Tensor]:
    """Inversion sampling with a new cumulative sum for each batch, because importances change."""
    importance = _importances(examples)
    while True:
        cumulated = importance.cumsum(0)
        yield torch.searchsorted(cumulated, torch.rand(BATCH) * cumulated[-1])


def _multinomial(examples: int) -> Iterator[Tensor]:
    importance = _importances(examples)
    while True:
        yield torch.multinomial(importance, BATCH, replacement=True)


def _endless(make: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield from make()


def _random(examples: int) -> Iterator[Any]:
    return _endless(lambda: BatchSampler(RandomSampler(range(examples)), BATCH, False))


def _weighted(examples: int) -> Iterator[Any]:
    importance = _importances(examples)
    return _endless(lambda: BatchSampler(WeightedRandomSampler(importance, examples), BATCH, False))


SAMPLERS: dict[str, tuple[Callable[[int], Any], int, int]] = {  # peak bytes per example, most examples
    "ours, reshuffled": (lambda examples: _Ours(examples, "reshuffled"), 40, 10**9),
    "ours, replacement": (lambda examples: _Ours(examples, "replacement"), 11, 10**9),
    "ours, at the start": (lambda examples: _Ours(examples, "reshuffled", known=False), 40, 10**9),
    "RandomSampler": (_random, 48, 10**9),
    "WeightedRandomSampler": (_weighted, 64, 2**24),  # the limit of torch.multinomial
    "torch.multinomial": (_multinomial, 12, 2**24),
    "cumulative sum": (_cumulative, 12, 10**9),
}


_IN_THE_MIDDLE = ("ours, reshuffled", "ours, replacement")


def run(sampler: str, examples: int) -> dict[str, Any]:
    """Milliseconds to the first batch, per later batch, and to plan a segment; bytes per example."""
    make, peak, most = SAMPLERS[sampler]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if examples > most:
        return {"left_out": f"more than {most:,} examples are refused"}
    if examples * peak > 0.75 * memory:
        return {"left_out": f"needs more than {memory / 1e9:.0f} GB"}
    start = time.perf_counter()
    made = make(examples)
    batches = iter(made)
    next(batches)
    found = {"first": round(1000 * (time.perf_counter() - start), 4)}
    if sampler in _IN_THE_MIDDLE:  # they are in the middle of training, so there is no first batch
        found = {}
    seconds: list[float] = []
    while len(seconds) < _BATCHES and sum(seconds) < _PATIENCE:
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    found["batch"] = round(1000 * statistics.median(seconds), 5)
    found["batch_mean"] = round(1000 * statistics.mean(seconds), 5)
    if isinstance(made, _Ours):
        start = time.perf_counter()
        made.plan()
        found["plan"] = round(1000 * (time.perf_counter() - start), 4)
        found["bytes"] = round(made.bytes() / examples, 2)
    return found


def tables(runs: list[dict[str, Any]]) -> str:
    """Tables in Markdown by number of examples: milliseconds, and bytes per example."""
    sizes = sorted({found["examples"] for found in runs})
    by = {(found["sampler"], found["examples"]): found for found in runs}
    parts = []
    for figure, words in (
        ("batch_mean", f"milliseconds for a batch of {BATCH}"),
        ("first", "milliseconds to the first batch"),
        ("plan", "milliseconds to plan a segment"),
        ("bytes", "bytes per example"),
    ):
        lines = [f"| {words} | " + " | ".join(f"10^{len(str(size)) - 1}" for size in sizes) + " |"]
        lines.append("|" + "---|" * (1 + len(sizes)))
        for sampler in SAMPLERS:
            found = [by.get((sampler, size), {}) for size in sizes]
            cells = [f"{run[figure]:.3g}" if figure in run else "–" for run in found]
            if any(figure in run for run in found):
                lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
