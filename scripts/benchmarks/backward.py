"""Time and memory of a step with selective backward, by the share of the rows that is kept."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from benchmarks.tables import row, rule
from hf_importance.backward.selective import SelectiveBackward

KEYS = ("model", "layers", "batch", "tokens", "way", "lengths", "device")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
ROWS, RECOMPUTED = "row gradients", "checkpointing"
WAYS = (ROWS, RECOMPUTED)
FULL, NATURAL = "full", "natural"
LENGTHS = (FULL, NATURAL)
"""All texts with all tokens, or of lengths of 1 to all of them, half on average, and padded."""
MODELS = {"BERT tiny": (128, 4), "ViT tiny": (128, 4), "BERT base": (768, 12), "ViT base": (768, 12)}
"""Width and layers of each model."""
_PLAIN = "plain"
_WORDS, _CLASSES, _PATCH = 1000, 10, 16
_REPETITIONS = 3

Batch = dict[str, Tensor]


def ideal(way: str, kept: float) -> float:
    """Cost of a step relative to one with all rows, of a deep model whose time is that of its products.

    Of a block, the forward pass is a third; with checkpointing a quarter, as it is repeated for the kept rows.

    >>> round(ideal("row gradients", 0.25), 3), ideal("checkpointing", 0.2)
    (0.5, 0.4)
    """
    return (1 + 2 * kept) / 3 if way == ROWS else (1 + 3 * kept) / 4


def run(name: str, layers: int, batch: int, tokens: int, way: str, lengths: str, device: str) -> dict[str, Any]:
    """Measure steps with each share, in alternation with plain ones.

    Args:
        name: name of the model.
        layers: number of its blocks.
        batch: number of examples.
        tokens: tokens of a text, or number of patches of an image.
        way: row gradients, or recomputation with gradient checkpointing.
        lengths: full or natural.
        device: name of the device, for the file only.
    """
    steps = Steps(_model(name, layers, tokens), _batch(name, batch, tokens, lengths), way == RECOMPUTED)
    memory, kept_share = {_PLAIN: steps.memory(None)[0]}, {}
    for kept in SHARES:
        memory[str(kept)], kept_share[str(kept)] = steps.memory(kept)
    seconds: dict[float | None, list[float]] = {kept: [] for kept in (None, *SHARES)}
    for _ in range(_REPETITIONS):
        for kept, found in seconds.items():
            found.append(steps.seconds(kept))
    low = {kept: min(found) for kept, found in seconds.items()}
    return {
        "milliseconds": round(1000 * low[None], 2),
        "share": round(steps.selective.plan.share, 4),
        "kept": kept_share,
        "ratios": {str(kept): round(low[kept] / low[None], 4) for kept in SHARES},
        "memory": memory,
        "detours": steps.selective.detours,
    }


class Steps:
    """Plain training steps of a model, and steps of a copy of it that keep a share of the rows.

    Args:
        model: the model.
        batch: the batch of all steps.
        recomputes: whether gradient checkpointing is enabled.
    """

    def __init__(self, model: nn.Module, batch: Batch, recomputes: bool) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if recomputes:
            name = "activation_checkpointing_enable"  # its name from transformers 5.23 on
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
        model = model.to(device).train()
        self._batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self._models = {True: model, False: copy.deepcopy(model)}  # by whether rows are selected
        self._optimizers = {key: torch.optim.AdamW(each.parameters(), lr=1e-5) for key, each in self._models.items()}
        self.selective = SelectiveBackward(model, "selective")
        self._step(None)
        for kept in (1.0, 1.0, 0.5, 0.5):  # finds the places, and compares gradients once
            self._step(kept)

    def seconds(self, kept: float | None) -> float:
        """Seconds of a step; of this process, on CPUs."""
        clock = _synchronised if torch.cuda.is_available() else time.process_time
        start = clock()
        self._step(kept)
        return clock() - start

    def memory(self, kept: float | None) -> tuple[int, float]:
        """Peak bytes of the tensors of a forward and backward pass, without gradients; the share of the rows kept."""
        self._pass(kept)  # makes the gradients, to which the next pass adds
        before = self.selective.rows
        peak = _peak_of(lambda: self._pass(kept))
        done, rows = (now - then for now, then in zip(self.selective.rows, before, strict=True))
        self._optimizers[kept is not None].zero_grad()
        return peak, round(done / rows, 4) if rows else 1.0

    def _step(self, kept: float | None) -> None:
        """A step that keeps a share of the rows, or a plain one."""
        self._pass(kept)
        self._optimizers[kept is not None].step()
        self._optimizers[kept is not None].zero_grad()

    def _pass(self, kept: float | None) -> None:
        selects = kept is not None
        for place in self.selective._places.values() if selects else ():
            place.planned, place.threshold.observe = kept, _ignore
        rows = len(self._batch["labels"])
        with self.selective.of(rows, must_keep=True) if selects else nullcontext():
            with _precision():
                loss = self._models[selects](**self._batch).loss
            loss.backward()


def _ignore(norm: Tensor) -> None:
    """Shares are given, so norms need not be remembered."""


def _precision() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext()


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_of(function: Callable[[], None]) -> int:
    """Peak bytes of the tensors that a function makes, beyond what there was before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write a line at each start and end
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _model(name: str, layers: int, tokens: int) -> nn.Module:
    torch.manual_seed(0)
    width, _ = MODELS[name]
    config = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(2, width // 64)}
    config |= {"intermediate_size": 4 * width, "num_labels": _CLASSES}
    if name.startswith("BERT"):
        return BertForSequenceClassification(BertConfig(vocab_size=_WORDS, **config))
    return ViTForImageClassification(ViTConfig(image_size=_side(tokens), patch_size=_PATCH, **config))


def _side(tokens: int) -> int:
    """Side of an image of so many patches."""
    return _PATCH * round(tokens**0.5)


def _batch(name: str, batch: int, tokens: int, lengths: str) -> Batch:
    labels = torch.arange(batch) % _CLASSES
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(batch, 3, _side(tokens), _side(tokens)), "labels": labels}
    length = torch.full((batch,), tokens) if lengths == FULL else torch.linspace(1, tokens, batch).round().long()
    mask = (torch.arange(tokens) < length[:, None]).long()
    ids = torch.randint(1, _WORDS, (batch, tokens)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(runs: list[dict[str, Any]]) -> str:
    """Times and memory in Markdown, relative to plain steps."""
    return f"{_table_of_times(runs)}\n\n{_table_of_memory(runs)}"


def _table_of_times(runs: list[dict[str, Any]]) -> str:
    head = ("time of a step", "batch", "way", "lengths", "plain step", *(f"{k:g} kept" for k in SHARES), "detours")
    lines = [row(head), rule(head)]
    for way in WAYS:
        lines.append(row(["ideal", "", way, "", "1", *(f"{ideal(way, k):.2f}" for k in SHARES), ""]))
    for found in runs:
        cells = [f"{found['ratios'][str(k)]:.2f} ({_expected(found, k):.2f})" for k in SHARES]
        lines.append(
            row([*_names(found), f"{found['milliseconds']:,.0f} ms", *cells, ", ".join(found["detours"]) or "none"])
        )
    return "\n".join(lines)


def _expected(found: dict[str, Any], kept: float) -> float:
    """Relative cost if only products cost time, and these in proportion to the rows below the places."""
    return 1 - found["share"] * (1 - found["kept"][str(kept)])


def _table_of_memory(runs: list[dict[str, Any]]) -> str:
    head = ("peak memory of a step", "batch", "way", "lengths", "plain step", *(f"{k:g} kept" for k in SHARES))
    lines = [row(head), rule(head)]
    for found in runs:
        plain = found["memory"][_PLAIN]
        cells = [f"{found['memory'][str(k)] / plain:.2f}" for k in SHARES]
        lines.append(row([*_names(found), f"{plain / 1e6:,.0f} MB", *cells]))
    return "\n".join(lines)


def _names(found: dict[str, Any]) -> list[str]:
    size = f"{found['batch']} × {found['tokens']}"
    return [f"{found['model']}, {found['layers']} layers, {found['device']}", size, found["way"], found["lengths"]]
