"""How the backward passes of layers act on row-sparse gradients: what the forward pass saved is picked by row.

Gradients of inputs stay row-sparse; those of parameters are dense, from the kept rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hf_importance.backward.rows import Args, Kwargs, RowGradient, pick, register, with_rows


def _sparse(gradient: RowGradient, rows: Tensor | None) -> RowGradient | None:
    """The gradient of an input, None where none was asked for."""
    return None if rows is None else with_rows(gradient, rows)


def _has_batch_first(gradient: Any) -> bool:
    return isinstance(gradient, RowGradient) and gradient.batch_dim == 0


def layer_norm(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`native_layer_norm_backward`."""
    gradient, inputs, normalized, mean, scale, weight, bias, wanted = args
    if not isinstance(gradient, RowGradient) or gradient.batch_dim >= gradient.dim() - len(normalized):
        return NotImplemented
    dim, kept = gradient.batch_dim, gradient.kept
    saved = pick(inputs, dim, kept), normalized, pick(mean, dim, kept), pick(scale, dim, kept)
    of_inputs, *of_parameters = func(gradient.rows.contiguous(), *saved, weight, bias, wanted)
    return _sparse(gradient, of_inputs), *of_parameters


def rms_norm(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`_fused_rms_norm_backward`."""
    gradient, inputs, normalized, scale, weight, wanted = args
    if not isinstance(gradient, RowGradient) or gradient.batch_dim >= gradient.dim() - len(normalized):
        return NotImplemented
    dim, kept = gradient.batch_dim, gradient.kept
    saved = pick(inputs, dim, kept), normalized, pick(scale, dim, kept)
    of_inputs, of_weight = func(gradient.rows.contiguous(), *saved, weight, wanted)
    return _sparse(gradient, of_inputs), of_weight


def group_norm(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`native_group_norm_backward`, which is also told the number of rows."""
    gradient, inputs, mean, scale, weight, _, *others = args
    if not _has_batch_first(gradient):
        return NotImplemented
    rows, kept = gradient.rows.contiguous(), gradient.kept
    saved = pick(inputs, 0, kept).contiguous(), pick(mean, 0, kept), pick(scale, 0, kept)
    of_inputs, *of_parameters = func(rows, *saved, weight, rows.shape[0], *others)
    return _sparse(gradient, of_inputs), *of_parameters


def batch_norm(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`native_batch_norm_backward` with running statistics; those of the batch couple its rows."""
    gradient, inputs, *others = args
    is_training = args[7]
    if is_training or not _has_batch_first(gradient):
        return NotImplemented
    of_inputs, *of_parameters = func(gradient.rows, pick(inputs, 0, gradient.kept), *others)
    return _sparse(gradient, of_inputs), *of_parameters


def softmax(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`_softmax_backward_data` and that of its logarithm, along another dimension than the batch."""
    gradient, output, dim, dtype = args
    if not isinstance(gradient, RowGradient) or gradient.has_batch_in(dim):
        return NotImplemented
    return _sparse(gradient, func(gradient.rows, pick(output, gradient.batch_dim, gradient.kept), dim, dtype))


def glu(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`glu_backward`, with halves of another dimension than the batch."""
    gradient, inputs, dim = args
    if not isinstance(gradient, RowGradient) or gradient.has_batch_in(dim):
        return NotImplemented
    return _sparse(gradient, func(gradient.rows, pick(inputs, gradient.batch_dim, gradient.kept), dim))


def embedding(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`embedding_dense_backward`: a table's gradient, from the tokens of the kept rows."""
    gradient, tokens, rows_of_table, padding, scaled_by_frequency = args
    if not isinstance(gradient, RowGradient) or scaled_by_frequency:  # frequencies are those of the whole batch
        return NotImplemented
    dim = gradient.batch_dim
    if dim >= tokens.dim():
        return NotImplemented
    return func(gradient.rows, pick(tokens, dim, gradient.kept), rows_of_table, padding, scaled_by_frequency)


def convolution(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`convolution_backward`, of any number of dimensions, grouped or transposed."""
    gradient, inputs, *others = args
    if not _has_batch_first(gradient):
        return NotImplemented
    of_inputs, *of_parameters = func(gradient.rows, pick(inputs, 0, gradient.kept), *others)
    return _sparse(gradient, of_inputs), *of_parameters


def images(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Operations on each image by itself, the batch first in all their tensors: pooling, padding by mirrors, grids."""
    gradient = args[0]
    if not _has_batch_first(gradient) or any(isinstance(each, RowGradient) for each in args[1:]):
        return NotImplemented
    picked = [pick(each, 0, gradient.kept) if isinstance(each, Tensor) else each for each in args[1:]]
    rows = func(gradient.rows, *picked, **kwargs)
    return _sparse(gradient, rows) if isinstance(rows, Tensor) else tuple(_sparse(gradient, each) for each in rows)


def resized(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`upsample_…_backward`, which are told the shape of their input."""
    gradient, output_size, input_size, *others = args
    if not _has_batch_first(gradient):
        return NotImplemented
    rows = gradient.rows
    return _sparse(gradient, func(rows, output_size, [rows.shape[0], *input_size[1:]], *others))


_BATCHED = frozenset(("query", "key", "value", "out", "logsumexp"))
_MASKS = frozenset(("attn_mask", "attn_bias"))


@cache
def _argument_names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def attention(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Fused attention. A dropout mask, which kernels draw by position in the batch, cannot be drawn for some rows."""
    gradient = args[0]
    if not _has_batch_first(gradient):
        return NotImplemented
    length, kept = gradient.length, gradient.kept
    values = dict(zip(_argument_names(func), args, strict=False)) | kwargs
    if values["dropout_p"] or any(values[name].shape[0] != length for name in _BATCHED):
        return NotImplemented
    picked: dict[str, Tensor] = {name: pick(values[name], 0, kept) for name in _BATCHED}
    for name in _MASKS:
        mask = values.get(name)
        if mask is not None and mask.dim() == 4 and mask.shape[0] == length:
            picked[name] = _aligned(pick(mask, 0, kept))
    rows = [picked.get(name, args[place]) for place, name in enumerate(_argument_names(func)[: len(args)])]
    rows[0] = gradient.rows
    named = {name: picked.get(name, value) for name, value in kwargs.items()}
    of_query, of_key, of_value, *of_mask = func(*rows, **named)
    if of_mask and "attn_bias" in picked:
        of_mask = [_sparse(gradient, each) for each in of_mask]
    return *(_sparse(gradient, each) for each in (of_query, of_key, of_value)), *of_mask


def _aligned(mask: Tensor) -> Tensor:
    """With rows of a multiple of 16 numbers in memory, as the kernels for CUDA devices want it."""
    size = mask.shape[-1]
    return mask if size % 16 == 0 or mask.device.type == "cpu" else F.pad(mask, (0, -size % 16))[..., :size]


def record_stream(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Memory that another CUDA stream uses, which is that of the rows."""
    return func(args[0].rows, *args[1:])


register(layer_norm, "native_layer_norm_backward.default")
register(rms_norm, "_fused_rms_norm_backward.default")
register(group_norm, "native_group_norm_backward.default")
register(batch_norm, "native_batch_norm_backward.default batch_norm_backward.default")
register(softmax, "_softmax_backward_data.default _log_softmax_backward_data.default")
register(glu, "glu_backward.default")
register(embedding, "embedding_dense_backward.default")
register(convolution, "convolution_backward.default")
register(
    images,
    "avg_pool2d_backward.default avg_pool3d_backward.default _adaptive_avg_pool2d_backward.default "
    "_adaptive_avg_pool3d_backward.default max_pool2d_with_indices_backward.default "
    "max_pool3d_with_indices_backward.default adaptive_max_pool2d_backward.default reflection_pad1d_backward.default "
    "reflection_pad2d_backward.default replication_pad1d_backward.default replication_pad2d_backward.default "
    "grid_sampler_2d_backward.default pixel_shuffle.default pixel_unshuffle.default im2col.default col2im.default",
)
register(
    resized,
    "upsample_nearest1d_backward.default upsample_nearest2d_backward.default upsample_nearest3d_backward.default "
    "upsample_linear1d_backward.default upsample_bilinear2d_backward.default upsample_trilinear3d_backward.default "
    "upsample_bicubic2d_backward.default _upsample_nearest_exact1d_backward.default "
    "_upsample_nearest_exact2d_backward.default _upsample_bilinear2d_aa_backward.default "
    "_upsample_bicubic2d_aa_backward.default",
)
register(
    attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward.default _scaled_dot_product_flash_attention_backward.default "
    "_scaled_dot_product_efficient_attention_backward.default _scaled_dot_product_cudnn_attention_backward.default",
)
register(record_stream, "record_stream.default")
