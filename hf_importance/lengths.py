"""How long training texts are, which is what they cost where batches have little padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils.logging import tqdm

from hf_importance.data import ImportanceCollator
from hf_importance.losses.per_example import IGNORE_INDEX
from hf_importance.randomness import isolated_randomness
from hf_importance.sampling.draw import SKIPPED, Shard
from hf_importance.sampling.groups import LengthGroups
from hf_importance.sampling.rates import relative_costs

_LARGE = 2**17
"""Examples, from which on a progress bar is shown."""
_PIECE = 2**16
"""Rows of `datasets` at a time."""


@dataclass(frozen=True)
class Lengths:
    """How long the training texts are, as far as it matters.

    Args:
        length: int32 `[examples]`, where visits cost by it; else None.
        tokens: int32 `[examples]`, how many have a loss, where the loss of an example is a sum over them; else None.
    """

    length: Tensor | None = None
    tokens: Tensor | None = None

    def cost(self, shard: Shard) -> Tensor | None:
        """Of a visit of each example of a shard, relative to their mean; None where all cost the same."""
        return None if self.length is None else relative_costs(_part(self.length, shard))

    def tokens_of(self, shard: Shard) -> Tensor | None:
        """float32 `[examples of the shard]`."""
        return None if self.tokens is None else _part(self.tokens, shard).float()

    def groups(self, shard: Shard, batch_size: int, batches: int) -> LengthGroups:
        """Of the visits of a shard: arguments of [`LengthGroups`]."""
        return LengthGroups(_part(self.length, shard), batch_size, batches, shard.length)


def name_of_tokens(processing_class: Any) -> str:
    """Whose length `Trainer` takes for that of an example: the first input of the model."""
    return next(iter(getattr(processing_class, "model_input_names", None) or ["input_ids"]))


def length_name(dataset: Any, column: str, tokens: str = "input_ids") -> str | None:
    """What tells the lengths of the examples: `column`, if it has numbers, else `tokens`, whose length they are.

    None where the first example has neither.
    """
    with isolated_randomness(owners=(dataset,)):
        first = dataset[0]
        stored = dataset.with_format(None)[0] if _is_stored(dataset, column) else first
    if isinstance(stored, Mapping) and hasattr(stored.get(column), "__int__"):
        return column
    return tokens if isinstance(first, Mapping) and hasattr(first.get(tokens), "__len__") else None


def refuse_unknown_lengths(dataset: Any, column: str, tokens: str) -> None:
    """Of training data whose texts are to be grouped by length.

    Raises:
        ValueError: if lengths cannot be had.
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
    """int32 `[examples]`, at least 1.

    Args:
        dataset: that [`refuse_unknown_lengths`] accepts.
        column: that has the lengths.
        tokens: whose lengths count where there is no such column.
        quiet: show no progress bar.

    >>> lengths_of([{"input_ids": [5, 6]}, {"input_ids": [7]}], "length")
    tensor([2, 1], dtype=torch.int32)
    """
    if length_name(dataset, column, tokens) == column:
        return _values(dataset, column, int, _numbers, quiet).clamp(min=1)
    return _values(dataset, tokens, len, _list_lengths, quiet).clamp(min=1)


def labels_of(dataset: Any, lengths: Tensor, label: str = "labels", quiet: bool = False) -> Tensor:
    """int32 `[examples]`, at least 1: how many tokens have a loss; all of them where examples have no labels for each.

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
    """Whether texts have a label per token, so that their loss is a sum over these: by what an example collates to.

    Args:
        dataset: as the loader has it.
        collate: likewise.
        labels: names of the labels.
        is_encoder_decoder: whether the model is an encoder-decoder, whose labels are as many as it is to write.
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
    """Where visits cost by the length of their text: those of losses per token, and where texts are grouped by it.

    Other texts are padded to the longest of their batch, whose length says little of theirs.

    Args:
        dataset: the training data.
        base: the loader of `Trainer`.
        columns: see [`length_name`].
        labels: names of the labels.
        is_encoder_decoder: see [`has_token_losses`].
        grouped: whether texts are grouped by length.
        own_loss: whether the loss is one of the user's, of which nothing is known.
        prunes: whether examples are left out, for which tokens are counted.
        quiet: show no progress bar.
    """
    of_tokens = not own_loss and has_token_losses(base.dataset, base.collate_fn, labels, is_encoder_decoder)
    if not (grouped or (of_tokens and length_name(dataset, *columns) is not None)):
        return Lengths()
    length = lengths_of(dataset, *columns, quiet)
    return Lengths(length, labels_of(dataset, length, next(iter(labels)), quiet) if of_tokens and prunes else None)


def _values(
    dataset: Any, name: str, of_row: Callable[[Any], int], of_column: Callable[[Any], Tensor], quiet: bool
) -> Tensor:
    """Of each example a number: of columns of `datasets` a piece at a time, else row by row."""
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
    """Whether it is a column of `datasets`."""
    return hasattr(dataset, "with_format") and name in (getattr(dataset, "column_names", None) or ())


def _count(labels: Any) -> int:
    return int((torch.as_tensor(labels) != IGNORE_INDEX).sum())


def _numbers(column: Any) -> Tensor:
    """Of a column of pyarrow."""
    return torch.tensor(column.to_numpy(zero_copy_only=False)).long()


def _list_lengths(lists: Any) -> Tensor:
    import pyarrow.compute  # which `datasets` needs

    return _numbers(pyarrow.compute.list_value_length(lists))


def _count_lists(lists: Any) -> Tensor:
    lengths, kept = _list_lengths(lists), _numbers(lists.flatten()) != IGNORE_INDEX
    return torch.zeros_like(lengths).index_add_(0, torch.arange(len(lengths)).repeat_interleave(lengths), kept.long())


def _part(values: Tensor | None, shard: Shard) -> Tensor | None:
    return values if values is None or shard.index is None else values[shard.index]
