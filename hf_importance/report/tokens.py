"""Losses of the tokens of a text: one forward pass per displayed example, after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
_MAX_TOKENS = 160
"""Tokens shown per example."""
_BEFORE = 40
"""Tokens shown before the first one with a loss."""


@dataclass(frozen=True)
class Token:
    """A token and its loss.

    Args:
        text: decoded token.
        loss: its cross-entropy; None without a loss.
        share: loss relative to the largest loss of the example, in [0, 1].
    """

    text: str
    loss: float | None = None
    share: float = 0.0


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

    Errors are logged as a warning, so they do not prevent the report.

    Args:
        model: the trained model.
        dataset: the dataset of the dataloader.
        collate: the collator of the dataloader.
        prepare: moves a batch to the device of the model.
        tokenizer: decodes the tokens.
        shifts: whether a token is predicted from the previous ones.
        index: positions of the examples.
    """
    found, training = {}, model.training
    model.eval()
    try:
        with isolated_randomness(owners=(dataset, collate)), torch.no_grad():
            for i in index:
                tokens = _of_example(model, prepare(collate([dataset[i]])), tokenizer, shifts)
                if tokens is None:
                    return {}
                found[i] = tokens
    except Exception as error:
        logger.warning(f"The report does not show token losses: {type(error).__name__}: {error}")
        return {}
    finally:
        model.train(training)
    return found


def _of_example(model: nn.Module, batch: dict[str, Any], tokenizer: Any, shifts: bool) -> list[Token] | None:
    """Tokens of one example; None if there are no per-token labels."""
    batch = dict(batch)
    labels, ids = batch.pop("labels", None), batch.get("input_ids")
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.dim() != 2 or len(labels) != 1:
        return None
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # labels: other tokens
    if is_encoder_decoder or labels.shape != ids.shape or labels.is_floating_point():
        return None
    logits = model(**batch)["logits"][0, -labels.shape[1] :].float()
    losses = F.cross_entropy(logits[:-1] if shifts else logits, labels[0, int(shifts) :], reduction="none")
    losses = F.pad(losses, (int(shifts), 0))
    has_loss = (labels[0] != _IGNORED) & (torch.arange(labels.shape[1], device=labels.device) >= int(shifts))
    return _tokens(ids[0].tolist(), losses.tolist(), has_loss.tolist(), tokenizer)


def _tokens(ids: Sequence[int], losses: Sequence[float], has_loss: Sequence[bool], tokenizer: Any) -> list[Token]:
    if not any(has_loss):
        return []
    start = max(0, has_loss.index(True) - _BEFORE)
    shown = slice(start, start + _MAX_TOKENS)
    largest = max(loss for loss, has in zip(losses[shown], has_loss[shown], strict=True) if has) or 1.0
    found, before = [], ""
    for k, (loss, has) in enumerate(zip(losses[shown], has_loss[shown], strict=True), 1):
        text = tokenizer.decode(ids[start : start + k])  # decoding tokens one by one would lose spaces
        piece = text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[start + k - 1])
        before = text
        found.append(Token(readable(piece), loss, loss / largest) if has else Token(readable(piece)))
    return found
