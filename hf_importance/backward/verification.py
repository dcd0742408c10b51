"""Whether the gradients from row-sparse gradients are those from dense ones: compared once in a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_importance.backward.rows import RowGradient, dense

_MOST = 32  # parameters that are compared, so that their gradients need little memory
_TOLERANCE, _IN_HALF_PRECISION = 1e-3, 0.05


def difference(
    inputs: Sequence[Tensor], gradients: Sequence[RowGradient | None], parameters: Sequence[nn.Parameter]
) -> str | None:
    """Compute gradients of some parameters twice, from row-sparse and from dense gradients of the inputs of a module.

    Kernels that read the memory of a tensor directly would not see the rows.

    Returns:
        What is wrong; empty if they are equal up to rounding, None if they are not finite, after an overflow.
    """
    parameters = parameters[:: math.ceil(len(parameters) / _MOST)]
    used = [(tensor, gradient) for tensor, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
    tensors, sparse = [tensor for tensor, _ in used], [gradient for _, gradient in used]
    whole = _gradients(tensors, [dense(gradient) for gradient in sparse], parameters)
    if not all(gradient is None or gradient.isfinite().all() for gradient in whole):
        return None
    try:
        found = _gradients(tensors, sparse, parameters)
    except Exception as error:  # kernels may raise almost anything
        return f"an operation of its backward pass failed ({type(error).__name__}: {str(error).splitlines()[0]})"
    if any((a is None) != (b is None) for a, b in zip(whole, found, strict=True)):
        return "gradients are missing"
    largest = max((a.abs().max() for a in whole if a is not None), default=torch.zeros(()))
    for a, b in zip(whole, found, strict=True):
        if a is not None and not _close(a, b, largest):
            return "gradients differ from those of a dense backward pass"
    return ""


def _gradients(
    tensors: Sequence[Tensor], gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(tensors, parameters, gradients, retain_graph=True, allow_unused=True)


def _close(a: Tensor, b: Tensor, largest: Tensor) -> bool:
    """Whether two gradients are equal up to rounding; some are zero but for rounding, as those of the bias of keys."""
    tolerance = _TOLERANCE if a.dtype in (torch.float32, torch.float64) else _IN_HALF_PRECISION
    return bool((a - b).abs().max() <= tolerance * torch.maximum(a.abs().max(), 1e-2 * largest))
