"""What a draw costs, for any number of examples: time per batch, start, end of a pass, bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from hf_importance.memory import ImportanceMemory
from hf_importance.sampler import ImportanceBatchSampler

KEYS = ("sampler", "examples")
EXAMPLES = tuple(10**power for power in range(3, 10))
BATCH = 32
_BATCHES = 200
_BYTES_AVAILABLE = 6e9
"""What a sampler may need at most, else it is left out at this size."""


def _importances(examples: int) -> Tensor:
    """Like those of a trained model: a few are large."""
    return torch.rand(examples).pow_(8)


class _Ours:
    """Our sampler in the middle of a training: all is known, and each batch is measured again."""

    def __init__(self, examples: int, sampling: str, known: bool = True) -> None:
        self.memory = ImportanceMemory(examples, guard=True)
        self.sampler = ImportanceBatchSampler(self.memory, BATCH, sampling=sampling)
        if known:
            self.memory.remember(_importances(examples), torch.zeros(examples, dtype=torch.bool))

    def __iter__(self) -> Iterator[Any]:
        while True:
            for draw in self.sampler:
                self.sampler.use(draw)
                self.sampler.update(draw, self.memory.importance[self.sampler.shard.local(torch.tensor(draw.index))])
                yield draw

    def bytes(self) -> int:
        """Of all tensors that stay."""
        held = {**vars(self.memory), **vars(self.sampler)}.values()
        return sum(tensor.untyped_storage().nbytes() for tensor in held if isinstance(tensor, Tensor))


def _cumulative(examples: int) -> Iterator[Tensor]:
    """The sum over all is taken anew for each batch, as importances change with each."""
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


SAMPLERS: dict[str, tuple[Callable[[int], Any], float, int]] = {  # bytes per example at the peak, most examples
    "ours, reshuffled": (lambda n: _Ours(n, "reshuffled"), 61, 10**9),
    "ours, replacement": (lambda n: _Ours(n, "replacement"), 61, 10**9),
    "ours, at the start": (lambda n: _Ours(n, "reshuffled", known=False), 61, 10**9),
    "RandomSampler": (lambda n: _endless(lambda: BatchSampler(RandomSampler(range(n)), BATCH, False)), 48, 10**9),
    "WeightedRandomSampler": (
        lambda n: _endless(lambda: BatchSampler(WeightedRandomSampler(_importances(n), n), BATCH, False)),
        64,
        2**24,
    ),
    "torch.multinomial": (_multinomial, 12, 2**24),
    "cumulative sum": (_cumulative, 12, 10**9),
}


def run(sampler: str, examples: int) -> dict[str, Any]:
    """Milliseconds: to the first batch, of a later one (median), of the one that begins the next pass."""
    make, peak, most = SAMPLERS[sampler]
    if examples > most or examples * peak > _BYTES_AVAILABLE:
        return {"left_out": f"needs more than {most:,} examples or {_BYTES_AVAILABLE / 1e9:g} GB allow"}
    start = time.perf_counter()
    made = make(examples)
    batches = iter(made)
    next(batches)
    first = time.perf_counter() - start
    seconds = []
    for _ in range(_BATCHES if examples < 10**8 else _BATCHES // 4):
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 20:
            break
    found = {"first": round(1000 * first, 4), "batch": round(1000 * statistics.median(seconds), 5)}
    if isinstance(made, _Ours):
        found["bytes"] = round(made.bytes() / examples, 2)
        start = time.perf_counter()
        made.sampler._begin_pass()
        if not made.memory.follow_updates:
            rate = made.memory.rates()
            made.sampler._shuffled_visits(rate)
        found["new_pass"] = round(1000 * (time.perf_counter() - start), 4)
    return found


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds per batch of 32; start; bytes per example."""
    sizes = sorted({found["examples"] for found in runs})
    by = {(found["sampler"], found["examples"]): found for found in runs}
    parts = []
    for figure, words in (
        ("batch", "a batch of 32"),
        ("first", "the first batch"),
        ("new_pass", "the start of a pass"),
    ):
        lines = [f"| milliseconds for {words} | " + " | ".join(f"{size:.0e}" for size in sizes) + " |"]
        lines.append("|" + "---|" * (1 + len(sizes)))
        for sampler in SAMPLERS:
            cells = [f"{value:.3g}" if (value := by.get((sampler, size), {}).get(figure)) else "" for size in sizes]
            if any(cells):
                lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
