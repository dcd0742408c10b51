"""Tasks with randomly initialised models. A training takes seconds on one core."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from run_image_classification import digits
from run_text_classification import docstrings, learn_words
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.task import Columns, Task, path_of

# ---- models ----------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Linear layers with ReLU activations."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        return _output(self.layers(values), labels)


class WordPerceptron(nn.Module):
    """Mean and maximum of word embeddings, followed by a perceptron with one hidden layer."""

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
    """Scanned digits with a small vision transformer."""
    data = digits()

    def columns(split: str) -> Columns:
        pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in data[split]["image"]])
        labels = torch.tensor(data[split]["label"][:])
        return {"pixel_values": torch.from_numpy(pixels / 127.5 - 1)[:, None], "labels": labels}

    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config |= {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return Task(columns("train"), columns("test"), lambda: ViTForImageClassification(ViTConfig(**config)), 10, 32, 1e-3)


def docstrings_task(longest: int = 48) -> Task:
    """First paragraphs of docstrings, classified by package."""
    data = docstrings()
    tokenizer = learn_words(data["train"]["text"], longest)

    def columns(split: str) -> Columns:
        padded = {"truncation": True, "max_length": longest, "padding": "max_length", "return_tensors": "pt"}
        encoded = tokenizer(data[split]["text"][:], **padded)
        labels = torch.tensor(data[split]["label"][:])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    classes = data["train"].features["label"].num_classes
    return Task(columns("train"), columns("test"), lambda: WordPerceptron(len(tokenizer), classes), 8, 32, 1e-3)


def fashion_mnist_task() -> Task:
    """Images of clothes with a perceptron."""
    arrays = np.load(path_of("fashion_mnist.npz"))

    def columns(split: str) -> Columns:
        pixels = torch.from_numpy(arrays[f"{split}_images"]).flatten(1).float() / 127.5 - 1
        return {"values": pixels, "labels": torch.from_numpy(arrays[f"{split}_labels"]).long()}

    return Task(columns("train"), columns("test"), lambda: Perceptron(784, 256, 10), 8, 128, 2e-3)


def few_images_task() -> Task:
    """The first 1,000 images of Fashion-MNIST."""
    task = fashion_mnist_task()
    train = {name: column[:1000] for name, column in task.train.items()}
    return replace(task, train=train, epochs=10, batch=16, learning_rate=1e-3)


def wrong_labels_task() -> Task:
    """Fashion-MNIST with 20 % wrong labels in the training data."""
    task = fashion_mnist_task()
    return replace(task, train=with_wrong_labels(task, 0.2, seed=0)[0])


def with_wrong_labels(task: Task, share: float, seed: int) -> tuple[Columns, Tensor]:
    """Training data with a share of the labels replaced at random, and the mask of these, bool `[examples]`."""
    g = torch.Generator().manual_seed(seed)
    labels = task.train["labels"].clone()
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=g)[: round(share * len(labels))]] = True
    other = torch.randint(1, task.classes, (int(wrong.sum()),), generator=g)
    labels[wrong] = (labels[wrong] + other) % task.classes
    return {**task.train, "labels": labels}, wrong


def imbalanced_task(most_to_least: float = 100.0) -> Task:
    """Fashion-MNIST with class sizes from 6,000 down to 60; the test data is balanced."""
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
