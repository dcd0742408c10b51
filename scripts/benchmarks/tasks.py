"""What is learnt: data in memory, a model, and the full training. A run takes seconds on one core."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from embedded_data import digits, docstrings
from run_text_classification import TextArguments, learn_words
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

Columns = dict[str, Tensor]


@dataclass
class Task:
    """Data in memory, how to make a model of it, and the full training.

    Args:
        train: `[examples, …]` each; the labels are called `labels`, the others are arguments of the model.
        test: likewise.
        model: makes a new one.
        epochs: passes over the data of the full training.
        batch: examples per step.
        learning_rate: at its highest; the best for uniform sampling, by test cross-entropy or error.
        weight_decay: of AdamW.
        bf16: whether the forward pass is in mixed precision.
    """

    train: Columns
    test: Columns
    model: Callable[[], nn.Module]
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    bf16: bool = False

    @property
    def classes(self) -> int:
        """Number of them; 0 if the labels are numbers to predict."""
        labels = self.train["labels"]
        return 0 if labels.is_floating_point() else int(labels.max()) + 1

    def arguments(self, folder: str, steps: int, seed: int) -> TrainingArguments:
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
        )


class Rows(torch.utils.data.Dataset):
    """Examples as rows of tensors, asked for by the batch."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> Columns:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> list[Columns]:
        index = torch.tensor(indices)
        return [{name: column[index] for name, column in self.columns.items()}]


def collate(rows: list[Columns]) -> Columns:
    """The batch that [`Rows`] made; or one of single rows."""
    if rows[0]["labels"].dim() > 0 and len(rows) == 1:
        return dict(rows[0])
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def predict(model: nn.Module, columns: Columns) -> Tensor:
    """`[examples, outputs]`, in evaluation mode."""
    model.eval()
    inputs = {name: column for name, column in columns.items() if name != "labels"}
    parts = zip(*(column.split(500) for column in inputs.values()), strict=True)
    return torch.cat([model(**dict(zip(inputs, part, strict=True))).logits for part in parts])


# ---- models ----------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Linear layers with ReLU in between."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        return _output(self.layers(values), labels)


class WordPerceptron(nn.Module):
    """Mean and maximum of word embeddings, then a perceptron of one hidden layer."""

    def __init__(self, words: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = nn.Sequential(nn.Linear(2 * width, 256), nn.ReLU(), nn.Linear(256, classes))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        embedded, mask = self.embedding(input_ids), attention_mask[..., None].bool()
        mean = embedded.where(mask, 0.0).sum(1) / mask.sum(1)
        largest = embedded.where(mask, -1e4).amax(1)
        return _output(self.layers(torch.cat([mean, largest], 1)), labels)


def _output(logits: Tensor, labels: Tensor | None) -> SequenceClassifierOutput:
    loss = None
    if labels is not None:
        number = labels.is_floating_point()
        loss = (
            nn.functional.mse_loss(logits.flatten(), labels) if number else nn.functional.cross_entropy(logits, labels)
        )
    return SequenceClassifierOutput(loss=loss, logits=logits)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def digits_task() -> Task:
    """Scanned digits, a small vision transformer."""
    data = digits()

    def columns(split: str) -> Columns:
        pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in data[split]["image"]])
        labels = torch.tensor(data[split]["label"][:])
        return {"pixel_values": torch.from_numpy(pixels / 127.5 - 1)[:, None], "labels": labels}

    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config |= {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return Task(columns("train"), columns("test"), lambda: ViTForImageClassification(ViTConfig(**config)), 10, 32, 1e-3)


def docstrings_task(longest: int = 48) -> Task:
    """First paragraphs of docstrings, told apart by their package."""
    data = docstrings()
    tokenizer = learn_words(data["train"]["text"], TextArguments(max_seq_length=longest))

    def columns(split: str) -> Columns:
        padded = {"truncation": True, "max_length": longest, "padding": "max_length", "return_tensors": "pt"}
        encoded = tokenizer(data[split]["text"][:], **padded)
        labels = torch.tensor(data[split]["label"][:])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    classes = data["train"].features["label"].num_classes
    return Task(columns("train"), columns("test"), lambda: WordPerceptron(len(tokenizer), classes), 8, 32, 1e-3)


def fashion_mnist_task() -> Task:
    """Images of clothes, a perceptron."""
    arrays = np.load(_path_of("fashion_mnist", "FASHION_MNIST", "an npz file with its four arrays"))

    def columns(split: str) -> Columns:
        pixels = torch.from_numpy(arrays[f"{split}_images"]).flatten(1).float() / 127.5 - 1
        return {"values": pixels, "labels": torch.from_numpy(arrays[f"{split}_labels"]).long()}

    return Task(columns("train"), columns("test"), lambda: Perceptron(784, 256, 10), 8, 128, 2e-3)


def wrong_labels_task() -> Task:
    """Fashion-MNIST with 20 % wrong labels in the training data."""
    task = fashion_mnist_task()
    return replace(task, train=with_wrong_labels(task, 0.2, seed=0)[0])


def with_wrong_labels(task: Task, share: float, seed: int) -> tuple[Columns, Tensor]:
    """The training data with a share of the labels changed to another one at random; bool `[examples]`: which."""
    g = torch.Generator().manual_seed(seed)
    labels = task.train["labels"].clone()
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=g)[: round(share * len(labels))]] = True
    other = torch.randint(1, task.classes, (int(wrong.sum()),), generator=g)
    labels[wrong] = (labels[wrong] + other) % task.classes
    return {**task.train, "labels": labels}, wrong


def imbalanced_task(most_to_least: float = 100.0) -> Task:
    """Fashion-MNIST with class sizes that fall from 6,000 to 60; the test data stay balanced."""
    task = fashion_mnist_task()
    labels = task.train["labels"]
    kept = []
    for label in range(task.classes):
        found = (labels == label).nonzero().flatten()
        kept.append(found[: round(len(found) * most_to_least ** (-label / (task.classes - 1)))])
    index = torch.cat(kept)
    return replace(
        task,
        train={name: column[index] for name, column in task.train.items()},
        batch=64,
        epochs=10,
        learning_rate=1e-3,
    )


def polynomial_task() -> Task:
    """A polynomial of order 6 with noise, fitted by its seven coefficients."""
    g = torch.Generator().manual_seed(0)
    coefficients = torch.randn(7, generator=g)

    def columns(examples: int, noise: float) -> Columns:
        powers = (torch.rand(examples, 1, generator=g) * 2 - 1) ** torch.arange(7)
        values = powers @ coefficients + noise * torch.randn(examples, generator=g)
        return {"values": powers, "labels": values}

    return Task(columns(5000, 0.1), columns(5000, 0.0), lambda: Perceptron(7, 1), 10, 32, 1e-1, weight_decay=0.0)


def image_task() -> Task:
    """The grey values of a photograph, fitted by a perceptron on coordinates; tested on the same pixels."""
    photograph = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float32).mean(2) / 255
    grey = nn.functional.avg_pool2d(photograph[None, None], 4)[0, 0]
    axes = [torch.linspace(-1, 1, size) for size in grey.shape]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 2)
    angles = (place[..., None] * torch.pi * 2.0 ** torch.arange(6)).flatten(1)
    pixels = {"values": torch.cat([angles.sin(), angles.cos()], 1), "labels": grey.flatten()}
    return Task(pixels, pixels, lambda: Perceptron(24, 128, 128, 1), 10, 64, 1e-2, weight_decay=0.0)


def banking77_task(examples: int = 3000, longest: int = 24) -> Task:
    """Questions of customers of a bank, 77 intents; all-MiniLM-L6-v2, all of its weights.

    Of the 10,003 training examples so many, and of each so many tokens (all of four fifths of them), that a training
    takes minutes on one core.
    """
    folder = _path_of("banking77", "BANKING77", "a folder with train.csv and test.csv, columns text and category")
    model = os.environ.get("MINILM", "sentence-transformers/all-MiniLM-L6-v2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tables = {split: pd.read_csv(Path(folder) / f"{split}.csv") for split in ("train", "test")}
    tables["train"] = tables["train"].sample(examples, random_state=0)
    names = sorted(tables["test"]["category"].unique())

    def columns(split: str) -> Columns:
        padded = {"truncation": True, "max_length": longest, "padding": "max_length", "return_tensors": "pt"}
        encoded = tokenizer(tables[split]["text"].tolist(), **padded)
        labels = torch.tensor(tables[split]["category"].map(names.index).tolist())
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    def new() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=len(names))

    return Task(columns("train"), columns("test"), new, 8, 32, 5e-4, bf16=True)


TASKS: dict[str, Callable[[], Task]] = {
    "digits": digits_task,
    "docstrings": docstrings_task,
    "fashion_mnist": fashion_mnist_task,
    "wrong_labels": wrong_labels_task,
    "imbalanced": imbalanced_task,
    "polynomial": polynomial_task,
    "image": image_task,
    "banking77": banking77_task,
}


def _path_of(data: str, variable: str, what: str) -> str:
    path = os.environ.get(variable)
    if path is None:
        raise SystemExit(f"error: the tasks with {data} need {variable}=PATH, {what}.")
    return path


@functools.cache
def task_of(name: str) -> Task:
    """Made once per process."""
    return TASKS[name]()
