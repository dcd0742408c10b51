"""Tasks that fine-tune a pretrained model. A training takes about a minute on one core.

The data is in the folder BENCHMARK_DATA. The models are all-MiniLM-L6-v2 and MobileNetV2, from the Hub or from the
folder BENCHMARK_MODELS.
"""

from __future__ import annotations

import contextlib
import functools
import io
import keyword
import os
import re
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from run_language_modeling import signatures
from run_text_classification import docstrings, learn_words
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from benchmarks.task import IGNORED, Columns, Rows, Task, collate, path_of

_ENCODER, _CNN = "sentence-transformers/all-MiniLM-L6-v2", "google/mobilenet_v2_1.0_224"
_LAYERS = 2
"""Layers of the encoder that are used, of six."""


def banking77_task(layers: int = _LAYERS) -> Task:
    """Questions of bank customers with 77 intents."""
    data = {split: pd.read_csv(path_of(f"banking77/{split}.csv")) for split in ("train", "test")}
    names = sorted(data["test"]["category"].unique())
    columns = {
        split: _encoded(table["text"], torch.tensor(table["category"].map(names.index).to_numpy()), longest=24)
        for split, table in data.items()
    }
    return Task(**columns, model=_classifier(len(names), layers), epochs=3, batch=32, learning_rate=6e-4)


def banking77_six_layers_task() -> Task:
    """As `banking77_task`, with all six layers."""
    return banking77_task(layers=6)


def tweets_task() -> Task:
    """Sentiment of tweets, from −4 to 4."""
    data = {split: pd.read_csv(path_of(f"tweets_sentiment/{split}.csv")) for split in ("train", "test")}
    columns = {
        split: _encoded(table["text"], torch.tensor(table["score"].to_numpy(), dtype=torch.float32), longest=48)
        for split, table in data.items()
    }
    return Task(**columns, model=_classifier(1), epochs=3, batch=32, learning_rate=5e-4)


def whole_docstrings_task(longest: int = 256, per_package: int = 150, tested: int = 330) -> Task:
    """Whole docstrings of natural length, classified by package."""
    data = docstrings(per_package, whole=True)
    columns = {
        split: _encoded(data[split]["text"][:most], torch.tensor(data[split]["label"][:most]), longest)
        for split, most in (("train", None), ("test", tested))
    }
    classes = data["train"].features["label"].num_classes
    return Task(**columns, model=_classifier(classes), epochs=3, batch=16, learning_rate=6e-4)


def clothes_task(examples: int = 3000, tested: int = 1000, size: int = 64) -> Task:
    """A part of Fashion-MNIST with a convolutional network pretrained on photographs."""
    arrays = np.load(path_of("fashion_mnist.npz"))
    model = _model_path(_CNN, "mobilenet_v2")

    def columns(split: str, most: int) -> Columns:
        grey = torch.from_numpy(arrays[f"{split}_images"][:most]).float()[:, None] / 127.5 - 1
        pixels = nn.functional.interpolate(grey, size=size, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
        return {"pixel_values": pixels, "labels": torch.from_numpy(arrays[f"{split}_labels"][:most]).long()}

    def new() -> nn.Module:
        settings = {"num_labels": 10, "ignore_mismatched_sizes": True}
        network = AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32, **settings)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # with .997 of the model, the last batch alone would determine the statistics
        return network

    return Task(
        train=columns("train", examples),
        test=columns("test", tested),
        model=new,
        epochs=3,
        batch=32,
        learning_rate=1e-3,
    )


# ---- kinds of names --------------------------------------------------------------------------------------------------

KINDS = ("keyword", "defined", "called", "attribute", "named argument", "other name", "number", "string")


def names_task(examples: int = 2500, tested: int = 500, longest: int = 96) -> Task:
    """Kinds of words in sources of the standard library without punctuation; labels per token."""
    tokenizer = _tokenizer()
    sources = list(functions(examples + tested, fewest=8, most=longest))
    order = np.random.default_rng(0).permutation(len(sources))

    def columns(part: np.ndarray) -> Columns:
        words = [[word for word, _ in sources[i]] for i in part]
        encoded = tokenizer(words, is_split_into_words=True, **_padded(longest))
        labels = torch.full_like(encoded["input_ids"], IGNORED)
        for row, i in enumerate(part):
            before = None
            for place, word in enumerate(encoded.word_ids(row)):
                if word is not None and word != before:  # the first piece of a word
                    labels[row, place] = sources[i][word][1]
                before = word
        return {**_inputs(encoded), "labels": labels}

    def new() -> nn.Module:
        return _encoder(AutoModelForTokenClassification, num_labels=len(KINDS), num_hidden_layers=_LAYERS)

    return Task(
        train=columns(order[:examples]),
        test=columns(order[examples:]),
        model=new,
        epochs=2,
        batch=16,
        learning_rate=6e-4,
    )


def functions(number: int, fewest: int, most: int) -> Iterator[list[tuple[str, int]]]:
    """Words of functions of the standard library with their kinds, from functions with a suitable length."""
    found = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for source in re.split(r"\n(?=\s*def )", path.read_text(encoding="utf-8")):
            words = list(_kinds(source))
            if source.lstrip().startswith("def ") and fewest <= len(words) <= most:
                yield words
                found += 1
                if found == number:
                    return


def _kinds(source: str) -> Iterator[tuple[str, int]]:
    """Words of a source with their kinds, as far as it can be parsed."""
    tokens = []
    with contextlib.suppress(tokenize.TokenError, IndentationError):  # a source is only part of a file
        tokens.extend(tokenize.generate_tokens(io.StringIO(source).readline))
    tokens = [token for token in tokens if token.string.strip() and token.type != tokenize.COMMENT]
    for i, token in enumerate(tokens):
        before = tokens[i - 1].string if i else ""
        after = tokens[i + 1].string if i + 1 < len(tokens) else ""
        kind = _kind(token, before, after)
        if kind is not None:
            yield token.string[:20], KINDS.index(kind)


def _kind(token: tokenize.TokenInfo, before: str, after: str) -> str | None:
    if token.type == tokenize.NUMBER:
        return "number"
    if token.type == tokenize.STRING:
        return "string"
    if token.type != tokenize.NAME:
        return None
    if keyword.iskeyword(token.string):
        return "keyword"
    if before in ("def", "class"):
        return "defined"
    if after == "(":
        return "called"
    if before == ".":
        return "attribute"
    return "named argument" if after == "=" and before in ("(", ",") else "other name"


# ---- a language model ------------------------------------------------------------------------------------------------

_LONGEST_PROMPT = _LONGEST_ANSWER = 48


def completions_task(examples: int = 6000, tested: int = 400) -> Task:
    """A small Llama that completes a signature with the first sentence of its docstring, whose tokens have the loss.

    It is pretrained on other docstrings. The length of the sentences that it generates is reported as well.
    """
    data = signatures()
    tokenizer = learn_words([*data["train"]["prompt"], *data["train"]["completion"]], _LONGEST_PROMPT)

    def columns(split: str, most: int) -> Columns:
        limits = {"truncation": True, "max_length": _LONGEST_PROMPT}
        prompts = tokenizer(data[split]["prompt"][:most], **limits)["input_ids"]
        answers = tokenizer(data[split]["completion"][:most], **limits)["input_ids"]
        ids = [[*prompt, *answer[1:]] for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[IGNORED] * len(p) + answer[1:] for p, answer in zip(prompts, answers, strict=True)]
        return {
            "input_ids": _rectangle(ids, tokenizer.pad_token_id),
            "attention_mask": _rectangle([[1] * len(row) for row in ids], 0),
            "labels": _rectangle(labels, IGNORED),
        }

    test = columns("test", tested)
    known = {sentence for split in data for sentence in data[split]["completion"]}
    state = _pretrained_on_docstrings(tokenizer, known).state_dict()

    def new() -> nn.Module:
        model = _llama(tokenizer)
        model.load_state_dict(state)
        return model

    return Task(
        train=columns("train", examples),
        test=test,
        model=new,
        epochs=3,
        batch=16,
        learning_rate=2e-3,
        shifts=True,
        also=functools.partial(_written, test=test, tokenizer=tokenizer),
    )


def _llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    size = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **size, **ids))


def _pretrained_on_docstrings(tokenizer: PreTrainedTokenizerBase, without: set[str], longest: int = 64) -> nn.Module:
    """A model trained on docstrings, except those that start with a sentence in `without`."""
    texts = [text for rows in docstrings(1200, whole=True).values() for text in rows["text"]]
    texts = [text for text in texts if re.split(r"(?<=[.:])\s", text)[0] not in without]
    inputs = _inputs(tokenizer(texts, **_padded(longest)))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    set_seed(0)
    task = Task({**inputs, "labels": labels}, {}, lambda: _llama(tokenizer), 2, 32, 2e-3, shifts=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = task.arguments(folder, task.epochs * task.examples // task.batch, seed=0)
        trainer = Trainer(task.model(), arguments, train_dataset=Rows(task.train), data_collator=collate)
        trainer.train()
    return trainer.model


@torch.no_grad()
def _written(model: nn.Module, test: Columns, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Mean length of greedy completions of the test prompts, and of the reference completions."""
    answered = test["labels"] != IGNORED
    prompts = (test["attention_mask"].bool() & ~answered).sum(1)
    place = torch.arange(int(prompts.max())) - (int(prompts.max()) - prompts)[:, None]  # padded on the left
    mask = (place >= 0).long()
    ids = test["input_ids"].gather(1, place.clamp(min=0)).masked_fill(mask == 0, tokenizer.pad_token_id)
    written = [
        model.generate(
            input_ids=part,
            attention_mask=shown,
            max_new_tokens=_LONGEST_ANSWER,
            do_sample=False,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, ids.shape[1] :]
        for part, shown in zip(ids.split(100), mask.split(100), strict=True)
    ]
    lengths = torch.cat([(part != tokenizer.pad_token_id).sum(1) for part in written]).double()
    return {"written": lengths.mean().item(), "written_by_people": answered.sum(1).double().mean().item()}


# ---- texts and models ------------------------------------------------------------------------------------------------


def _encoded(texts: Any, labels: Tensor, longest: int) -> Columns:
    return {**_inputs(_tokenizer()(list(texts), **_padded(longest))), "labels": labels}


def _padded(longest: int) -> dict[str, Any]:
    return {"truncation": True, "max_length": longest, "padding": True, "return_tensors": "pt"}


def _inputs(encoded: Any) -> Columns:
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _rectangle(rows: list[list[int]], fill: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def _classifier(outputs: int, layers: int = _LAYERS) -> Callable[[], nn.Module]:
    return functools.partial(_encoder, AutoModelForSequenceClassification, num_labels=outputs, num_hidden_layers=layers)


def _encoder(cls: Any, **config: Any) -> nn.Module:
    return cls.from_pretrained(_model_path(_ENCODER), dtype=torch.float32, **config)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(_model_path(_ENCODER))


def _model_path(name: str, folder: str | None = None) -> str:
    local = Path(os.environ.get("BENCHMARK_MODELS", "")) / (folder or name.split("/")[1])
    return str(local) if "BENCHMARK_MODELS" in os.environ else name
