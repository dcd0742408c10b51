"""Losses of the tokens of a text: one forward pass per displayed example, after training."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from hf_importance.randomness import isolated_randomness
from hf_importance.report.texts import readable

logger = logging.get_logger(__name__)

_IGNORED = -100
_MAX_TOKENS = 160  # tokens shown per example
_BEFORE = 40  # tokens shown before the first one with a loss


@dataclass(frozen=True)
class Token:
    """A token and its loss."""

    text: str
    loss: float | None = None  # cross-entropy; None without a label
    share: float = 0.0  # of the largest loss of the example


def token_losses(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    tokenizer: Any,
    shifts: bool,
    index: Iterable[int],
) -> dict[int, list[Token]]:
    """Tokens of some examples with their cross-entropy; empty if there are no per-token labels.

    `shifts` says whether a token is predicted from the previous ones. Errors are logged as a warning, so they do not
    prevent the report.
    """
    losses, training = {}, model.training
    model.eval()
    try:
        with isolated_randomness(), torch.no_grad():
            for i in index:
                batch = prepare(collate([dataset[i]]))
                if not _has_token_labels(model, batch):
                    return {}
                losses[i] = _of_example(model, batch, tokenizer, shifts)
    except Exception as error:
        logger.warning(f"The report does not show token losses: {type(error).__name__}: {error}")
        return {}
    finally:
        model.train(training)
    return losses


def _has_token_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the labels belong to the tokens of `input_ids`, as they do not in encoder-decoders."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not isinstance(labels, Tensor):
        return False
    return isinstance(ids, Tensor) and labels.shape == ids.shape and not labels.is_floating_point()


def _of_example(model: nn.Module, batch: Mapping[str, Any], tokenizer: Any, shifts: bool) -> list[Token]:
    """Tokens of one example, at most `_MAX_TOKENS` from shortly before the first one with a loss."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    logits = model(**inputs)["logits"][0, -len(labels) :].float()
    if shifts:  # a token is predicted from the previous ones
        labels = F.pad(labels[1:], (1, 0), value=_IGNORED)
        logits = logits.roll(1, dims=0)
    losses = F.cross_entropy(logits, labels, reduction="none").where(labels != _IGNORED, torch.nan)
    if losses.isnan().all():
        return []
    start = max(0, int(losses.isfinite().int().argmax()) - _BEFORE)
    losses = losses[start : start + _MAX_TOKENS]
    largest = losses[losses.isfinite()].max().item() or 1.0
    tokens, before = [], ""
    for k, loss in enumerate(losses.tolist(), start + 1):
        text = tokenizer.decode(ids[start:k])  # decoding tokens one by one would lose spaces
        piece = readable(text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[k - 1]))
        before = text
        tokens.append(Token(piece) if math.isnan(loss) else Token(piece, loss, loss / largest))
    return tokens
