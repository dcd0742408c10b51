"""How fast the machine is during a training, which matters where it is shared with other work."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainerCallback

_ROWS, _WIDTH = 128, 384


class Gauge(TrainerCallback):
    """After each step, times a fixed piece of work: the forward and backward pass of a small perceptron, in one thread.

    Seconds of two trainings are comparable, even on different days, if each is divided by the mean of this.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = (_ROWS, _WIDTH), (4 * _WIDTH, _WIDTH), (_WIDTH, 4 * _WIDTH)
        self._values, *self._weights = (torch.randn(size, generator=generator) / size[1] ** 0.5 for size in sizes)
        self.seconds, self._number = 0.0, 0

    @property
    def mean(self) -> float:
        """Seconds of one piece of work."""
        return self.seconds / max(self._number, 1)

    @torch.enable_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        start = time.process_time()
        weights = [weight.detach().requires_grad_() for weight in self._weights]
        output = F.linear(F.gelu(F.linear(self._values, weights[0])), weights[1])
        torch.autograd.grad(output.square().sum(), weights)
        self.seconds += time.process_time() - start
        self._number += 1
