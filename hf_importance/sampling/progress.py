"""Effective steps: progress of training, measured in steps of uniform sampling.

A step with importance sampling is worth more than a uniform one. How much follows from two quantities: the variance
ratio ρ ([`rates.variance_ratio`]), the second moment of the gradient estimate relative to uniform sampling, and the
noise-to-signal ratio φ of the gradient of a batch. The progress of a step is proportional to 1/(1 + φ), and with
uniform sampling the noise would be 1/ρ times as large, so a step is worth (1 + φ/ρ)/(1 + φ) uniform steps. This is the
gain ratio of AdaScale SGD (Johnson et al., ICML 2020), with importance sampling in place of larger batches. As there,
the learning rate schedule follows the effective steps, and the learning rate is raised, here by the square-root rule of
Adam with larger batches (Malladi et al. 2022, arXiv 2205.10287).

If visits differ in cost, effective steps still determine the end of training, because the progress of a step depends on
its gradient and not on its cost. A visit costs on average κ = E[r c]/E[c] of a uniform one, so training that makes the
progress of n uniform steps takes n/gain steps, at κ/gain of their cost; both are reported. If noise dominates, gain =
1/ρ and κ/gain = ρ κ, variance × cost, which rates ∝ q/√c minimise (see the module `rates`). Counting 1/(ρ κ) instead
would overestimate the progress of cheap steps (κ < 1), ending training too early, and underestimate that of expensive
ones (κ > 1). The gain is at least 1, which does not overestimate it, because the guard rejects rates with ρ above 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.sampling.state import read_number, read_tensor

_MAX_ELEMENTS = 2**17
"""Elements of the gradient that are sampled."""
_MAX_TENSORS = 32
_DECAY = 0.5
"""Decay of the evidence per measurement (an eighth of a pass)."""


def gain(variance_ratio: float, signal: float) -> float:
    """Number of uniform steps that a step is worth: (1 + φ/ρ)/(1 + φ) = 1 + (1 − s)(1/ρ − 1), at least 1.

    Args:
        variance_ratio: ρ > 0.
        signal: s = 1/(1 + φ), the signal share of the squared norm of the batch gradient, in [0, 1].

    >>> gain(variance_ratio=0.5, signal=0.25)
    1.75
    >>> gain(variance_ratio=1.2, signal=0.25)
    1.0
    """
    return max(1.0, 1.0 + (1.0 - signal) * (1.0 / variance_ratio - 1.0))


def learning_rate_factor(gain: float) -> float:
    """Factor of the learning rate while a step is worth `gain` uniform steps: √gain.

    Adam normalises the gradient, including its noise, so the size of a step does not grow when noise is reduced. With
    the factor √gain, fewer steps cover the same distance with the same noise as all uniform steps.

    >>> learning_rate_factor(2.25)
    1.5
    """
    return gain**0.5


class EffectiveVisits:
    """Counts effective steps, which determine the learning rate and the end of training.

    Args:
        steps: requested number of (uniform) steps.
        steps_per_epoch: number of steps per epoch.

    >>> progress = EffectiveVisits(steps=10, steps_per_epoch=5)
    >>> progress.measure(torch.tensor([0.5, 1.0, 0.0, 1.0]))
    >>> progress.advance()
    >>> progress.value, progress.remaining_steps()
    (2.0, 4.0)
    """

    def __init__(self, steps: int, steps_per_epoch: int) -> None:
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.value = 0.0
        self.gain = 1.0
        self._sums = torch.zeros(4, dtype=torch.float64)

    @property
    def epochs(self) -> float:
        """Effective epochs so far."""
        return self.value / self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether the requested number of effective steps was reached."""
        return self.value >= self.steps

    def advance(self) -> None:
        """Count one more step."""
        self.value += self.gain

    def measure(self, sums: Tensor) -> None:
        """Update the gain from the steps since the last call.

        Args:
            sums: float64 `[4]`: second moment of the gradient estimate, and that of uniform sampling (numerator and
                denominator of ρ); dot product of consecutive gradients, and their mean square (numerator and
                denominator of the signal share). If the last two are 0, gradients could not be read, and noise and
                signal are assumed to be equal.
        """
        self._sums = _DECAY * self._sums + sums
        ours, uniform, product, square = self._sums.tolist()
        if ours > 0 and uniform > 0:
            self.gain = gain(ours / uniform, min(1.0, max(0.0, product / square)) if square > 0 else 0.5)

    def remaining_steps(self) -> float:
        """Expected number of remaining steps with the current gain."""
        return max(0.0, self.steps - self.value) / self.gain

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        state = {"value": self.value, "gain": self.gain, "sums": self._sums.clone()}
        return state | {"steps_per_epoch": self.steps_per_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`]; if `steps_per_epoch` differs, the effective epochs are preserved."""
        self.value, self.gain = read_number(state, "value", least=0), read_number(state, "gain", least=0)
        steps_per_epoch = read_number(state, "steps_per_epoch", int, 1)
        if steps_per_epoch != self.steps_per_epoch:
            self.value *= self.steps_per_epoch / steps_per_epoch
        self._sums = read_tensor(state, "sums", [4], torch.float64).clone()


class GradientSample:
    """Estimates signal and noise of the gradients from a fixed sample of their elements, without leaving the device.

    Consecutive gradients share the signal but not the noise: the mean of g_t·g_{t−1} estimates the squared signal, and
    the mean of (‖g_t‖² + ‖g_{t−1}‖²)/2 the sum of signal and noise. At most 2¹⁷ elements are sampled, in rows of at
    most 32 parameters evenly spread over the model, or in parts of rows if these are wide; only local ones if
    parameters are sharded.

    Args:
        parameters: parameters of the model.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._chosen: list[tuple[nn.Parameter, tuple[slice, ...]]] | None = None
        self._last: Tensor | None = None
        self._last_square: Tensor | None = None
        self._sums: Tensor | None = None

    @torch.no_grad()
    def observe(self) -> None:
        """Observe the gradients of a step, before the optimizer step."""
        if self._chosen is None:
            self._chosen = _choose(self._parameters)
        rows = [_local(p.grad)[part].flatten() for p, part in self._chosen if p.grad is not None]
        if len(rows) < max(1, len(self._chosen)):
            self._last = None
            return
        sample, last = torch.cat(rows).float(), self._last
        square, last_square = sample.dot(sample), self._last_square
        self._last, self._last_square = sample, square
        if last is None or len(last) != len(sample):
            return
        pair = torch.stack([sample.dot(last.to(sample.device)), (square + last_square.to(sample.device)) / 2])
        pair = pair.where(pair.isfinite().all(), 0.0)  # gradients overflowed: fp16 skips this step
        self._sums = pair if self._sums is None else self._sums + pair

    def take(self, device: torch.device) -> Tensor:
        """Dot product and mean square, summed over the pairs since the last call, float32 `[2]`; 0 without pairs."""
        sums, self._sums = self._sums, None
        return torch.zeros(2, device=device) if sums is None else sums.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            name: None if (x := getattr(self, f"_{name}")) is None else x.cpu().clone() for name in ("last", "sums")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        for name, size in (("last", None), ("sums", 2)):
            value = read_tensor(state, name, [size], torch.float32, optional=True)
            setattr(self, f"_{name}", None if value is None else value.to(device))
        self._last_square = None if self._last is None else self._last.dot(self._last)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _choose(parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
    """Choose the sampled parameters and the parts of their gradients: matrices, or others if there are none."""
    usable = [p for p in parameters if p.grad is not None and not p.grad.is_sparse and _local(p.grad).numel()]
    matrices = [p for p in usable if p.dim() > 1] or [p for p in usable if p.dim() > 0]
    chosen = matrices[:: -_ceil(len(matrices), _MAX_TENSORS)] if matrices else []
    each = _MAX_ELEMENTS // max(1, len(chosen))
    shapes = [_local(p.grad).shape for p in chosen]
    strides = [[_ceil(shape.numel(), each)] for shape in shapes]
    if sum(map(_remaining, shapes, strides)) > _MAX_ELEMENTS:  # by part of a row each, or wide rows
        strides = [_strides(shape, each) for shape in shapes]
    return [(p, tuple(slice(None, None, stride) for stride in mine)) for p, mine in zip(chosen, strides, strict=True)]


def _strides(shape: torch.Size, most: int) -> list[int]:
    """Strides along the first dimensions with which at most `most` elements remain, in whole rows if two of them fit.

    Otherwise at most √most rows remain, thinned out too: a single row may be that of an output that is never used.

    >>> _strides(torch.Size([100, 10]), most=500), _strides(torch.Size([100, 10_000]), most=400)
    ([2], [5, 500])
    """
    strides = []
    for dim, size in enumerate(shape):
        fit = most // shape[dim + 1 :].numel()
        whole = fit >= min(size, 2)
        strides.append(_ceil(size, fit if whole else math.isqrt(most)))
        if whole:
            break
        most //= _ceil(size, strides[-1])
    return strides


def _remaining(shape: torch.Size, strides: list[int]) -> int:
    """Number of elements of a tensor that remain with strides along its first dimensions."""
    return math.prod(map(_ceil, shape, strides)) * shape[len(strides) :].numel()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
