"""Tokenization of prompts and completions for causal language models, and greedy generation."""

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
"""Label of tokens without a loss."""
_LARGEST_LOSS = 700.0
"""Losses above it have infinite perplexity; its exponential is close to the largest float."""


def encode(batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Tokenize prompts and completions, or texts.

    A prompt is tokenized separately from its completion, so that its tokens are the same in training and generation.

    Args:
        batch: the columns `prompt` and `completion`, or `text`, or only `prompt` for generation.
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens. Examples are truncated at the end, prompts for generation at the start.

    Returns:
        `input_ids`, and except for generation `labels`, which are [`IGNORED`] for the tokens of prompts.
    """
    completions = batch.get("completion", batch.get("text"))
    prompts = tokenizer(batch["prompt"] if "prompt" in batch else [""] * len(completions), verbose=False)["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = [ids[:-1] if len(ids) > 1 and ids[-1:] == eos else ids for ids in prompts]  # some tokenizers append it
    if completions is None:
        return {"input_ids": [ids[-max_length:] for ids in prompts]}
    completions = [[*ids, *eos] for ids in tokenizer(completions, add_special_tokens=False, verbose=False)["input_ids"]]
    pairs = list(zip(prompts, completions, strict=True))
    return {
        "input_ids": [[*prompt, *completion][:max_length] for prompt, completion in pairs],
        "labels": [[*[IGNORED] * len(prompt), *completion][:max_length] for prompt, completion in pairs],
    }


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Collate examples into a batch, padded on the right with the token `pad`."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id for padding, which is masked: the padding token, else the end-of-sequence token, else 0."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Evaluate, and return the metrics with the perplexity, the exponential of the loss."""
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    return {**metrics, "eval_perplexity": math.inf if loss > _LARGEST_LOSS else math.exp(loss)}


@torch.no_grad()
def complete(trainer: Trainer, rows: datasets.Dataset, max_new_tokens: int) -> tuple[list[str], dict[str, int]]:
    """Generate a completion for each prompt by greedy decoding.

    Args:
        trainer: the trainer, with its model and tokenizer.
        rows: prompts as `input_ids`.
        max_new_tokens: maximum number of tokens per completion.

    Returns:
        The completions, and the number of prompts as a metric.
    """
    tokenizer, model, size = trainer.processing_class, trainer.model.eval(), trainer.args.eval_batch_size
    completions = []
    for first in range(0, len(rows), size):
        prompts = [torch.tensor(ids) for ids in rows[first : first + size]["input_ids"]]
        settings = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(prompts, padding_value=pad_id(tokenizer), **settings)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], **settings)
        generated = model.generate(
            input_ids=ids.to(trainer.args.device),
            attention_mask=mask.to(trainer.args.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_id(tokenizer),
        )
        completions += tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return completions, {"predict_samples": len(rows)}
