"""Checkpointed blocks of which the backward pass computes the kept rows again, and no others.

Where a share k of the rows is kept, a block costs 1 + 3k times its forward pass; with checkpointing, it costs 4, and 3
without. The rows are computed by ordinary operations on ordinary tensors.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from hf_importance.backward.blocks import Block, Call

logger = logging.getLogger(__name__)

_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum, type(None))
"""Types of arguments that can be given once more. Others, such as caches, may change when they are used."""
_SHARDED = ("device_mesh", "ds_id", "_fsdp_flattened")
"""Attributes of the parameters of FSDP2, DeepSpeed ZeRO-3, FSDP1."""


class RecomputeRows:
    """Replaces the function that checkpoints the blocks of a model of transformers.

    A block that gets [`RowGradient`]s is computed again for these rows only, and `RowGradient`s go on. The first time,
    gradients are compared with those of the whole batch; if they differ, or an error is raised, the block is computed
    again for the whole batch from then on. So it is as long as sizes leave open which arguments have the rows of the
    batch. A block that gets dense gradients is checkpointed as usual.

    Gradients are exact, except that there is none for parameters that a block uses without owning them. Blocks keep the
    original function where parameters are sharded, where an argument is a cache, and while a model is compiled: it
    computes the whole batch again, and `RowGradient`s pass through its operations.

    Args:
        model: the model, with gradient checkpointing enabled.
        report: called once with each reason why rows of a class of blocks are not recomputed.
    """

    def __init__(self, model: nn.Module, report: Callable[[str], object] = logger.warning) -> None:
        self._model, self._report = model, report
        self._originals: dict[nn.Module, Callable[..., Any]] = {}
        self._blocks: dict[nn.Module, Block] = {}
        self._reported: set[str] = set()

    @property
    def blocks(self) -> int:
        """In how many modules the function is replaced, or would be."""
        return sum(1 for _ in self._checkpointed())

    def attach(self) -> int:
        """Replace the function; returns in how many modules."""
        for module in self._checkpointed():
            if not self._is_ours(module._gradient_checkpointing_func):
                self._originals[module] = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = functools.partial(self._checkpoint, self._originals[module])
        return len(self._originals)

    def detach(self) -> None:
        """Restore the original functions. What is known of the blocks stays."""
        for module, original in self._originals.items():
            if self._is_ours(module._gradient_checkpointing_func):  # not where checkpointing was enabled once more
                module._gradient_checkpointing_func = original
        self._originals.clear()

    def _is_ours(self, function: Callable[..., Any]) -> bool:
        return getattr(function, "func", None) == self._checkpoint

    def _checkpointed(self) -> Iterator[nn.Module]:
        for module in self._model.modules():
            is_enabled = getattr(module, "gradient_checkpointing", False) is True
            if is_enabled and hasattr(module, "_gradient_checkpointing_func") and not _is_sharded(module.parameters()):
                yield module

    def _checkpoint(
        self, original: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        if options or torch.compiler.is_compiling():
            return original(function, *args, **options)
        if not torch.is_grad_enabled():
            return function(*args)
        module, run, arguments = _taken_apart(function, args)
        if module is None or getattr(module, "_is_replica", False):  # of DataParallel, which lives for one step
            return original(function, *args)
        parameters = list(module.parameters())
        paths, spec = tree_flatten_with_path(arguments)
        leaves = {keystr(path): leaf for path, leaf in paths}
        if _is_sharded(parameters) or not all(isinstance(leaf, _PLAIN) for leaf in leaves.values()):
            return original(function, *args)
        block = self._blocks.setdefault(module, Block(type(module).__name__, self._report_once))
        call = Call(block, run, leaves, spec, [parameter for parameter in parameters if parameter.requires_grad])
        return call.forward([leaf for leaf in leaves.values() if isinstance(leaf, Tensor)])

    def _report_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            self._report(message)


def _taken_apart(
    function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[nn.Module | None, Callable[..., Any], tuple[Any, dict[str, Any]]]:
    """The module whose forward pass `function(*args)` is, None if it is not known; a function and its arguments."""
    keywords: dict[str, Any] = {}
    run, first = function, None
    if isinstance(function, functools.partial):
        first = function.args[0] if function.args and isinstance(function.args[0], nn.Module) else None
        bound = function.args[: first is not None]
        run = functools.partial(function.func, *bound)
        args, keywords = (*function.args[len(bound) :], *args), dict(function.keywords)
        function = function.func
    module = first if first is not None else getattr(function, "__self__", function)
    return (module if isinstance(module, nn.Module) else None), run, (args, keywords)


def _is_sharded(parameters: Iterable[Tensor]) -> bool:
    return any(hasattr(parameter, name) for parameter in parameters for name in _SHARDED)
