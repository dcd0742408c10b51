"""A gradient of which only some rows are not zero: it holds these, and looks like the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Rule = Callable[[Any, Args, Kwargs], Any]
"""`rule(operation, args, kwargs)`; NotImplemented where it does not hold, so that the gradient becomes dense."""
RULES: dict[Any, Rule] = {}
"""Rules by operation; filled by the modules `rules`, `shape_rules`, `part_rules` and `layer_rules`."""

_make_wrapper = torch.Tensor._make_wrapper_subclass
_forbid_memory_access = torch._C._set_throw_on_mutable_data_ptr


@dataclass(eq=False)
class Kept:
    """The rows of a batch that are kept. Gradients fit together if they have the same one, not an equal one."""

    index: Tensor  # int64 `[kept]`, ascending, on the device of the gradient
    batch: int  # number of rows of the whole batch
    detours: Counter[str] = field(default_factory=Counter)  # operations without a rule, which made a gradient dense
    count: int = field(init=False)  # number of kept rows

    def __post_init__(self) -> None:
        self.count = self.index.shape[0]

    @cached_property
    def everything(self) -> Kept:
        """All rows of this batch, for gradients that became dense in place."""
        if self.count == self.batch:
            return self
        return Kept(torch.arange(self.batch, device=self.index.device), self.batch, self.detours)


class RowGradient(torch.Tensor):
    """A gradient of a whole batch that is zero except for the kept rows, which are all it holds.

    Autograd sees the shape of the whole batch. Operations of the backward pass act on the rows, by `RULES`; one without
    a rule gets the dense gradient, which is always correct, and is counted in `kept.detours`. There is no memory behind
    the shape: a kernel that reads it without asking, such as one of Triton, gets a RuntimeError.

    Args:
        rows: the data of the kept rows.
        kept: which rows these are.
        dim: the dimension of the batch. Its size is a multiple of `kept.batch` where the batch is merged with following
            dimensions; the batch is the outermost of them.
        size: the shape of the whole.

    Example:
        >>> kept = Kept(torch.tensor([1]), batch=3)
        >>> gradient = select_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), kept)
        >>> gradient * 10, dense(gradient * 10).tolist()
        (RowGradient((3, 2), rows=(1, 2), dim=0), [[0.0, 0.0], [30.0, 40.0], [0.0, 0.0]])
    """

    rows: Tensor
    kept: Kept
    batch_dim: int
    length: int  # size of the dimension of the batch: `kept.batch`, or a multiple of it

    @staticmethod
    def __new__(cls, rows: Tensor, kept: Kept, dim: int, size: Sequence[int]) -> RowGradient:  # noqa: D102
        whole = _make_wrapper(cls, size, dtype=rows.dtype, device=rows.device)
        _forbid_memory_access(whole)
        whole.rows, whole.kept, whole.batch_dim, whole.length = rows, kept, dim, size[dim]
        return whole

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __coerce_same_metadata_as_tangent__(self, expected_metadata: Any, expected_type: type | None = None) -> Any:
        """What the backward pass of a compiled module takes, which was compiled for dense gradients."""
        self.kept.detours["torch.compile"] += 1
        return dense(self)

    def has_batch_in(self, dims: int | Sequence[int]) -> bool:
        """Whether the batch is one of these dimensions."""
        rank = self.dim()
        return any(each % rank == self.batch_dim for each in ((dims,) if isinstance(dims, int) else dims))

    def __repr__(self) -> str:
        return f"RowGradient({tuple(self.shape)}, rows={tuple(self.rows.shape)}, dim={self.batch_dim})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        rule = RULES.get(func)
        result = NotImplemented if rule is None else rule(func, args, kwargs or {})
        return _detour(func, args, kwargs or {}) if result is NotImplemented else result


def register(rule: Rule, names: str) -> None:
    """Use a rule for operations of `torch.ops.aten`, named `operation.overload`; ones that torch lacks are left out."""
    for name in names.split():
        packet, overload = name.split(".")
        operation = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if operation is not None:
            RULES[operation] = rule


def select_rows(gradient: Tensor, kept: Kept) -> RowGradient:
    """The kept rows of a dense gradient `[batch, …]`."""
    return RowGradient(gradient.index_select(0, kept.index), kept, 0, gradient.shape)


def spread(rows: Tensor, kept: Kept, dim: int, length: int) -> RowGradient:
    """The gradient with these rows: of their shape, but with `length` in the dimension of the batch."""
    size = list(rows.shape)
    size[dim] = length
    return RowGradient(rows, kept, dim, size)


def with_rows(gradient: RowGradient, rows: Tensor) -> RowGradient:
    """The gradient with these rows, of any shape, and the batch where it is in another gradient."""
    return spread(rows, gradient.kept, gradient.batch_dim, gradient.length)


def dense(gradient: RowGradient) -> Tensor:
    """The whole gradient, with zeros in the rows that are not kept. New memory."""
    size, dim, kept = list(gradient.shape), gradient.batch_dim, gradient.kept
    before, merged, after = size[:dim], size[dim] // kept.batch, size[dim + 1 :]
    whole = gradient.rows.new_zeros([*before, kept.batch, merged, *after])
    whole.index_copy_(dim, kept.index, gradient.rows.reshape([*before, kept.count, merged, *after]))
    return whole.view(size)


def unwrapped(gradient: Tensor) -> Tensor:
    """A gradient with all rows as an ordinary tensor; others as they are."""
    if not isinstance(gradient, RowGradient) or gradient.kept.count < gradient.kept.batch:
        return gradient
    return gradient.rows


def pick(tensor: Tensor, dim: int, kept: Kept) -> Tensor:
    """The kept rows of a dense tensor with the batch in `dim`, perhaps merged with following dimensions."""
    if kept.count == kept.batch:
        return tensor
    if dim == 1 and tensor.dim() == 2 and tensor.stride(0) == 1:  # transposed: whole rows are copied faster
        return pick(tensor.t(), 0, kept).t()
    if tensor.shape[dim] == kept.batch:
        return tensor.index_select(dim, kept.index)
    size = list(tensor.shape)
    merged = size[dim] // kept.batch
    size[dim : dim + 1] = [kept.batch, merged]
    rows = tensor.view(size).index_select(dim, kept.index)
    size[dim : dim + 2] = [kept.count * merged]
    return rows.view(size)


def fit(first: Any, second: Any) -> bool:
    """Whether two tensors are row-sparse gradients of one rank, with the same rows in the same dimension."""
    return (
        isinstance(first, RowGradient)
        and isinstance(second, RowGradient)
        and first.kept is second.kept
        and first.batch_dim == second.batch_dim
        and first.length == second.length
        and first.dim() == second.dim()
    )


def blank(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """New dense tensors, for which only the shape and the type of the gradient matter."""
    gradient = args[0]
    return func(gradient.rows.new_empty(()).expand(gradient.shape), *args[1:], **kwargs)


def _detour(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Run an operation on dense gradients, so that what it writes is seen in the gradients that it was given."""
    written = {id(args[0])} if func.is_view else _written(func, args, kwargs)  # what is written to a view, its base has
    wholes: dict[int, tuple[RowGradient, Tensor]] = {}

    def expose(gradient: RowGradient) -> Tensor:
        if id(gradient) not in wholes:
            wholes[id(gradient)] = gradient, _writable(gradient) if id(gradient) in written else dense(gradient)
        return wholes[id(gradient)][1]

    dense_args, dense_kwargs = tree_map_only(RowGradient, expose, (args, kwargs))
    counted = next(iter(wholes.values()))[0].kept.detours
    counted[str(func)] += 1
    result = func(*dense_args, **dense_kwargs)
    for gradient, whole in wholes.values():
        if id(gradient) in written:
            _replace(gradient, whole)
    same = {id(whole): gradient for gradient, whole in wholes.values() if id(gradient) in written}
    return tree_map_only(Tensor, lambda tensor: same.get(id(tensor), tensor), result) if same else result


def _written(func: Any, args: Args, kwargs: Kwargs) -> set[int]:
    """The identities of the gradients that an operation writes to: in place, or `out`."""
    schema = func._schema
    if not schema.is_mutable:
        return set()
    values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    targets = [values.get(each.name) for each in schema.arguments if each.alias_info and each.alias_info.is_write]
    return {id(target) for target in tree_iter(targets) if isinstance(target, RowGradient)}


def _writable(gradient: RowGradient) -> Tensor:
    """The whole gradient, in the memory of its base if it is a view. Views of the base that were taken before the base
    became dense do not see what is written.
    """
    base = gradient._base
    if not isinstance(base, RowGradient):
        return _memory(gradient)
    whole = _memory(base)
    _replace(base, whole)
    return gradient._view_func_unsafe(whole)


def _memory(gradient: RowGradient) -> Tensor:
    """The whole gradient: its own memory if it holds all rows."""
    return gradient.rows if gradient.kept.count == gradient.kept.batch else dense(gradient)


def _replace(gradient: RowGradient, whole: Tensor) -> None:
    """Let a gradient hold all rows, in this memory."""
    if whole.shape != gradient.shape:
        sizes = tuple(gradient.shape), tuple(whole.shape)
        raise RuntimeError("A row-sparse gradient of shape {} cannot become one of {} in place.".format(*sizes))
    gradient.rows, gradient.kept = whole, gradient.kept.everything
