"""How views, and operations along other dimensions than the batch, act on row-sparse gradients."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from hf_importance.backward.rows import Args, Kwargs, RowGradient, blank, register, spread, with_rows


def view(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Another shape in which one dimension starts with the batch, and those before it keep their product."""
    gradient, size = args[0], list(args[1])
    kept = gradient.kept
    if -1 in size:
        free = size.index(-1)
        size[free] = 1
        size[free] = gradient.numel() // max(prod(size), 1)
    before = prod(gradient.shape[: gradient.batch_dim]) if gradient.batch_dim else 1
    dim = _start_of_batch(size, before, kept.batch)
    if dim is None:
        return NotImplemented
    rows_size = size.copy()
    rows_size[dim] = size[dim] // kept.batch * kept.count
    return RowGradient(gradient.rows.reshape(rows_size), kept, dim, size)


def _start_of_batch(size: Sequence[int], before: int, batch: int) -> int | None:
    """The dimension of which the batch is the outermost part; the product of those before it is `before`."""
    product = 1
    for dim, length in enumerate(size):
        if product == before and length and length % batch == 0:
            return dim
        product *= length
    return None


def as_strided(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """All of the memory in another shape, as autograd asks for the gradient of what was changed in place."""
    gradient, size, stride, *offset = args
    is_whole = prod(size) == gradient.numel() and not any(offset) and gradient.rows.is_contiguous()
    return view(func, (gradient, size), {}) if is_whole and is_contiguous(size, stride) else NotImplemented


def new_empty_strided(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Memory for a gradient of the same shape; dense memory for any other."""
    gradient, size, stride = args
    if tuple(size) != tuple(gradient.shape) or kwargs.get("device") or not is_contiguous(size, stride):
        return blank(func, args, kwargs)
    rows = gradient.rows.new_empty(gradient.rows.shape, dtype=kwargs.get("dtype"))
    return with_rows(gradient, rows)


def is_contiguous(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether these strides are those of row-major order."""
    return all(step == prod(size[dim + 1 :]) for dim, step in enumerate(stride) if size[dim] > 1)


def permute(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Dimensions in another order."""
    gradient, dims = args
    rank = gradient.dim()
    dim = [each % rank for each in dims].index(gradient.batch_dim)
    return spread(func(gradient.rows, dims), gradient.kept, dim, gradient.length)


def transpose(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Two dimensions exchanged."""
    gradient, first, second = args
    rank, dim = gradient.dim(), gradient.batch_dim
    first, second = first % rank, second % rank
    dim = second if dim == first else first if dim == second else dim
    return spread(func(gradient.rows, first, second), gradient.kept, dim, gradient.length)


def matrix_transpose(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`t`."""
    gradient = args[0]
    return spread(func(gradient.rows), gradient.kept, gradient.dim() - 1 - gradient.batch_dim, gradient.length)


def unsqueeze(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A new dimension of size 1."""
    gradient, new = args
    new %= gradient.dim() + 1
    dim = gradient.batch_dim + (new <= gradient.batch_dim)
    return spread(func(gradient.rows, new), gradient.kept, dim, gradient.length)


def squeeze(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Dimensions of size 1 removed, but not the batch."""
    gradient = args[0]
    rank, dim = gradient.dim(), gradient.batch_dim
    named = range(rank) if len(args) == 1 else [args[1]] if isinstance(args[1], int) else args[1]
    removed = [each for each in {each % rank for each in named} if gradient.shape[each] == 1]
    if dim in removed:
        return NotImplemented
    rows = gradient.rows
    for each in sorted(removed, reverse=True):
        rows = rows.squeeze(each)
    return spread(rows, gradient.kept, dim - sum(each < dim for each in removed), gradient.length)


def expand(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Other dimensions repeated without a copy."""
    gradient, size = args
    dim = gradient.batch_dim + len(size) - gradient.dim()
    if size[dim] not in (-1, gradient.length):
        return NotImplemented
    rows = func(gradient.rows, [*size[:dim], -1, *size[dim + 1 :]], **kwargs)
    return spread(rows, gradient.kept, dim, gradient.length)


def repeat(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Other dimensions repeated."""
    gradient, repeats = args
    dim = gradient.batch_dim + len(repeats) - gradient.dim()
    if repeats[dim] != 1:
        return NotImplemented
    return spread(func(gradient.rows, repeats), gradient.kept, dim, gradient.length)


def along(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Operations along the dimensions `args[1]` of which the batch is none, and which keep zeros."""
    gradient, dims = args[:2]
    if gradient.has_batch_in(dims):
        return NotImplemented
    return with_rows(gradient, func(gradient.rows, *args[1:], **kwargs))


def roll(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Shifted along other dimensions."""
    gradient = args[0]
    if len(args) < 3 or not args[2] or gradient.has_batch_in(args[2]):
        return NotImplemented
    return with_rows(gradient, func(gradient.rows, *args[1:]))


def triangle(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`tril` and `triu` of the last two dimensions."""
    gradient = args[0]
    return NotImplemented if gradient.has_batch_in((-1, -2)) else with_rows(gradient, func(gradient.rows, *args[1:]))


def complex_view(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Pairs of numbers in the last dimension as complex numbers, and back."""
    gradient = args[0]
    if func.__name__ == "view_as_complex.default" and gradient.batch_dim == gradient.dim() - 1:
        return NotImplemented
    return with_rows(gradient, func(gradient.rows))


register(view, "view.default _unsafe_view.default reshape.default _reshape_alias.default")
register(as_strided, "as_strided.default")
register(new_empty_strided, "new_empty_strided.default")
register(permute, "permute.default")
register(transpose, "transpose.int")
register(matrix_transpose, "t.default")
register(unsqueeze, "unsqueeze.default")
register(squeeze, "squeeze.default squeeze.dim squeeze.dims")
register(expand, "expand.default")
register(repeat, "repeat.default")
register(along, "index_select.default cumsum.default flip.default")
register(roll, "roll.default")
register(triangle, "tril.default triu.default")
register(complex_view, "view_as_real.default view_as_complex.default")
