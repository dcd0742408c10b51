"""How slices, joins and indexing act on row-sparse gradients. They hold where the batch is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_importance.backward.rows import Args, Kwargs, RowGradient, fit, pick, register, spread, with_rows


def slice_(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A part along another dimension, or all of the batch."""
    gradient, dim, start, end, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    if dim % gradient.dim() == gradient.batch_dim:
        is_all = not start and (end is None or end >= gradient.length) and step == 1
        return with_rows(gradient, gradient.rows.view_as(gradient.rows)) if is_all else NotImplemented
    return with_rows(gradient, func(gradient.rows, dim, start, end, step))


def split(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Parts along another dimension."""
    gradient = args[0]
    dim = args[2] if len(args) > 2 else 0
    if gradient.has_batch_in(dim):
        return NotImplemented
    return [with_rows(gradient, part) for part in func(gradient.rows, args[1], dim)]


def select(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`select`, `unbind`: single entries along another dimension, which goes."""
    gradient = args[0]
    dim = (args[1] if len(args) > 1 else 0) % gradient.dim()
    if dim == gradient.batch_dim:
        return NotImplemented
    where = gradient.kept, gradient.batch_dim - (dim < gradient.batch_dim), gradient.length
    result = func(gradient.rows, dim, *args[2:])
    return spread(result, *where) if isinstance(result, Tensor) else [spread(part, *where) for part in result]


def select_backward(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Zeros around a single entry of another dimension."""
    gradient, size, selected, position = args
    selected %= len(size)
    dim = gradient.batch_dim + (selected <= gradient.batch_dim)
    rows = func(gradient.rows, _rows_size(gradient, size, dim), selected, position)
    return spread(rows, gradient.kept, dim, gradient.length)


def slice_backward(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Zeros around a part along another dimension (`slice_backward`, `unfold_backward`)."""
    gradient, size, dim, *others = args
    if dim % len(size) == gradient.batch_dim:
        return NotImplemented
    rows = func(gradient.rows, _rows_size(gradient, size, gradient.batch_dim), dim, *others)
    return with_rows(gradient, rows)


def pad(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Zeros around other dimensions."""
    gradient, widths = args[:2]
    first = 2 * (gradient.dim() - 1 - gradient.batch_dim)  # widths are listed from the last dimension on
    if any(widths[first : first + 2]) or (len(args) > 2 and args[2]):
        return NotImplemented
    return with_rows(gradient, func(gradient.rows, *args[1:]))


def cat(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Gradients that fit, joined along another dimension."""
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    if not all(fit(first, each) for each in tensors) or first.has_batch_in(dim):
        return NotImplemented
    return with_rows(first, func([each.rows for each in tensors], dim))


def stack(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Gradients that fit, joined along a new dimension."""
    tensors, new = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    if not all(fit(first, each) for each in tensors):
        return NotImplemented
    new %= first.dim() + 1
    dim = first.batch_dim + (new <= first.batch_dim)
    return spread(func([each.rows for each in tensors], new), first.kept, dim, first.length)


def gather(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Entries along another dimension, chosen in each row."""
    gradient, dim, index = args
    if gradient.has_batch_in(dim) or index.shape[gradient.batch_dim] != gradient.length:
        return NotImplemented
    rows = func(gradient.rows, dim, pick(index, gradient.batch_dim, gradient.kept), **kwargs)
    return with_rows(gradient, rows)


def scatter(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A gradient written or added into another one that fits, along another dimension, by an index per row."""
    target, dim, index, source = args
    if not fit(target, source) or target.has_batch_in(dim) or index.shape[target.batch_dim] != target.length:
        return NotImplemented
    picked = pick(index, target.batch_dim, target.kept)
    return with_rows(target, func(target.rows, dim, picked, source.rows))


def index_add(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A gradient added into another one that fits, along another dimension, by an index for all rows."""
    target, dim, index, source = args
    if not fit(target, source) or target.has_batch_in(dim):
        return NotImplemented
    return with_rows(target, func(target.rows, dim, index, source.rows, **kwargs))


def index(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`gradient[:, i, …]`, with the batch first and out of it."""
    gradient, indices = args
    if not isinstance(gradient, RowGradient) or not _batch_stays_first(gradient, indices):
        return NotImplemented
    return spread(func(gradient.rows, indices), gradient.kept, 0, gradient.length)


def index_put(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`target[indices] = source`, or `+=`: between gradients, zeros by a mask, or the gradient of a table."""
    target, indices, source, *accumulate = args
    if not isinstance(source, RowGradient):
        return _zeros_by_mask(func, args)
    if not isinstance(target, RowGradient):
        return _added_to_table(func, args)
    if target.kept is not source.kept or source.batch_dim != 0 or target.length != source.length:
        return NotImplemented
    if not _batch_stays_first(target, indices):
        return NotImplemented
    if source.dim() != _rank_of_indexed(target, indices):  # what is broadcast need not have the batch in front
        return NotImplemented
    return spread(func(target.rows, indices, source.rows, *accumulate), target.kept, 0, target.length)


def _zeros_by_mask(func: Any, args: Args) -> Any:
    """`gradient[mask] = 0`, as where padding was overwritten."""
    gradient, indices, source, *accumulate = args
    mask, dim = indices[0], gradient.batch_dim
    if len(indices) > 1 or mask.dtype != torch.bool or mask.dim() <= dim or source.dim() or source.item():
        return NotImplemented
    return with_rows(gradient, func(gradient.rows, [pick(mask, dim, gradient.kept)], source, *accumulate))


def _added_to_table(func: Any, args: Args) -> Any:
    """`table[i] += gradient` with an index per row and position, as of embeddings that are not in a module."""
    table, indices, gradient, *accumulate = args
    if not any(accumulate) or len(indices) > 1 or indices[0].dtype in (torch.bool, torch.uint8):
        return NotImplemented
    index, dim = indices[0], gradient.batch_dim
    if gradient.dim() != index.dim() + table.dim() - 1 or dim >= index.dim() or index.shape[dim] != gradient.length:
        return NotImplemented
    return func(table, [pick(index, dim, gradient.kept)], gradient.rows, *accumulate)


def _batch_stays_first(gradient: RowGradient, indices: Sequence[Tensor | None]) -> bool:
    """The batch is the first dimension and not indexed, and what is indexed lies side by side."""
    used = [dim for dim, each in enumerate(indices) if each is not None]
    return gradient.batch_dim == 0 and bool(used) and used[0] > 0 and used[-1] - used[0] == len(used) - 1


def _rank_of_indexed(gradient: RowGradient, indices: Sequence[Tensor | None]) -> int:
    """The number of dimensions of `gradient[indices]`; 0 with masks, which are not looked at."""
    used = [each for each in indices if each is not None]
    if any(each.dtype in (torch.bool, torch.uint8) for each in used):
        return 0
    return gradient.dim() - len(used) + max(each.dim() for each in used)


def _rows_size(gradient: RowGradient, size: Sequence[int], dim: int) -> list[int]:
    """The shape of the rows of a gradient of shape `size` with the batch in `dim`."""
    return [*size[:dim], gradient.rows.shape[gradient.batch_dim], *size[dim + 1 :]]


register(slice_, "slice.Tensor")
register(split, "split.Tensor split_with_sizes.default unsafe_split.Tensor unsafe_split_with_sizes.default")
register(select, "select.int unbind.int")
register(select_backward, "select_backward.default")
register(slice_backward, "slice_backward.default unfold_backward.default")
register(pad, "constant_pad_nd.default")
register(cat, "cat.default")
register(stack, "stack.default")
register(gather, "gather.default")
register(scatter, "scatter_add.default scatter.src")
register(index_add, "index_add.default")
register(index, "index.Tensor _unsafe_index.Tensor")
register(index_put, "index_put.default _unsafe_index_put.default")
