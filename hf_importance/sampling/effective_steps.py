"""Effective steps: progress of training, measured in steps of uniform sampling."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.sampling.state import read_number, read_tensor

_MAX_ELEMENTS = 2**17  # elements of the gradient that are sampled
_MAX_TENSORS = 32
_DECAY = 0.5  # decay of the evidence per measurement (an eighth of a pass)


def gain(variance_ratio: float, signal: float) -> float:
    """Number of uniform steps that a step is worth: (1 + φ/ρ)/(1 + φ) = 1 + (1 − s)(1/ρ − 1), at least 1.

    The progress of a step is proportional to 1/(1 + φ), with φ the noise-to-signal ratio of the gradient of a batch,
    and with uniform sampling the noise would be 1/ρ times as large. This is the gain ratio of AdaScale SGD (Johnson et
    al., ICML 2020), with importance sampling in place of larger batches.

    Args:
        variance_ratio: ρ > 0, the second moment of the gradient estimate relative to uniform sampling.
        signal: s = 1/(1 + φ), the signal share of the squared norm of the batch gradient, in [0, 1].

    >>> gain(variance_ratio=0.5, signal=0.25)
    1.75
    >>> gain(variance_ratio=1.2, signal=0.25)
    1.0
    """
    return max(1.0, 1.0 + (1.0 - signal) * (1.0 / variance_ratio - 1.0))


def learning_rate_factor(gain: float) -> float:
    """Factor of the learning rate while a step is worth `gain` uniform steps: √gain (Malladi et al. 2022).

    Adam normalises the gradient, including its noise, so the size of a step does not grow when noise is reduced. With
    this factor, fewer steps cover the same distance with the same noise as all uniform steps (arXiv 2205.10287).

    >>> learning_rate_factor(2.25)
    1.5
    """
    return gain**0.5


class EffectiveSteps:
    """Counts effective steps, which determine the learning rate and the end of training.

    This also holds if visits differ in cost, because the progress of a step depends on its gradient and not on its
    cost. A visit costs on average κ = E[r c]/E[c] of a uniform one, so training that makes the progress of n uniform
    steps takes n/gain steps, at κ/gain of their cost. If noise dominates, that is ρ κ, which rates ∝ q/√c minimise (see
    the module `rates`). Counting 1/(ρ κ) instead of the gain would end training too early with cheap steps (κ < 1).

    >>> progress = EffectiveSteps(steps=10, steps_per_epoch=5)
    >>> progress.measure(torch.tensor([0.5, 1.0, 0.0, 1.0]))
    >>> progress.advance()
    >>> progress.value, progress.remaining_steps()
    (2.0, 4.0)
    """

    def __init__(self, steps: int, steps_per_epoch: int) -> None:
        self.steps, self.steps_per_epoch = steps, steps_per_epoch  # of uniform sampling
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
        """Update the gain from the steps since the last call, by float64 sums `[4]`.

        They are the second moment of the gradient estimate and that of uniform sampling, whose ratio is ρ; the dot
        product of consecutive gradients and their mean square, whose ratio is the signal share, ½ if gradients could
        not be read.
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
        state = {"value": self.value, "gain": self.gain, "steps_per_epoch": self.steps_per_epoch}
        return state | {"sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`]; if `steps_per_epoch` differs, the effective epochs are preserved."""
        self.value, self.gain = read_number(state, "value", least=0), read_number(state, "gain", least=0)
        steps_per_epoch = read_number(state, "steps_per_epoch", int, 1)
        if steps_per_epoch != self.steps_per_epoch:
            self.value *= self.steps_per_epoch / steps_per_epoch
        self._sums = read_tensor(state, "sums", [4], torch.float64)


class GradientSample:
    """Estimates signal and noise of the gradients from a fixed sample of their elements, without leaving the device.

    Consecutive gradients share the signal but not the noise: the mean of g_t·g_{t−1} estimates the squared signal, and
    the mean of (‖g_t‖² + ‖g_{t−1}‖²)/2 the sum of signal and noise. At most 2¹⁷ elements are sampled, in rows of at
    most 32 parameters evenly spread over the model, or in parts of rows if these are wide; only local ones if
    parameters are sharded.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._sampled: list[tuple[nn.Parameter, tuple[slice, ...]]] | None = None
        self._last: Tensor | None = None
        self._last_square: Tensor | None = None
        self._sums: Tensor | None = None

    @torch.no_grad()
    def observe(self) -> None:
        """Observe the gradients of a step, before the optimizer step."""
        if self._sampled is None:
            self._sampled = _choose(self._parameters)
        gradients = [(local_part(p.grad), part) for p, part in self._sampled if p.grad is not None]
        if len(gradients) < max(1, len(self._sampled)):
            self._last = None
            return
        sample = torch.cat([(g[part] if part else g).flatten() for g, part in gradients]).float()
        square, last, last_square = sample.dot(sample), self._last, self._last_square
        self._last, self._last_square = sample, square
        if last is None or len(last) != len(sample):
            return
        if last_square is None:  # restored
            last = last.to(sample.device)
            last_square = last.dot(last)
        pair = torch.stack([sample.dot(last), (square + last_square) / 2])
        pair = pair.where(pair.isfinite().all(), 0.0)  # gradients overflowed: fp16 skips this step
        self._sums = pair if self._sums is None else self._sums.to(pair.device) + pair

    def take(self, device: torch.device) -> Tensor:
        """Dot product and mean square, summed over the pairs since the last call, float32 `[2]`; 0 without pairs."""
        sums, self._sums = self._sums, None
        return torch.zeros(2, device=device, dtype=torch.float32) if sums is None else sums.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, or None."""
        tensors = {"last": self._last, "sums": self._sums}
        return {name: None if tensor is None else tensor.cpu().clone() for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a [`state_dict`] exactly."""
        self._last, self._last_square = read_tensor(state, "last", [None], torch.float32, optional=True), None
        self._sums = read_tensor(state, "sums", [2], torch.float32, optional=True)


def local_part(gradient: Tensor) -> Tensor:
    """The gradient, or the part of it on this device if the parameter is sharded."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _choose(parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
    """Choose the sampled parameters (matrices, if any) and the parts of their gradients; none for whole ones."""
    usable = [p for p in parameters if p.grad is not None and not p.grad.is_sparse and local_part(p.grad).numel()]
    usable = [p for p in usable if p.dim() > 1] or [p for p in usable if p.dim() > 0]
    if not usable:
        return []
    sampled = usable[:: -math.ceil(len(usable) / _MAX_TENSORS)]
    gradients, most = [local_part(p.grad) for p in sampled], _MAX_ELEMENTS // len(sampled)
    parts = [(slice(None, None, math.ceil(g.numel() / most)),) for g in gradients]
    if sum(g[part].numel() for g, part in zip(gradients, parts, strict=True)) > _MAX_ELEMENTS:  # rows are wide
        parts = [_part(g.shape, most) for g in gradients]
    parts = [() if all(s.step == 1 for s in part) else part for part in parts]
    return list(zip(sampled, parts, strict=True))


def _part(shape: torch.Size, most: int) -> tuple[slice, ...]:
    """At most `most` elements, evenly spaced: whole rows if two of them fit, else elements of at most √most rows.

    A single row may be that of an output that is never used.

    >>> _part(torch.Size([100, 10]), most=500), _part(torch.Size([100, 10_000]), most=400)
    ((slice(None, None, 2),), (slice(None, None, 5), slice(None, None, 500)))
    """
    rows, fitting = shape[0], most // shape[1:].numel()
    if fitting >= min(rows, 2):
        return (slice(None, None, math.ceil(rows / fitting)),)
    stride = math.ceil(rows / math.isqrt(most))
    return slice(None, None, stride), *_part(shape[1:], most // math.ceil(rows / stride))
