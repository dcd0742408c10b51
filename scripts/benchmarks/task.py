"""Benchmark tasks: data in memory, a model, and the full training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

Columns = dict[str, Tensor]
IGNORED = -100
"""Label of a token without a loss."""
_EVALUATED = 100
"""Examples per evaluation batch."""


@dataclass
class Task:
    """Data in memory, a model, and the full training.

    Args:
        train: `[examples, …]` each; labels are called `labels`, the other columns are arguments of the model. Texts are
            padded to the longest of all; batches are truncated to their longest text, see [`Rows`].
        test: test data in the same form.
        model: creates a new model.
        epochs: epochs of the full training.
        batch: examples per step.
        learning_rate: peak learning rate, the best one for uniform sampling by test cross-entropy or error.
        weight_decay: weight decay of AdamW.
        bf16: whether the forward pass uses mixed precision.
        shifts: whether tokens are predicted from the previous ones.
        also: computes more figures of the trained model.
    """

    train: Columns
    test: Columns
    model: Callable[[], nn.Module]
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    bf16: bool = False
    shifts: bool = False
    also: Callable[[nn.Module], dict[str, Any]] | None = None

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.train["labels"])

    @property
    def classes(self) -> int:
        """Number of classes; 0 for regression."""
        labels = self.train["labels"]
        return 0 if labels.is_floating_point() else int(labels.max()) + 1

    def arguments(self, folder: str, steps: int, seed: int, **more: Any) -> TrainingArguments:
        """Training arguments for this number of steps, in which the learning rate decays to zero."""
        return TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=0.05,
            seed=seed,
            save_strategy="no",
            logging_steps=max(1, steps // 20),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=self.bf16,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            **more,
        )


class Rows(torch.utils.data.Dataset):
    """Dataset that returns whole batches of tensors, truncated to their longest text.

    It counts the tokens of the returned batches: `real` without padding, `padded` with padding.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.real = self.padded = 0
        mask = columns.get("attention_mask")
        self._lengths = None if mask is None else mask.sum(1)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> Columns:
        return {name: column[0] for name, column in self.take(torch.tensor([index])).items()}

    def __getitems__(self, indices: list[int]) -> list[Columns]:
        batch = self.take(torch.tensor(indices))
        if self._lengths is not None:
            self.real += int(batch["attention_mask"].sum())
            self.padded += batch["attention_mask"].numel()
        return [batch]

    def take(self, index: Tensor) -> Batch:
        """A batch of these examples, truncated to the longest; not counted."""
        found = Batch((name, column[index]) for name, column in self.columns.items())
        if self._lengths is not None:
            tokens, longest = self.columns["attention_mask"].shape, int(self._lengths[index].max())
            found.update(
                (name, found[name][:, :longest].contiguous()) for name, x in self.columns.items() if x.shape == tokens
            )
        return found


class Batch(dict):
    """A batch of [`Rows`], with examples along the first dimension."""


def collate(rows: list[Columns]) -> Columns:
    """Return the batch of [`Rows`], or stack single rows."""
    if isinstance(rows[0], Batch):
        return dict(rows[0])
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def predict(model: nn.Module, columns: Columns, shifts: bool = False) -> tuple[Tensor, Tensor]:
    """Outputs `[predictions, outputs]` in evaluation mode, and labels `[predictions]`.

    There is one prediction per example, or per token with a label.
    """
    model.eval()
    rows, found = Rows(columns), []
    for index in range(0, len(rows), _EVALUATED):
        (batch,) = rows.__getitems__(list(range(index, min(index + _EVALUATED, len(rows)))))
        labels = batch.pop("labels")
        outputs = model(**batch).logits
        if labels.dim() > 1:
            outputs, labels = (outputs[:, :-1], labels[:, 1:]) if shifts else (outputs, labels)
            outputs, labels = outputs[labels != IGNORED], labels[labels != IGNORED]
        found.append((outputs, labels))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def path_of(name: str) -> Path:
    """Path of data that is not embedded."""
    folder = os.environ.get("BENCHMARK_DATA")
    if folder is None or not (Path(folder) / name).exists():
        raise SystemExit(
            f"error: this task needs BENCHMARK_DATA=FOLDER, a folder with {name} (see scripts/results/README.md)."
        )
    return Path(folder) / name
