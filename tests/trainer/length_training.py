"""Texts of different length, a small model for them, and trainings on both."""

import tiny
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy

GROUPED = {"train_sampling_strategy": "group_by_length"}
WORDS = 40


class BagOfWords(nn.Module):
    """A classifier of texts or of their tokens."""

    def __init__(self, per_token):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.per_token = nn.Embedding(WORDS, 8), nn.Linear(8, tiny.CLASSES), per_token

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.embed(input_ids)
        if not self.per_token:
            mask = attention_mask[..., None].to(hidden.dtype)
            hidden = (hidden * mask).sum(1) / mask.sum(1)
        logits = self.head(hidden)
        loss = None if labels is None else cross_entropy(logits.flatten(0, -2), labels.flatten())
        return {"loss": loss, "logits": logits}


def make_rows(n=120, per_token=True, equal=False, prompt=0):
    """Rows of log-normal or equal lengths, labelled per token or per text; the first `prompt` tokens have no label."""
    g, rows = torch.Generator().manual_seed(1), []
    for _ in range(n):
        length = prompt + (6 if equal else 1 + int(torch.exp(1.5 + 0.8 * torch.randn((), generator=g))))
        words = torch.randint(1, WORDS, (length,), generator=g)
        labels = (words % tiny.CLASSES) if per_token else int(words[0]) % tiny.CLASSES
        if per_token:
            labels[:prompt] = -100
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return rows


def lengths(rows):
    return torch.tensor([len(row["input_ids"]) for row in rows])


def pad(rows):
    """Collate rows with a label per token or per text."""
    if isinstance(rows[0]["labels"], torch.Tensor):
        return tiny.pad(rows)
    batch = tiny.pad([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows])
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def make_trainer(tmp_path, rows, cls=tiny.Recorder, importance=tiny.FIXED, collate=pad, **settings):
    per_token = isinstance(rows[0]["labels"], (list, torch.Tensor))
    more = {"data_collator": collate}
    importance = None if cls is hf.Trainer else importance
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 4, **settings}
    return tiny.trainer(tmp_path, BagOfWords(per_token), rows, cls, importance, more, **settings)


def train(*args, **kwargs):
    """Make a trainer, train, and return it."""
    run = make_trainer(*args, **kwargs)
    run.train()
    return run
