"""Lengths of training texts, which determine their cost if batches have little padding."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from hf_importance.randomness import isolated_randomness

_IGNORED = -100  # label of tokens without a loss
_LARGE = 2**17  # show a progress bar from this many examples on


@dataclass(frozen=True)
class Lengths:
    """Lengths of the training texts, int32 `[examples]`, as far as they are needed."""

    length: Tensor | None = None  # if the cost of a visit depends on it
    tokens: Tensor | None = None  # number of tokens with a loss, if the loss of an example is a sum


def has_token_losses(
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    labels: Collection[str],
    is_encoder_decoder: bool = False,
) -> bool:
    """Whether texts have one label per token, so their loss is a sum over tokens, judged by the first collated example.

    Labels of an encoder-decoder need not be as long as its inputs. An example that cannot be collated has none: the
    first step says why.
    """
    with isolated_randomness():
        example = dataset[0]
        if not isinstance(example, Mapping) or "input_ids" not in example:
            return False
        try:
            batch = collate([example])
        except (RuntimeError, TypeError, ValueError):
            return False
    present = [batch[name] for name in labels if name in batch]
    if len(present) != 1 or not isinstance(present[0], Tensor):
        return False
    if present[0].dim() != 2 or present[0].is_floating_point():
        return False
    return is_encoder_decoder or present[0].shape == batch["input_ids"].shape


def lengths_of(dataset: Any, column: str, quiet: bool = False) -> Tensor:
    """Length of each example, int32 `[examples]`, at least 1: by a column of numbers, else of `input_ids`.

    >>> lengths_of([{"input_ids": [5, 6]}, {"input_ids": [7]}], "length")
    tensor([2, 1], dtype=torch.int32)
    """
    with isolated_randomness():
        has_column = hasattr(dataset[0].get(column), "__int__")
    return _count(dataset, column, int, quiet) if has_column else _count(dataset, "input_ids", len, quiet)


def labels_of(dataset: Any, lengths: Tensor, label: str = "labels", quiet: bool = False) -> Tensor:
    """Number of tokens with a loss, int32 `[examples]`, at least 1; `lengths` if there are no per-token labels.

    >>> labels_of([{"labels": [-100, 6, 7]}, {"labels": [5]}], lengths=torch.tensor([3, 1]))
    tensor([2, 1], dtype=torch.int32)
    """
    with isolated_randomness():
        per_token = hasattr(dataset[0].get(label), "__len__")
    return _count(dataset, label, _with_loss, quiet) if per_token else lengths


def _with_loss(labels: Any) -> int:
    labels = labels if isinstance(labels, Tensor) else np.asarray(labels)
    return int((labels != _IGNORED).sum())


def _count(dataset: Any, name: str, count: Callable[[Any], int], quiet: bool) -> Tensor:
    """`count` of the values of a column, int32 `[examples]`, at least 1."""
    examples = len(dataset)
    bar = {"total": examples, "disable": quiet or examples < _LARGE, "desc": f"Counting {name}"}
    with isolated_randomness():
        values = tqdm(_column(dataset, name), **bar)
        return torch.tensor([count(value) for value in values], dtype=torch.int32).clamp_(min=1)


def _column(dataset: Any, name: str) -> Iterator[Any]:
    """Values of a column. Of `datasets` without a transform, only this column is read."""
    if hasattr(dataset, "select_columns") and dataset.format["type"] != "custom":
        for rows in dataset.select_columns([name]).with_format("numpy").iter(batch_size=1000):
            yield from rows[name]
    else:
        for i in range(len(dataset)):
            yield dataset[i][name]
