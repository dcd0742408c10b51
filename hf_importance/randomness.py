"""Random numbers that do not affect those of training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def isolated_randomness(seed: int = 0, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore the global random state of Python, NumPy and torch on exit, as if nothing had been drawn inside.

    Args:
        seed: seed of the global generators inside.
        devices: GPUs whose generators are restored, in addition to the CPU.
    """
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
