"""Random numbers that do not affect those of training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn


@contextmanager
def isolated_randomness(
    seed: int = 0, devices: Iterable[torch.device] = (), owners: Iterable[Any] = (), depth: int = 3
) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch on exit, as if nothing had been drawn inside.

    Args:
        seed: seed of the global generators inside.
        devices: GPUs whose generators are restored, in addition to the CPU.
        owners: datasets, collators or modules whose own generators are restored as well.
        depth: how deep generators are looked for in the attributes of owners.
    """
    python, arrays = random.getstate(), numpy.random.get_state()
    restore = [undo for owner in owners for undo in _restoring(owner, depth)]
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
            for undo in restore:
                undo()


def _restoring(owner: Any, depth: int) -> Iterator[Callable[[], None]]:
    """Functions that restore each generator in an object and its attributes, and remove those created later."""
    attributes = getattr(owner, "__dict__", {})
    for name, value in list(attributes.items()):
        undo = _restoring_generator(value)
        if undo is not None:
            yield undo
        elif value is None:
            yield lambda name=name: _forget_generator(attributes, name)
        elif depth and not isinstance(value, (type, nn.Module)):
            yield from _restoring(value, depth - 1)


def _restoring_generator(value: Any) -> Callable[[], None] | None:
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    if isinstance(value, numpy.random.RandomState):
        arrays = value.get_state()
        return lambda: value.set_state(arrays)
    if isinstance(value, numpy.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    return None


def _forget_generator(attributes: dict[str, Any], name: str) -> None:
    if _restoring_generator(attributes.get(name)) is not None:
        attributes[name] = None
