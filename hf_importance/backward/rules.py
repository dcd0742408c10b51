"""How arithmetic acts on row-sparse gradients: pointwise operations, sums, matrix products, new tensors.

A rule holds where the rows that are not kept stay zero, or are summed over. `place` is the dimension of the batch,
counted from the last (negative), which broadcasting leaves alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from hf_importance.backward.rows import Args, Kwargs, RowGradient, blank, pick, register, spread, unwrapped


def pointwise(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Operations that give zero where any of their gradients is zero."""
    gradient = args[0]
    if not isinstance(gradient, RowGradient):
        gradient = next(each for each in args if isinstance(each, RowGradient))
    kept, length, place = gradient.kept, gradient.length, gradient.batch_dim - gradient.dim()
    values = []
    for value in args:
        if isinstance(value, RowGradient):
            if value.kept is not kept or value.batch_dim - value.dim() != place or value.length != length:
                return NotImplemented
            value = value.rows
        elif isinstance(value, Tensor) and value.dim() >= -place:
            size = value.shape[place]
            if size == length:
                value = pick(value, value.dim() + place, kept)
            elif size != 1:
                return NotImplemented
        values.append(value)
    rows = func(*values, **kwargs)
    if isinstance(rows, tuple):
        return tuple(spread(each, kept, each.dim() + place, length) for each in rows)
    return spread(rows, kept, rows.dim() + place, length)


def pointwise_first(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Operations that give zero where their first argument is zero, such as the derivatives of activations."""
    return pointwise(func, args, kwargs) if isinstance(args[0], RowGradient) else NotImplemented


def log_sigmoid(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Its buffer is empty on CUDA devices."""
    return pointwise_first(func, args, kwargs) if args[1].shape == args[2].shape else NotImplemented


def unary(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Operations on one tensor that keep zeros and the shape."""
    gradient = args[0]
    rows = func(gradient.rows, *args[1:], **kwargs)
    return RowGradient(rows, gradient.kept, gradient.batch_dim, gradient.shape)


def converted(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Other types of numbers; not other devices, where the index of the rows is not."""
    device = kwargs.get("device")
    return unary(func, args, kwargs) if device is None or device == args[0].device else NotImplemented


def power(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Zero to a positive number is zero."""
    return unary(func, args, kwargs) if args[1] > 0 else NotImplemented


def clamped(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Limits on both sides of zero."""
    low, high = (*args[1:], None, None)[:2]
    holds = (low is None or low <= 0) and (high is None or high >= 0)
    return unary(func, args, kwargs) if holds else NotImplemented


def added(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Sums and differences of gradients that fit, or of one with all rows and a dense one; others are dense."""
    first, second = args[:2]
    if isinstance(first, RowGradient) and isinstance(second, RowGradient):
        return pointwise(func, args, kwargs)
    whole = unwrapped(first), unwrapped(second)
    if any(isinstance(each, RowGradient) or not isinstance(each, Tensor) for each in whole):
        return NotImplemented
    return func(*whole, *args[2:], **kwargs)


def masked_with_zero(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`masked_fill` with the number 0."""
    return NotImplemented if args[2] else pointwise_first(func, args, kwargs)


def chosen(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`where` between gradients that fit, or a gradient and a tensor that is the number 0."""
    condition, first, second = args
    if isinstance(condition, RowGradient) or not (_vanishes(first) and _vanishes(second)):
        return NotImplemented
    return pointwise(func, args, kwargs)


def _vanishes(value: Tensor) -> bool:
    return isinstance(value, RowGradient) or (value.dim() == 0 and not value.item())


def in_place(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Pointwise operations on the rows themselves, unless these are a copy of those of which the gradient is a view."""
    gradient = args[0]
    if not isinstance(gradient, RowGradient) or not _has_memory_of_base(gradient):
        return NotImplemented
    return NotImplemented if pointwise(func, args, kwargs) is NotImplemented else gradient


def _has_memory_of_base(gradient: RowGradient) -> bool:
    base = gradient._base
    return base is None or base.rows.untyped_storage().data_ptr() == gradient.rows.untyped_storage().data_ptr()


def in_place_with_gradient(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`add_`, `sub_` and `copy_` of gradients that fit."""
    return in_place(func, args, kwargs) if isinstance(args[1], RowGradient) else NotImplemented


def in_place_with_number(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`masked_fill_` and `fill_` with the number 0."""
    return NotImplemented if args[-1] else in_place(func, args, kwargs)


def divided(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Division of a gradient, not by one."""
    if isinstance(args[1], RowGradient):
        return NotImplemented
    return in_place(func, args, kwargs) if func._schema.is_mutable else pointwise(func, args, kwargs)


def total(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Sums: dense if they are over the batch, too."""
    gradient = args[0]
    rows = func(gradient.rows, *args[1:], **kwargs)
    dim = _dim_after_sum(gradient, args)
    return rows if dim is None else spread(rows, gradient.kept, dim, gradient.length)


def mean(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Means: over the whole batch, not over the kept rows."""
    result = total(func, args, kwargs)
    kept = args[0].kept
    return result if isinstance(result, RowGradient) else result * (kept.count / kept.batch)


def _dim_after_sum(gradient: RowGradient, args: Args) -> int | None:
    """Where the batch is after a sum over the dimensions `args[1]`; None if it is summed over."""
    if len(args) == 1 or not args[1]:
        return None
    rank, dim = gradient.dim(), gradient.batch_dim
    dims = {each % rank for each in args[1]}
    if dim in dims:
        return None
    keeps_dims = len(args) > 2 and args[2]
    return dim if keeps_dims else dim - sum(each < dim for each in dims)


def matrix_product(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`mm` and `bmm`. Where the batch is contracted the result is dense, from the kept rows: a parameter's gradient."""
    left, right = args
    rank = left.dim()
    if isinstance(left, RowGradient) and isinstance(right, RowGradient):
        if left.kept is not right.kept or left.length != right.length:
            return NotImplemented
        places = left.batch_dim - rank, right.batch_dim - rank
        if places == (-1, -2):
            return func(left.rows, right.rows, **kwargs)
        return spread(func(left.rows, right.rows), left.kept, 0, left.length) if places == (-3, -3) else NotImplemented
    if isinstance(left, RowGradient):
        gradient, dim = left, left.batch_dim
        left = gradient.rows
        if dim != rank - 2:
            right = pick(right, rank - 2 if dim == rank - 1 else 0, gradient.kept)
        contracted = dim == rank - 1
    else:
        gradient, dim = right, right.batch_dim
        right = gradient.rows
        if dim != rank - 1:
            left = pick(left, rank - 1 if dim == rank - 2 else 0, gradient.kept)
        contracted = dim == rank - 2
    result = func(left, right, **kwargs)
    return result if contracted else spread(result, gradient.kept, dim, gradient.length)


def matrix_product_added(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`addmm` and `baddbmm` of a dense tensor and a product in which the batch is contracted."""
    summand, left, right, *_ = args
    rank = left.dim()
    contracted = (isinstance(left, RowGradient) and left.batch_dim == rank - 1) or (
        isinstance(right, RowGradient) and right.batch_dim == rank - 2
    )
    if isinstance(summand, RowGradient) or not contracted:
        return NotImplemented
    return matrix_product(partial(func, summand), (left, right), kwargs)


def zeros_like(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Zeros are row-sparse as well."""
    return blank(func, args, kwargs) if kwargs.get("device") else unary(func, args, kwargs)


def new_zeros(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Zeros of another shape, row-sparse if the batch can be where it is in the gradient, or if it is flat."""
    gradient, size = args
    rows, dim, kept = gradient.rows, gradient.batch_dim, gradient.kept
    device = kwargs.get("device")
    is_here = device is None or device == gradient.device
    if is_here and dim == 0 and list(size) == [gradient.numel()]:
        return RowGradient(func(rows, [rows.numel()], **kwargs), kept, 0, size)
    if is_here and dim < len(size) and size[dim] == gradient.length:
        return RowGradient(func(rows, [*size[:dim], rows.shape[dim], *size[dim + 1 :]], **kwargs), kept, dim, size)
    return func(rows, size, **kwargs)


register(pointwise, "mul.Tensor")
register(divided, "div.Tensor div_.Tensor")
register(
    pointwise_first,
    "gelu_backward.default silu_backward.default tanh_backward.default sigmoid_backward.default mish_backward.default "
    "threshold_backward.default hardtanh_backward.default hardswish_backward.default hardsigmoid_backward.default "
    "elu_backward.default leaky_relu_backward.default softplus_backward.default softshrink_backward.default "
    "hardshrink_backward.default rrelu_with_noise_backward.default _prelu_kernel_backward.default "
    "native_dropout_backward.default",
)
register(log_sigmoid, "log_sigmoid_backward.default")
register(
    unary,
    "mul.Scalar div.Scalar neg.default abs.default sign.default sgn.default sqrt.default relu.default tanh.default "
    "nan_to_num.default clone.default detach.default alias.default",
)
register(converted, "_to_copy.default")
register(power, "pow.Tensor_Scalar")
register(clamped, "clamp.default")
register(added, "add.Tensor sub.Tensor")
register(masked_with_zero, "masked_fill.Scalar")
register(chosen, "where.self")
register(in_place, "mul_.Tensor mul_.Scalar div_.Scalar neg_.default zero_.default")
register(in_place_with_gradient, "add_.Tensor sub_.Tensor copy_.default")
register(in_place_with_number, "masked_fill_.Scalar fill_.Scalar")
register(total, "sum.default sum.dim_IntList")
register(mean, "mean.default mean.dim")
register(matrix_product, "mm.default bmm.default")
register(matrix_product_added, "addmm.default baddbmm.default")
register(zeros_like, "zeros_like.default")
register(new_zeros, "new_zeros.default")
register(
    blank,
    "empty_like.default ones_like.default full_like.default rand_like.default randn_like.default new_empty.default "
    "new_ones.default new_full.default",
)
