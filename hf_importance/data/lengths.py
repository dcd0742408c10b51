"""Lengths of training texts, which determine their cost if batches have little padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils.logging import tqdm

from hf_importance.data.dataset import ImportanceCollator
from hf_importance.losses.per_example import IGNORE_INDEX
from hf_importance.randomness import isolated_randomness
from hf_importance.sampling.draw import SKIPPED, Shard
from hf_importance.sampling.groups import LengthGroups
from hf_importance.sampling.rates import relative_costs

_LARGE = 2**17
"""Show a progress bar from this many examples on."""
_PIECE = 2**16
"""Rows of `datasets` read at a time."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the training texts, as far as they are needed.

    Args:
        length: int32 `[examples]`, if the cost of a visit depends on it; else None.
        tokens: int32 `[examples]`, number of tokens with a loss, if the loss of an example is a sum; else None.
    """

    length: Tensor | None = None
    tokens: Tensor | None = None

    def cost(self, shard: Shard) -> Tensor | None:
        """Cost of a visit of each example of a shard, relative to the mean; None if all cost the same."""
        return None if self.length is None else relative_costs(_part(self.length, shard))

    def tokens_of(self, shard: Shard) -> Tensor | None:
        """Number of tokens with a loss, float32 `[examples of the shard]`."""
        return None if self.tokens is None else _part(self.tokens, shard).float()

    def groups(self, shard: Shard, batch_size: int, batches: int) -> LengthGroups:
        """A [`LengthGroups`] for the visits of a shard."""
        return LengthGroups(_part(self.length, shard), batch_size, batches, shard.length)


def name_of_tokens(processing_class: Any) -> str:
    """The column whose length `Trainer` uses as the length of an example: the first input of the model."""
    return next(iter(getattr(processing_class, "model_input_names", None) or ["input_ids"]))


def length_name(dataset: Any, column: str, tokens: str = "input_ids") -> str | None:
    """The column that gives the lengths: `column` if it has numbers, else `tokens`, whose elements are counted.

    None if the first example has neither.
    """
    with isolated_randomness(owners=(dataset,)):
        first = dataset[0]
        stored = dataset.with_format(None)[0] if _is_stored(dataset, column) else first
    if isinstance(stored, Mapping) and hasattr(stored.get(column), "__int__"):
        return column
    return tokens if isinstance(first, Mapping) and hasattr(first.get(tokens), "__len__") else None


def refuse_unknown_lengths(dataset: Any, column: str, tokens: str) -> None:
    """Check that texts can be grouped by length.

    Raises:
        ValueError: if their lengths are unknown.
    """
    if length_name(dataset, column, tokens) is None:
        with isolated_randomness(owners=(dataset,)):
            first = dataset[0]
        found = f"has the columns {list(first)}" if isinstance(first, Mapping) else f"is a {type(first).__name__}"
        raise ValueError(
            f"train_sampling_strategy='group_by_length' requires the length of each example, in a column {column!r} "
            f"(length_column_name) or as the length of {tokens!r}, but the first example {found}. Add such a column, "
            f"for example with dataset.map(lambda row: {{{column!r}: len(row['text'])}}), or remove the argument."
        )


def lengths_of(dataset: Any, column: str, tokens: str = "input_ids", quiet: bool = False) -> Tensor:
    """Length of each example, int32 `[examples]`, at least 1.

    Args:
        dataset: one that [`refuse_unknown_lengths`] accepts.
        column: column with the lengths.
        tokens: column whose elements are counted if there is no such column.
        quiet: whether to hide the progress bar.

    >>> lengths_of([{"input_ids": [5, 6]}, {"input_ids": [7]}], "length")
    tensor([2, 1], dtype=torch.int32)
    """
    if length_name(dataset, column, tokens) == column:
        return _values(dataset, column, int, _numbers, quiet).clamp(min=1)
    return _values(dataset, tokens, len, _list_lengths, quiet).clamp(min=1)


def labels_of(dataset: Any, lengths: Tensor, label: str = "labels", quiet: bool = False) -> Tensor:
    """Number of tokens with a loss, int32 `[examples]`, at least 1; `lengths` if there are no per-token labels.

    >>> labels_of([{"labels": [-100, 6, 7]}, {"labels": [5]}], lengths=torch.tensor([3, 1]))
    tensor([2, 1], dtype=torch.int32)
    """
    with isolated_randomness(owners=(dataset,)):
        first = dataset[0]
    if not isinstance(first, Mapping) or not hasattr(first.get(label), "__len__"):
        return lengths
    return _values(dataset, label, _count, _count_lists, quiet).clamp(min=1)


def has_token_losses(
    dataset: Any,
    collate: Callable[[list[Any]], MutableMapping[str, Any]],
    labels: Collection[str],
    is_encoder_decoder: bool = False,
) -> bool:
    """Whether texts have one label per token, so their loss is a sum over tokens, judged by the first collated example.

    Args:
        dataset: the dataset of the dataloader.
        collate: the collator of the dataloader.
        labels: names of the labels.
        is_encoder_decoder: whether the model is an encoder-decoder, whose labels need not be as long as its inputs.
    """
    with isolated_randomness(owners=(dataset, collate)):
        first = dataset[0]
        if not isinstance(first, Mapping) or "input_ids" not in first:
            return False
        batch = ImportanceCollator(collate)(([first], SKIPPED))
    found = [batch[name] for name in labels if name in batch]
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].dim() != 2 or found[0].is_floating_point():
        return False
    return is_encoder_decoder or found[0].shape == batch["input_ids"].shape


def find_lengths(
    dataset: Any,
    base: DataLoader,
    columns: tuple[str, str],
    *,
    labels: Collection[str],
    is_encoder_decoder: bool,
    grouped: bool,
    own_loss: bool,
    prunes: bool,
    quiet: bool,
) -> Lengths:
    """Lengths of the texts if they determine the cost: with per-token losses, or if texts are grouped by length.

    Other texts are padded to the longest of their batch, so their own length says little about their cost.

    Args:
        dataset: the training data.
        base: the dataloader of `Trainer`.
        columns: arguments of [`length_name`].
        labels: names of the labels.
        is_encoder_decoder: see [`has_token_losses`].
        grouped: whether texts are grouped by length.
        own_loss: whether the loss is a `per_example_loss_func`.
        prunes: whether examples may be pruned, which requires the number of tokens with a loss.
        quiet: whether to hide the progress bar.
    """
    of_tokens = not own_loss and has_token_losses(base.dataset, base.collate_fn, labels, is_encoder_decoder)
    if not (grouped or (of_tokens and length_name(dataset, *columns) is not None)):
        return Lengths()
    length = lengths_of(dataset, *columns, quiet)
    return Lengths(length, labels_of(dataset, length, next(iter(labels)), quiet) if of_tokens and prunes else None)


def _values(
    dataset: Any, name: str, of_row: Callable[[Any], int], of_column: Callable[[Any], Tensor], quiet: bool
) -> Tensor:
    """One number per example: columns of `datasets` are read in pieces, other data row by row."""
    bar = {"disable": quiet or len(dataset) < _LARGE, "desc": f"Counting {name}", "total": len(dataset)}
    with isolated_randomness(owners=(dataset,)), tqdm(**bar) as progress:
        if _is_stored(dataset, name) and (of_row is int or dataset.format["type"] != "custom"):  # not by a transform
            table, pieces = dataset.with_format("arrow"), []
            for start in range(0, len(dataset), _PIECE):
                column = table[start : start + _PIECE].column(name).combine_chunks()
                pieces.append(of_column(column).int())
                progress.update(len(column))
            return torch.cat(pieces)
        values = torch.empty(len(dataset), dtype=torch.int32)
        for i in range(len(dataset)):
            values[i] = of_row(dataset[i][name])
            progress.update()
        return values


def _is_stored(dataset: Any, name: str) -> bool:
    """Whether `name` is a stored column of a `datasets.Dataset`."""
    return hasattr(dataset, "with_format") and name in (getattr(dataset, "column_names", None) or ())


def _count(labels: Any) -> int:
    return int((torch.as_tensor(labels) != IGNORE_INDEX).sum())


def _numbers(column: Any) -> Tensor:
    """Values of a pyarrow column."""
    return torch.tensor(column.to_numpy(zero_copy_only=False)).long()


def _list_lengths(lists: Any) -> Tensor:
    import pyarrow.compute  # which `datasets` needs

    return _numbers(pyarrow.compute.list_value_length(lists))


def _count_lists(lists: Any) -> Tensor:
    lengths, kept = _list_lengths(lists), _numbers(lists.flatten()) != IGNORE_INDEX
    return torch.zeros_like(lengths).index_add_(0, torch.arange(len(lengths)).repeat_interleave(lengths), kept.long())


def _part(values: Tensor | None, shard: Shard) -> Tensor | None:
    return values if values is None or shard.index is None else values[shard.index]
