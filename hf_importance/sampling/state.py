"""Validation of what is read from a checkpoint: shapes and types must be those that training needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def read_tensor(
    state: Mapping[str, Any],
    name: str,
    shape: Sequence[int | None],
    dtype: torch.dtype,
    below: int | None = None,
    optional: bool = False,
) -> Tensor | None:
    """Read a tensor from a state dict.

    Args:
        state: the state dict.
        name: key of the tensor.
        shape: its shape; None for an axis of any size.
        dtype: its type.
        below: upper bound of its values, which must be at least 0.
        optional: whether it may be None.

    Raises:
        ValueError: if the tensor is missing or does not match.
    """
    value = state.get(name)
    if value is None and optional and name in state:
        return None
    wanted = f"{name} must be a {str(dtype).removeprefix('torch.')} tensor of shape {list(shape)}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{wanted}, but is {'missing' if name not in state else type(value).__name__}")
    fits = len(shape) == value.dim() and all(
        want in (None, have) for want, have in zip(shape, value.shape, strict=True)
    )
    if value.dtype != dtype or not fits:
        raise ValueError(f"{wanted}, but is {str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}")
    if below is not None and value.numel() and not 0 <= value.min() <= value.max() < below:
        raise ValueError(f"{name} must be in 0 … {below - 1}, but is in {value.min().item()} … {value.max().item()}")
    return value


def read_number(state: Mapping[str, Any], name: str, kind: type = float, least: float = -math.inf) -> Any:
    """Read a number of at least `least` from a state dict; `float` also accepts integers and NaN, `bool` only booleans.

    Raises:
        ValueError: if the number is missing or does not match.
    """
    value = state.get(name)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool) or value < least:
        raise ValueError(f"{name} must be a number ({kind.__name__}) of at least {least}, but is {value!r}")
    return value
