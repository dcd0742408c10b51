"""Texts of their natural length: is the padding saved, are steps and tokens saved, does what is written stay as long?

`labels`: docstrings, classified by package, by a small BERT. `completions`: the first sentence of a docstring written
for a signature, by a small Llama. Both from scratch.
"""

from __future__ import annotations

import functools
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from embedded_data import docstrings, signatures
from run_text_classification import TextArguments, learn_words
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.results import grouped, mean_and_error
from hf_importance import ImportanceConfig, ImportanceTrainer

KEYS = ("task", "method", "seed")
TASKS = ("labels", "completions")
ALL_STEPS = ImportanceConfig(budget=1.0)
METHODS = {  # settings, if it is not `Trainer`, and whether texts are grouped by length
    "uniform": (None, False),
    "uniform, grouped": (None, True),
    "ours, all steps": (ALL_STEPS, False),
    "ours, all steps, grouped": (ALL_STEPS, True),
    "ours": (ImportanceConfig(), False),
    "ours, grouped": (ImportanceConfig(), True),
    "ours, pruned": (ImportanceConfig(budget=1.0, prune_mass=0.1), False),
}
_LONGEST, _LONGEST_ANSWER = 128, 48
_WRITTEN = 400
"""Completions that are written, of the test data."""
_BATCH, _EPOCHS, _LEARNING_RATE = 16, 5, 1e-3


class Padded:
    """Collates rows, and counts the tokens."""

    def __init__(self, pad: int) -> None:
        self._fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}
        self.real = self.all = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch."""
        batch = {name: [torch.tensor(row[name]) for row in rows] for name in self._fill}
        if batch["labels"][0].dim():
            labels = pad_sequence(batch["labels"], batch_first=True, padding_value=-100)
        else:
            labels = torch.stack(batch["labels"])
        padded = {
            name: pad_sequence(batch[name], batch_first=True, padding_value=self._fill[name])
            for name in ("input_ids", "attention_mask")
        }
        self.real += int(padded["attention_mask"].sum())
        self.all += padded["attention_mask"].numel()
        return {**padded, "labels": labels}


def run(task: str, method: str, seed: int) -> dict[str, Any]:
    """One training, and what came of it."""
    train, test, tokenizer = _data(task)
    importance, by_length = METHODS[method]
    set_seed(seed)
    collate = Padded(tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=_EPOCHS,
            per_device_train_batch_size=_BATCH,
            learning_rate=_LEARNING_RATE,
            warmup_steps=0.05,
            weight_decay=0.01,
            seed=seed,
            train_sampling_strategy="group_by_length" if by_length else "random",
            save_strategy="no",
            logging_steps=100,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        given = {"model": _model(task, tokenizer), "args": arguments, "train_dataset": train, "data_collator": collate}
        trainer = Trainer(**given) if importance is None else ImportanceTrainer(importance=importance, **given)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    found = {
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "share_of_steps": round(trainer.state.global_step / (_EPOCHS * -(-len(train) // _BATCH)), 4),
        "tokens": collate.real,
        "padded": collate.all,
    }
    model = trainer.model.eval()
    return found | (_written(model, test, tokenizer) if task == "completions" else _classified(model, test, tokenizer))


def _model(task: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    size = {"vocab_size": len(tokenizer), "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"intermediate_size": 192, "max_position_embeddings": 2 * _LONGEST, "pad_token_id": tokenizer.pad_token_id}
    if task == "labels":
        return BertForSequenceClassification(BertConfig(**size, num_labels=11))
    return LlamaForCausalLM(LlamaConfig(**size, eos_token_id=tokenizer.sep_token_id, bos_token_id=None))


@functools.cache
def _data(task: str) -> tuple[Any, Any, PreTrainedTokenizerBase]:
    """Rows of training and test data, of natural length, and the tokenizer."""
    data = docstrings() if task == "labels" else signatures()
    columns = ["text"] if task == "labels" else ["prompt", "completion"]
    texts = [text for column in columns for text in data["train"][column]]
    tokenizer = learn_words(texts, TextArguments(max_seq_length=_LONGEST))

    def with_label(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["text"], truncation=True, max_length=_LONGEST)["input_ids"]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row["label"]}

    def with_completion(row: dict[str, Any]) -> dict[str, Any]:
        limits = {"truncation": True, "max_length": _LONGEST_ANSWER}
        prompt, answer = (tokenizer(row[name], **limits)["input_ids"] for name in columns)
        ids = prompt + answer[1:]  # [CLS] signature [SEP] sentence [SEP]
        labels = [-100] * len(prompt) + answer[1:]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "prompt_length": len(prompt)}

    prepare = with_label if task == "labels" else with_completion
    prepared = data.map(prepare, remove_columns=data["train"].column_names)
    return prepared["train"], prepared["test"], tokenizer


@torch.no_grad()
def _classified(model: PreTrainedModel, test: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    loss, right = 0.0, 0
    for batch in _batches(test, tokenizer):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    return {"loss": round(loss / len(test), 5), "accuracy": round(right / len(test), 5)}


@torch.no_grad()
def _written(model: PreTrainedModel, test: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The loss per token of the test completions, and how long those are that the model writes itself, to their end."""
    loss, count = 0.0, 0
    for batch in _batches(test, tokenizer):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss += F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        count += int((labels != -100).sum())
    lengths, expected = [], []
    for start in range(0, min(_WRITTEN, len(test)), 100):
        rows = test[start : start + 100]
        pairs = list(zip(rows["input_ids"], rows["prompt_length"], strict=True))
        prompts = [torch.tensor(ids[:n]) for ids, n in pairs]
        expected += [len(ids) - n for ids, n in pairs]
        ids = pad_sequence(prompts, True, tokenizer.pad_token_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, padding_side="left")
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=_LONGEST_ANSWER,
            do_sample=False,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        lengths += (out[:, ids.shape[1] :] != tokenizer.pad_token_id).sum(1).tolist()
    return {
        "loss": round(loss / count, 5),
        "written": round(sum(lengths) / len(lengths), 3),
        "written_by_people": round(sum(expected) / len(expected), 3),
    }


def _batches(test: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    collate = Padded(tokenizer.pad_token_id)
    order = sorted(range(len(test)), key=lambda i: len(test[i]["input_ids"]))
    for start in range(0, len(order), 64):
        yield collate([test[i] for i in order[start : start + 64]])


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown, a table per task."""
    return "\n\n".join(_table(task, [found for found in runs if found["task"] == task]) for task in TASKS)


def _table(task: str, runs: list[dict[str, Any]]) -> str:
    last = "accuracy, %" if task == "labels" else "tokens written"
    lines = [f"| {task} | steps | tokens | padding | loss | {last} | seconds |", "|---|---|---|---|---|---|---|"]
    whole = {found["seed"]: found["tokens"] for found in runs if found["method"] == "uniform"}
    for method in METHODS:
        same = [found for found in runs if found["method"] == method and found["seed"] in whole]
        if not same:
            continue
        shares = {
            "steps": [found["share_of_steps"] for found in same],
            "tokens": [found["tokens"] / whole[found["seed"]] for found in same],
            "padding": [1 - found["tokens"] / found["padded"] for found in same],
        }
        cells = [f"{mean_and_error(values)[0]:.2f}" for values in shares.values()]
        loss, error = mean_and_error(grouped(same, "loss", ("method",))[method,])
        cells.append(f"{loss:.4f} ± {error:.4f}")
        if task == "labels":
            accuracy, error = mean_and_error([100 * found["accuracy"] for found in same])
            cells.append(f"{accuracy:.2f} ± {error:.2f}")
        else:
            length, error = mean_and_error(grouped(same, "written", ("method",))[method,])
            cells.append(f"{length:.2f} ± {error:.2f}")
        cells.append(f"{mean_and_error([found['seconds'] for found in same])[0]:.0f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
