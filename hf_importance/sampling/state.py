"""Reading of checkpoints. Tensors of another shape would be broadcast, or used in part, without an error."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def read_tensor(
    state: Mapping[str, Any], name: str, shape: Sequence[int | None], dtype: torch.dtype, optional: bool = False
) -> Tensor | None:
    """A copy of a tensor; a `ValueError` if it has another type, or shape, in which None is an axis of any size."""
    value = state.get(name)
    if value is None and optional and name in state:
        return None
    wanted = f"a {dtype} tensor of shape {list(shape)}".replace("torch.", "")
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be {wanted}, but is {value!r}")
    fits = value.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
    if value.dtype != dtype or not fits:
        raise ValueError(f"{name} must be {wanted}, but is {value.dtype} of shape {list(value.shape)}")
    return value.clone()


def read_number(state: Mapping[str, Any], name: str, kind: type = float, least: float = -math.inf) -> Any:
    """A number of at least `least`, else a `ValueError`; `float` also accepts integers and NaN."""
    value = state.get(name)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool) or value < least:
        raise ValueError(f"{name} must be a number ({kind.__name__}) of at least {least}, but is {value!r}")
    return value
