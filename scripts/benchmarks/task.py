"""What a task is: data in memory, a model, and the full training."""

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
"""Label of a token that has no loss."""
_EVALUATED = 100
"""Examples at a time."""


@dataclass
class Task:
    """Data in memory, how to make a model of it, and the full training.

    Args:
        train: `[examples, …]` each; the labels are called `labels`, the others are arguments of the model. Texts are
            padded to the longest of all; batches are cut to their longest one, see [`Rows`].
        test: likewise.
        model: makes a new one.
        epochs: passes over the data of the full training.
        batch: examples per step.
        learning_rate: at its highest; the best for uniform sampling, by test cross-entropy or error.
        weight_decay: of AdamW.
        bf16: whether the forward pass is in mixed precision.
        shifts: whether a token is predicted from those before it.
        also: what else is told of the trained model.
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
        """Of the training data."""
        return len(self.train["labels"])

    @property
    def classes(self) -> int:
        """Number of them; 0 if the labels are numbers to predict."""
        labels = self.train["labels"]
        return 0 if labels.is_floating_point() else int(labels.max()) + 1

    def arguments(self, folder: str, steps: int, seed: int, **more: Any) -> TrainingArguments:
        """Of a training whose learning rate decays to zero in so many steps."""
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
    """Examples as rows of tensors, asked for by the batch. Texts are cut to their length, batches to their longest.

    It counts the tokens of the batches that were asked for: `real` ones, and with those of the padding `padded`.
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
        """These examples, cut to the longest of them; not counted."""
        found = Batch((name, column[index]) for name, column in self.columns.items())
        if self._lengths is not None:
            tokens, longest = self.columns["attention_mask"].shape, int(self._lengths[index].max())
            found.update(
                (name, found[name][:, :longest].contiguous()) for name, x in self.columns.items() if x.shape == tokens
            )
        return found


class Batch(dict):
    """Of [`Rows`], with a first dimension for its examples."""


def collate(rows: list[Columns]) -> Columns:
    """The batch that [`Rows`] made; or one of single rows."""
    if isinstance(rows[0], Batch):
        return dict(rows[0])
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def predict(model: nn.Module, columns: Columns, shifts: bool = False) -> tuple[Tensor, Tensor]:
    """In evaluation mode: outputs `[predictions, outputs]`, and their labels `[predictions]`.

    A prediction per example; or per token that has a label.
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
    """Of data that is not embedded."""
    folder = os.environ.get("BENCHMARK_DATA")
    if folder is None or not (Path(folder) / name).exists():
        raise SystemExit(
            f"error: this task needs BENCHMARK_DATA=FOLDER, a folder with {name} (see scripts/results/README.md)."
        )
    return Path(folder) / name
