"""Where in a model rows are dropped: the inputs of the last block of each stack, found in a first forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves


@dataclass
class Call:
    """One call of a block or layer in the forward pass."""

    name: str
    stack: str | None  # the stack that it is a block of
    work: float = 0.0  # floating-point operations with its own weight; 0 for blocks
    trains: bool = False  # whether its weight is trained
    fits: bool = False  # whether its inputs have the rows of the batch first, and gradients flow through them
    inputs: frozenset[Node] = frozenset()  # where gradients of its inputs with these rows go
    output: Node | None = None  # where the gradient of its output goes


@dataclass
class Plan:
    """Where rows are dropped, and what can be saved."""

    places: list[str]  # names of modules, at whose inputs rows are dropped; in the order of the forward pass
    share: float = 0.0  # share of the work of a step that is in proportion to the kept rows
    work: float = 0.0  # of the forward pass below, in floating-point operations
    layers: int = 0  # calls of layers below
    obstacle: str = ""  # why there is no place


def rows_of(args: Any, kwargs: Any) -> Tensor | None:
    """The first tensor of floats among the inputs of a module, whose rows are those of the batch."""
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return next((tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 1), None)


def tensors_of(args: Any, kwargs: Any, rows: int) -> list[Tensor]:
    """The inputs of a module that need a gradient, and have so many rows."""
    leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if leaf.requires_grad and leaf.shape[:1] == (rows,)]


def in_forward_pass() -> bool:
    """Whether a forward pass with gradients takes place, not one that a backward pass repeats."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


class Survey:
    """Records which modules a forward pass calls, and finds the places.

    A stack is a list of blocks of one class. Rows are dropped at the inputs of the last block that is called of each
    stack: the norm of a row's gradient there is nearly proportional to that of its parameter gradient. In a model
    without stacks, and where residuals bypass them, it is at the input of the last layer.

    Args:
        model: the model, not wrapped.
        batch: number of examples in the batch.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        self._model, self._batch = model, batch
        self._calls: list[Call] = []
        stack_of = {block: name for name, blocks in stacks(model) for block in blocks}
        self._handles = [
            module.register_forward_hook(partial(self._record, name, stack_of.get(module)), with_kwargs=True)
            for name, module in model.named_modules()
            if module in stack_of or _weight(module) is not None
        ]

    def _record(
        self, name: str, stack: str | None, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        if in_forward_pass():
            rows, weight = rows_of(args, kwargs), _weight(module)
            work = 0.0 if weight is None else _work(module, weight, output)
            fits = rows is not None and rows.requires_grad and rows.shape[0] % self._batch == 0
            inputs = frozenset(t.grad_fn for t in tensors_of(args, kwargs, len(rows)) if t.grad_fn) if fits else ()
            trains = weight is not None and weight.requires_grad
            self._calls.append(Call(name, stack, work, trains, fits, inputs, getattr(output, "grad_fn", None)))

    def end(self, recomputes: bool) -> Plan:
        """Remove the hooks, and plan.

        Args:
            recomputes: whether blocks are computed again in the backward pass, for the kept rows only.
        """
        for handle in self._handles:
            handle.remove()
        norms = ((name, m) for name, m in self._model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        for name, norm in norms:
            if norm.training and not isinstance(norm, nn.modules.instancenorm._InstanceNorm):
                return Plan([], obstacle=f"batch normalisation ({name}) couples the examples of a batch")
        return self._plan(recomputes)

    def _plan(self, recomputes: bool) -> Plan:
        number = Counter(call.stack for call in self._calls)
        last = {
            call.stack: i for i, call in enumerate(self._calls) if call.stack is not None and number[call.stack] > 1
        }
        layers = [i for i, call in enumerate(self._calls) if call.work]
        chosen = [i for i in last.values() if self._is_place(i)] or [i for i in layers[-1:] if self._calls[i].fits]
        if not chosen:
            return Plan(
                [], obstacle="no block has the examples in the first dimension of its input, and trained layers below"
            )
        start = max(map(self._start_of, chosen))  # that the backward pass comes to first
        below = [self._calls[i] for i in layers if i < start]
        backward = sum((1 + call.trains + recomputes) * call.work for call in below)
        above = sum((2 + call.trains) * call.work for call in self._calls[start:])
        forward = sum(call.work for call in below)
        if not forward:
            return Plan([], obstacle="there is no layer below the last one")
        places = list(dict.fromkeys(self._calls[i].name for i in sorted(chosen)))
        return Plan(places, backward / (forward + backward + above), forward, len(below))

    def _is_place(self, position: int) -> bool:
        """Whether all of the gradient of the layers below passes the inputs of a call; residuals may bypass it."""
        call = self._calls[position]
        if not call.fits:
            return False
        below = {below.output for below in self._calls[: self._start_of(position)] if below.work} - {None}
        return below.isdisjoint(_reached([above.output for above in self._calls[position:]], call.inputs))

    def _start_of(self, position: int) -> int:
        """Position of the first call within a call: hooks record a block after its layers."""
        inside = self._calls[position].name + "."
        while position > 0 and self._calls[position - 1].name.startswith(inside):
            position -= 1
        return position


def _reached(start: list[Node | None], without: frozenset[Node]) -> set[Node]:
    """The nodes of the backward pass that come after these, but not only after some others."""
    found: set[Node] = set()
    waiting = [node for node in start if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in found and node not in without:
            found.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def stacks(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Names and blocks of the lists of modules of one class that have parameters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and len(module) > 1):
            blocks = list(module)
            one_class = len({type(block) for block in blocks}) == 1
            if one_class and all(any(True for _ in block.parameters()) for block in blocks):
                yield name, blocks


def _weight(module: nn.Module) -> Tensor | None:
    """The matrix or kernel that a layer multiplies its input with."""
    weight = None if isinstance(module, nn.Embedding) else getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and len(getattr(weight, "ds_shape", weight.shape)) > 1 else None


def _work(module: nn.Module, weight: Tensor, output: Any) -> float:
    """Floating-point operations of a layer: two for each weight at each position of its output."""
    if not isinstance(output, Tensor):
        return 0.0
    channels = getattr(module, "out_features", None) or getattr(module, "out_channels", None) or output.shape[-1]
    return 2.0 * getattr(weight, "ds_numel", weight.numel()) * output.numel() / channels
