"""Examples that a collator has concatenated into one row, as for padding-free attention."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(labels: Tensor, batch: int, lengths: list[int] | None) -> Tensor | None:
    """The example of the (next) token that each position predicts, int64 `[positions]`; None with one row per example.

    Args:
        labels: `[rows, positions]`.
        batch: number of examples.
        lengths: number of tokens of each example, if all are in one row.

    Raises:
        ValueError: if there is neither one row per example nor one row with known lengths.

    >>> rows_of(torch.zeros(1, 6), batch=2, lengths=[3, 2])  # and one token of padding
    tensor([0, 0, 1, 1, 1, 1])
    """
    if len(labels) == batch:
        return None
    if len(labels) != 1 or lengths is None or sum(lengths) > labels.shape[1]:
        raise ValueError(
            f"A batch of {batch} examples has labels of shape {list(labels.shape)}, so the example of each token is "
            "unknown: the data collator must return one row per example, or one row with the 'input_ids' of all "
            "examples in order."
        )
    rows = torch.arange(batch).repeat_interleave(torch.tensor(lengths))[1:]
    behind = rows.new_full((labels.shape[1] - len(rows),), batch - 1)
    return torch.cat([rows, behind]).to(labels.device, non_blocking=True)


def sum_of_rows(values: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """Sum `values` `[rows, positions]` per example, float32 `[batch]`; leading virtual tokens are ignored."""
    if rows is None:
        return values.float().sum(1)
    flat = values[0, -len(rows) :].float()
    return torch.zeros(batch, device=values.device).index_add(0, rows, flat)
