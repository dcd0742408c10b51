"""Forward passes without effects, for checks that must not change the training."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_importance.randomness import isolated_randomness

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


@contextmanager
def without_side_effects(model: nn.Module, separately: bool = False) -> Iterator[None]:
    """Forward passes without gradients, in the modes that the modules are in, which leave no trace in them.

    `eval()` and `train()` are not called, because models override them: LoRA layers merge their weights, frozen batch
    normalisation keeps its mode. Inside, buffers are copies, and random generators start from a fixed seed. Afterwards
    the attributes of every module (modes, counters, lists, hooks), buffers and random states are those of before.
    What a module does elsewhere is not undone: parameters that its forward pass changes, global variables, lists that
    hooks fill, objects in its attributes.

    `separately`: compute the rows independently of each other, without dropout and batch statistics, by setting the
    flag `training` of single modules. Layers with weights keep theirs: they do not mix rows, and some of them convert
    their weights in the first pass in evaluation mode (4-bit weights on a CPU).
    """
    modules = list(model.modules())
    devices = {parameter.device for parameter in model.parameters()}
    modes = [module.training for module in modules]
    copies: dict[int, Tensor] = {}
    restore = [_isolate(module, copies) for module in modules]
    try:
        for module in modules if separately else ():
            weights = any(weight is not None for weight in module._parameters.values())
            module.training &= weights and not hasattr(module, "running_mean")
        with torch.no_grad(), isolated_randomness(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # of checkpointing
            yield
    finally:
        for undo in restore:
            undo()
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:  # of a compiled module, which has it elsewhere
                module.training = mode


def _isolate(module: nn.Module, copies: dict[int, Tensor]) -> Callable[[], None]:
    """Replace buffers and tensors of a module by copies; returns a function that restores all its attributes.

    Buffers that modules share are copied once. The originals may be saved for a backward pass, so they must not change.
    """
    attributes = vars(module)
    before = dict(attributes)
    # hooks as well, with what says that they are there; but not parameters, which FSDP2 exchanges in a forward pass
    containers = [before[name] for name in before.keys() - {"_parameters"} if type(before[name]) in _CONTAINERS]
    contents = [(value, copy.copy(value)) for value in containers]
    buffers = dict(module._buffers.items())
    states = [(value, value.get_state()) for value in before.values() if isinstance(value, torch.Generator)]
    for name, value in before.items():
        if type(value) is Tensor:
            attributes[name] = value.detach().clone()
    for name, buffer in buffers.items():
        if buffer is not None:
            module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())

    def restore() -> None:
        for name in attributes.keys() - before.keys():
            del attributes[name]
        attributes.update(before)
        for generator, state in states:
            generator.set_state(state)
        for value, was in contents:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(was)
        for name, buffer in buffers.items():
            if module._buffers[name] is not buffer:
                module._buffers[name] = buffer

    return restore
