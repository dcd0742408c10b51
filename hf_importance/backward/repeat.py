"""What a forward pass needs to be the same when it is repeated, for the whole batch or for some of its rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import set_device_states

from hf_importance.backward.rows import Kept, pick

_ATTENTION = "scaled_dot_product"  # in the names of its kernels
_current = threading.local()


class RowsError(Exception):
    """Rows cannot be recomputed alone; the message says why."""


@dataclass
class Draw:
    """An operation that draws random numbers in the forward pass of a block."""

    name: str
    shape: torch.Size  # of its first tensor when it was recorded
    order: list[int]  # of the dimensions of this tensor in memory, in which numbers are drawn
    by_row: bool | None = None  # whether the first dimension has the rows of the batch; None until rows were recomputed


class RecordDraws(TorchDispatchMode):
    """Records the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_random(func, args, kwargs or {}):
            tensor = next(x for x in (*args, result) if isinstance(x, Tensor))
            self.draws.append(Draw(str(func), tensor.shape, _order(tensor)))
        return result


class DrawRows(TorchDispatchMode):
    """While rows are recomputed, random numbers are those that the whole batch has in these rows.

    An operation that draws random numbers runs on the whole batch, with the kept rows of its arguments in their places;
    of its result, the rows are taken. An operation whose numbers do not belong to rows runs as it is.

    Args:
        kept: the rows.
        draws: the operations of the forward pass of the block that draw random numbers, in their order.
        start: number of the first operation.

    Raises:
        RowsError: if an operation is not as recorded.
    """

    def __init__(self, kept: Kept, draws: list[Draw], start: int = 0) -> None:
        super().__init__()
        self._kept, self._draws, self._next = kept, draws, start
        self._is_whole = False  # whether the current operation has the whole batch already
        self._attention = _WholeAttention(self)

    @staticmethod
    def from_here() -> Callable[[], DrawRows] | None:
        """For a block within the block that is recomputed: how it can draw the same numbers once more."""
        current = getattr(_current, "mode", None)
        if current is None:
            return None
        start = current._next
        return lambda: DrawRows(current._kept, current._draws, start)

    def __enter__(self) -> DrawRows:
        self._before, _current.mode = getattr(_current, "mode", None), self
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)
        _current.mode = self._before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func, args, kwargs):
            return func(*args, **kwargs)
        if self._next >= len(self._draws) or self._draws[self._next].name != str(func):
            raise RowsError(f"{func} draws other random numbers than in the forward pass")
        draw = self._draws[self._next]
        self._next += 1
        sizes = (x.shape if isinstance(x, Tensor) else torch.Size(x) for x in args if isinstance(x, (Tensor, list)))
        if self._is_whole or not self._is_by_row(draw, next(sizes, torch.Size())):
            return func(*args, **kwargs)
        if _ATTENTION in draw.name:
            raise RowsError(f"{func} has dropout, which its backward pass draws again")
        if func._schema.is_mutable and not func.overloadpacket.__name__.endswith("_"):
            raise RowsError(f"{func} writes random numbers into an argument")
        return self._draw_whole(func, draw, args, kwargs)

    def next_is_in_kernel(self) -> bool:
        """Whether the next numbers were drawn within an attention kernel."""
        return self._next < len(self._draws) and _ATTENTION in self._draws[self._next].name

    def _is_by_row(self, draw: Draw, size: torch.Size) -> bool:
        """Whether an operation draws numbers for each row. The first time, this shows in the recorded shape."""
        if draw.by_row is None:
            of_rows = len(size) == len(draw.shape) > 0 and size[1:] == draw.shape[1:]
            of_rows = of_rows and size[0] * self._kept.batch == draw.shape[0] * len(self._kept.index)
            if not of_rows and size != draw.shape:
                raise RowsError(f"{draw.name} draws {tuple(size)} numbers, not rows of {tuple(draw.shape)}")
            draw.by_row = of_rows
        return draw.by_row

    def _draw_whole(self, func: Any, draw: Draw, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept, rows = self._kept, len(self._kept.index)
        if not isinstance(args[0], Tensor):  # the size of a new tensor
            at = next(i for i, x in enumerate(args) if isinstance(x, list))
            size = [args[at][0] // rows * kept.batch, *args[at][1:]]
            return pick(func(*args[:at], size, *args[at + 1 :], **kwargs), 0, kept)
        whole = [self._embed(x, draw.order) if isinstance(x, Tensor) and x.dim() else x for x in args]
        result = func(*whole, **kwargs)
        if func._schema.is_mutable:
            args[0].copy_(pick(result, 0, kept))
            return args[0]
        return tree_map_only(Tensor, lambda x: pick(x, 0, kept), result)

    def _embed(self, rows: Tensor, order: list[int]) -> Tensor:
        """The whole batch, with these rows, and in memory in this order."""
        kept, count = self._kept, len(self._kept.index)
        size = [rows.shape[0] // count * kept.batch, *rows.shape[1:]]
        whole = rows.new_zeros([size[d] for d in order]).permute([order.index(d) for d in range(len(order))])
        whole.unflatten(0, (kept.batch, -1)).index_copy_(0, kept.index, rows.unflatten(0, (count, -1)))
        return whole


class _WholeAttention(TorchFunctionMode):
    """Attention kernels with dropout draw their numbers again in the backward pass: both run on the whole batch."""

    def __init__(self, mode: DrawRows) -> None:
        super().__init__()
        self._mode, self._kept = mode, mode._kept

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        if func is not F.scaled_dot_product_attention or not dropout or not self._mode.next_is_in_kernel():
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        count, rows = query.shape[0], len(self._kept.index)
        if count % rows:
            raise RowsError(f"attention with dropout on {count} rows, which are no multiple of {rows}")

        def whole(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[0] != count:
                return x
            size = (self._kept.batch, count // rows, *x.shape[1:])
            return x.new_zeros(size).index_copy(0, self._kept.index, x.unflatten(0, (rows, -1))).flatten(0, 1)

        self._mode._is_whole = True
        try:
            result = func(*map(whole, args), **{name: whole(value) for name, value in kwargs.items()})
        finally:
            self._mode._is_whole = False
        return result.unflatten(0, (self._kept.batch, -1)).index_select(0, self._kept.index).flatten(0, 1)


class Surroundings:
    """Random states and autocast of the forward pass."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._type = next((x.device.type for x in tensors if x.device.type not in ("cpu", "meta")), "cpu")
        self._module = torch.get_device_module(self._type)
        has_states = getattr(self._module, "_initialized", False)
        self._devices = sorted({x.get_device() for x in tensors if x.device.type == self._type}) if has_states else []
        self._states = self._now()
        self._autocast = {
            device: {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
            for device in sorted({"cpu", self._type})
            if torch.amp.is_autocast_available(device)
        }

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *[self._module.get_rng_state(device) for device in self._devices]]

    def have_changed(self) -> bool:
        """Whether random numbers were drawn since."""
        return not all(map(torch.equal, self._states, self._now()))  # states are in the memory of the host

    def autocast_dtypes(self) -> set[torch.dtype]:
        """The types that operations convert to."""
        return {settings["dtype"] for settings in self._autocast.values() if settings["enabled"]}

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as in the forward pass."""
        with ExitStack() as stack:
            for device, settings in self._autocast.items():  # no cache: in one of the passes, copies have no gradients
                stack.enter_context(torch.autocast(device, **settings, cache_enabled=False))
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast and random states as in the forward pass; afterwards those of before."""
        with torch.random.fork_rng(self._devices, device_type=self._type), self.autocast():
            torch.set_rng_state(self._states[0])
            set_device_states(self._devices, self._states[1:], device_type=self._type)
            yield


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers. Attention kernels do so only with dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return (args[i] if i < len(args) else kwargs.get("dropout_p", 0.0)) > 0
    return True


def _order(tensor: Tensor) -> list[int]:
    """The dimensions in the order of the memory, the outermost first."""
    return sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
