"""Prompts and completions as tokens: made ready for a causal language model, and written by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Trainer

IGNORED = -100
_LARGEST_LOSS = 700.0
"""Whose exponential is a number."""


def encode(batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, Any]:
    """Token ids of prompts and completions, or of texts, cut to the `longest`; and labels, which prompts have none.

    Of prompts alone the ids, cut at their beginning. Prompts are tokenized by themselves, completions or not, so that
    the model is trained on what it will have to complete.
    """
    ends = batch.get("completion", batch.get("text"))
    starts = tokenizer(batch["prompt"] if "prompt" in batch else [""] * len(ends), verbose=False)["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    starts = [ids[:-1] if len(ids) > 1 and ids[-1:] == eos else ids for ids in starts]  # of tokenizers that add it
    if ends is None:
        return {"input_ids": [ids[-longest:] for ids in starts]}
    ends = [[*ids, *eos] for ids in tokenizer(ends, add_special_tokens=False, verbose=False)["input_ids"]]
    pairs = list(zip(starts, ends, strict=True))
    return {
        "input_ids": [[*start, *end][:longest] for start, end in pairs],
        "labels": [[*[IGNORED] * len(start), *end][:longest] for start, end in pairs],
    }


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do, as it is neither attended to nor has a loss."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Its metrics, and the perplexity: e to the power of the loss."""
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    return {**metrics, "eval_perplexity": math.inf if loss > _LARGEST_LOSS else math.exp(loss)}


@torch.no_grad()
def complete(trainer: Trainer, rows: datasets.Dataset, most_tokens: int) -> tuple[list[str], dict[str, int]]:
    """What the model writes after each prompt, always the most probable token; and how many prompts there were."""
    tokenizer, model, size, found = trainer.processing_class, trainer.model.eval(), trainer.args.eval_batch_size, []
    for first in range(0, len(rows), size):
        prompts = [torch.tensor(ids) for ids in rows[first : first + size]["input_ids"]]
        sides = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(prompts, padding_value=pad_id(tokenizer), **sides)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], **sides)
        written = model.generate(
            input_ids=ids.to(trainer.args.device),
            attention_mask=mask.to(trainer.args.device),
            max_new_tokens=most_tokens,
            do_sample=False,
            pad_token_id=pad_id(tokenizer),
        )
        found += tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return found, {"predict_samples": len(rows)}
