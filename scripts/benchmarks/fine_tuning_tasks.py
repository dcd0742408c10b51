"""Tasks of `fine_tuning`: pretrained encoders on data of natural length; and of `networks`: networks from scratch.

Data and models are folders of the user: `sst2/train.tsv`, …, see scripts/results/README.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from run_text_classification import docstrings
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from benchmarks.pretrained import KINDS, functions
from benchmarks.task import IGNORED

Rows = list[dict[str, Any]]
ENCODERS = {"all-MiniLM-L6-v2": "MiniLM", "dinov2-small": "DINOv2-small"}
"""Names of the encoders by their folder."""
TESTED = 3000
"""Most examples that a model is tested on."""
_FUNCTIONS_TESTED = 1000
_LONGEST = 64  # tokens
_SIDE = 56  # pixels, four patches
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the photographs that the model was trained on


@dataclass
class Material:
    """Examples, and how they become batches.

    Args:
        train: all training examples.
        test: test examples.
        collate: makes a batch.
        labels: names or numbers of the labels; strings "B-…", "I-…" and "O" are those of entities.
        augment: changes the batches of the training at random.
    """

    train: Rows
    test: Rows
    collate: Callable[[Rows], dict[str, Tensor]]
    labels: list[Any]
    augment: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def collate_train(self, rows: Rows) -> dict[str, Tensor]:
        """A batch of the training."""
        return self.augment(self.collate(rows))


@dataclass(frozen=True)
class Recipe:
    """A task: what it is, and how a model is trained.

    Args:
        what: data, for tables.
        read: makes the [`Material`] of a folder of data, a folder of a model, and a number of training examples.
        encoder: folder of the model.
        layers: layers that the model has.
        model: class of the model.
        epochs: epochs of a training.
        learning_rate: peak of the learning rate.
        most: most examples of the training.
        is_untouched: whether it was not looked at when constants of selective backward were chosen.
        network: makes a new network with so many layers, from a number of labels; None for the pretrained encoder.
    """

    what: str
    read: Callable[[Path, Path, int], Material]
    encoder: str = "all-MiniLM-L6-v2"
    layers: int = 6
    model: Any = AutoModelForSequenceClassification
    epochs: int = 1
    learning_rate: float = 2e-4
    most: int | None = None
    is_untouched: bool = False
    network: Callable[[int, int], nn.Module] | None = None

    def settings(self) -> dict[str, Any]:
        """What is not in the coordinates of a run."""
        return {"encoder": self.encoder, "learning_rate": self.learning_rate}

    def new_model(self, models: Path, layers: int, labels: int) -> nn.Module:
        """The pretrained model with its first layers, and a new head; or a new network."""
        if self.network is not None:
            return self.network(layers, labels)
        return self.model.from_pretrained(
            models / self.encoder, dtype=torch.float32, num_labels=labels, num_hidden_layers=layers
        )


# ---- texts -----------------------------------------------------------------------------------------------------------


def _classified(data: Path, model: Path, examples: int, train: str, test: str, label: str = "label") -> Material:
    """Texts, or pairs of them, with a label each, in files."""
    tables = {split: _table(data / name) for split, name in (("train", train), ("test", test))}
    return _encoded(tables, model, examples, label)


def _signs(data: Path, model: Path, examples: int) -> Material:
    """Tweets, with the sign of the score of their sentiment."""
    tables = {split: _table(data / f"tweets_sentiment/{split}.csv") for split in ("train", "test")}
    signed = {split: table.assign(label=table.pop("score") > 0) for split, table in tables.items()}
    return _encoded(signed, model, examples)


def _docstrings(data: Path, model: Path, examples: int) -> Material:
    """Whole docstrings of installed packages, with the package."""
    tables = {split: rows.to_pandas() for split, rows in docstrings(per_package=600, whole=True).items()}
    return _encoded(tables, model, examples)


def _encoded(tables: dict[str, pd.DataFrame], model: Path, examples: int, label: str = "label") -> Material:
    names = sorted(tables["train"][label].unique().tolist())
    tokenizer = AutoTokenizer.from_pretrained(model)

    def rows(table: pd.DataFrame) -> Rows:
        texts = [list(table[name]) for name in table.columns if name != label]
        encoded = tokenizer(*texts, truncation=True, max_length=_LONGEST)["input_ids"]
        return [{"input_ids": ids, "labels": names.index(y)} for ids, y in zip(encoded, table[label], strict=True)]

    return Material(rows(_sample(tables["train"], examples)), rows(tables["test"][:TESTED]), collate_texts, names)


def _table(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return pd.read_csv(path)
    return pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False)


def _sample(table: pd.DataFrame, examples: int) -> pd.DataFrame:
    if examples > len(table):
        raise SystemExit(f"error: there are {len(table)} examples, fewer than the {examples} of --examples.")
    return table.sample(examples, random_state=0)


def _tagged(data: Path, model: Path, examples: int) -> Material:
    """Sentences with a tag per word, in files."""
    tables = {split: _sentences(data / f"conll2003/{split}.jsonl") for split in ("train", "test")}
    names = sorted({tag for tags in tables["train"]["tags"] for tag in tags})
    return _of_words(tables, names, model, examples)


def _functions(data: Path, model: Path, examples: int) -> Material:
    """Sources of the standard library, with the kind of every word."""
    sources = list(functions(examples + _FUNCTIONS_TESTED, fewest=8, most=_LONGEST))
    rows = [{"tokens": [word for word, _ in source], "tags": [KINDS[kind] for _, kind in source]} for source in sources]
    table = pd.DataFrame(rows).sample(frac=1, random_state=0)
    tables = {"train": table[_FUNCTIONS_TESTED:], "test": table[:_FUNCTIONS_TESTED]}
    return _of_words(tables, sorted(KINDS), model, examples)


def _of_words(tables: dict[str, pd.DataFrame], names: list[str], model: Path, examples: int) -> Material:
    """The first token of each word has a loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def rows(table: pd.DataFrame) -> Rows:
        words = [list(each) for each in table["tokens"]]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=_LONGEST)
        labels = [_of_first_pieces(encoded.word_ids(i), tags, names) for i, tags in enumerate(table["tags"])]
        return [{"input_ids": ids, "labels": y} for ids, y in zip(encoded["input_ids"], labels, strict=True)]

    return Material(rows(_sample(tables["train"], examples)), rows(tables["test"][:TESTED]), collate_texts, names)


def _sentences(path: Path) -> pd.DataFrame:
    return pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


def _of_first_pieces(words: Sequence[int | None], tags: Sequence[str], names: list[str]) -> list[int]:
    """Label of each token, where it is the first of a word; else `IGNORED`."""
    before = [None, *words]
    return [
        names.index(tags[word]) if word is not None and word != last else IGNORED
        for word, last in zip(words, before, strict=False)
    ]


def collate_texts(rows: Rows) -> dict[str, Tensor]:
    """A batch, padded to its longest text."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], list):
        labels = [padded(each, IGNORED) for each in labels]
    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(labels),
    }


# ---- images ----------------------------------------------------------------------------------------------------------


def photographs(data: Path, model: Path, examples: int, side: int = _SIDE) -> Material:
    """Small photographs, enlarged to this number of pixels."""
    arrays = np.load(data / "cifar10/cifar10_12k.npz")
    order = _sample(pd.DataFrame(index=range(len(arrays["train_labels"]))), examples).index.to_numpy()

    def rows(split: str, which: Any) -> Rows:
        images, labels = arrays[f"{split}_images"][which], arrays[f"{split}_labels"][which]
        return [
            {"pixel_values": torch.from_numpy(image), "labels": int(label)}
            for image, label in zip(images, labels, strict=True)
        ]

    collate = functools.partial(collate_images, side=side)
    return Material(rows("train", order), rows("test", slice(TESTED)), collate, list(range(10)))


def collate_images(rows: Rows, side: int) -> dict[str, Tensor]:
    """A batch of normalised images."""
    images = torch.stack([row["pixel_values"] for row in rows]).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1)
    if side != images.shape[-1]:
        images = nn.functional.interpolate(images, size=side, mode="bilinear", align_corners=False)
    return {"pixel_values": images, "labels": torch.tensor([row["labels"] for row in rows])}


def _files(train: str, test: str, **more: str) -> Callable[[Path, Path, int], Material]:
    return functools.partial(_classified, train=train, test=test, **more)


TASKS = {
    "sst2": Recipe("SST-2, sentiment", _files("sst2/train.tsv", "sst2/official_test.tsv")),
    "agnews": Recipe("AG News, topics", _files("agnews/train_10k.tsv", "agnews/official_test.tsv")),
    "snli": Recipe("SNLI, inference from pairs", _files("snli/train.tsv", "snli/official_test.tsv")),
    "banking77": Recipe(
        "Banking77, 77 intents",
        _files("banking77/train.csv", "banking77/test.csv", label="category"),
        epochs=3,
        learning_rate=8e-4,
    ),
    "conll2003": Recipe(
        "CoNLL-2003, entities", _tagged, model=AutoModelForTokenClassification, epochs=2, learning_rate=4e-4
    ),
    "cifar10": Recipe(
        "CIFAR-10, photographs",
        photographs,
        encoder="dinov2-small",
        layers=12,
        model=AutoModelForImageClassification,
        epochs=2,
        learning_rate=5e-5,
    ),
    "tweets": Recipe("tweets, sign of the sentiment", _signs, epochs=3, most=3400, is_untouched=True),
    "docstrings": Recipe("docstrings, package", _docstrings, epochs=2, most=2000, is_untouched=True),
    "functions": Recipe(
        "words of Python code, kind",
        _functions,
        model=AutoModelForTokenClassification,
        epochs=2,
        learning_rate=4e-4,
        most=2000,
        is_untouched=True,
    ),
}
"""Tasks by name."""
