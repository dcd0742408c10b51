"""Effective visits: how much was learnt, in visits of uniform sampling.

A visit drawn by importance is worth more than a uniform one. By how much follows from two figures. ρ, the variance
ratio ([`rates.variance_ratio`]), says how large the gradient estimate of one example is, relative to uniform sampling.
φ, noise over signal of the gradient of a batch, says for how much of a step that matters: a step makes progress in
proportion to 1/(1 + φ), and with uniform sampling the noise would be 1/ρ as large. So a visit counts (1 + φ/ρ)/(1 + φ).
That is the gain ratio of AdaScale SGD (Johnson et al., ICML 2020), with importance sampling in the place of
larger batches; as there, the schedule of the learning rate follows what was gained, and the learning rate is raised.
By how much is the square-root rule, that of Adam with larger batches (Malladi et al. 2022, arXiv 2205.10287).

Where visits cost differently, that stays what ends training: what a step teaches depends on its gradient, and not on
what it costs. A visit costs κ = E[r c]/E[c] of a uniform one on average. So what n uniform steps teach is learnt in
n/gain steps, at κ/gain of their cost: both are told. Where noise rules, gain = 1/ρ and κ/gain = ρ κ, variance × cost,
which rates ∝ q/√c make least ([`rates`]). To count 1/(ρ κ) instead would take cheap steps (κ < 1) for much learnt, and
end early with less; and dear ones (κ > 1) would count for less than they teach. That no step counts less than one is no
gift either: the guard takes no rates with ρ above 1 for the sake of cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_importance.state import read_number, read_tensor

_MAX_ELEMENTS = 2**17
"""Of the gradient that are looked at."""
_MAX_TENSORS = 32
_DECAY = 0.5
"""Share of the evidence that is kept from measurement to measurement, an eighth of a pass."""


def gain(variance_ratio: float, signal: float) -> float:
    """How many uniform visits a visit is worth: (1 + φ/ρ)/(1 + φ) = 1 + (1 − s)(1/ρ − 1), never less than one.

    Args:
        variance_ratio: ρ > 0.
        signal: s = 1/(1 + φ), the share of the signal in the square of the gradient of a batch, in [0, 1].

    >>> gain(variance_ratio=0.5, signal=0.25)
    1.75
    >>> gain(variance_ratio=1.2, signal=0.25)
    1.0
    """
    return max(1.0, 1.0 + (1.0 - signal) * (1.0 / variance_ratio - 1.0))


def learning_rate_factor(gain: float) -> float:
    """How much higher the learning rate is while a step is worth so many uniform ones: √gain.

    Adam divides by the size of the gradient, noise included. With less noise the same learning rate still goes as far
    in all, so that fewer steps would go less far; with √gain they go as far, and with as much noise, as all of them.

    >>> learning_rate_factor(2.25)
    1.5
    """
    return gain**0.5


class EffectiveVisits:
    """V, counted in steps of uniform sampling. The learning rate follows it, and training ends by it.

    Args:
        steps: of uniform sampling, in which what was asked for is learnt.
        steps_per_epoch: likewise.

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
        """Whether as much was learnt as uniform sampling would have learnt in all its steps."""
        return self.value >= self.steps

    def advance(self) -> None:
        """One more step was made."""
        self.value += self.gain

    def measure(self, sums: Tensor) -> None:
        """What the steps since the last time have shown.

        Args:
            sums: float64 `[4]`: second moment of the gradient estimate of an example, and with uniform sampling
                (numerator and denominator of ρ); scalar product of consecutive gradients, and their mean square
                (numerator and denominator of the share of the signal). Where the last two are 0, gradients could not
                be read, and the noise is taken to be as large as the signal.
        """
        self._sums = _DECAY * self._sums + sums
        ours, uniform, product, square = self._sums.tolist()
        if ours > 0 and uniform > 0:
            self.gain = gain(ours / uniform, min(1.0, max(0.0, product / square)) if square > 0 else 0.5)

    def remaining_steps(self) -> float:
        """Steps still to be made, as it looks now."""
        return max(0.0, self.steps - self.value) / self.gain

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""
        state = {"value": self.value, "gain": self.gain, "sums": self._sums.clone()}
        return state | {"steps_per_epoch": self.steps_per_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where [`state_dict`] was taken; also with steps of another size: as many epochs were learnt."""
        self.value, self.gain = read_number(state, "value", least=0), read_number(state, "gain", least=0)
        steps_per_epoch = read_number(state, "steps_per_epoch", int, 1)
        if steps_per_epoch != self.steps_per_epoch:
            self.value *= self.steps_per_epoch / steps_per_epoch
        self._sums = read_tensor(state, "sums", [4], torch.float64).clone()


class GradientSample:
    """Signal and noise of the gradients, from a fixed sample of their elements; nothing leaves the device for it.

    Consecutive gradients have the signal in common and not the noise: the mean of g_t·g_{t−1} is that of the squared
    signal, and (‖g_t‖² + ‖g_{t−1}‖²)/2 that of signal and noise. At most 2¹⁷ elements are looked at, rows of at most 32
    parameters evenly spread over the model; those of this process where parameters are sharded.

    Args:
        parameters: of the model, those that are trained.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._chosen: list[tuple[nn.Parameter, int]] | None = None  # and every how many rows
        self._last: Tensor | None = None
        self._sums: Tensor | None = None

    @torch.no_grad()
    def observe(self) -> None:
        """Look at the gradients of a step, before the optimizer takes it."""
        if self._chosen is None:
            self._chosen = _choose(self._parameters)
        rows = [_local(p.grad)[::stride].flatten() for p, stride in self._chosen if p.grad is not None]
        if len(rows) < max(1, len(self._chosen)):
            self._last = None
            return
        sample, last = torch.cat(rows).float(), self._last
        self._last = sample
        if last is None or len(last) != len(sample):
            return
        last = last.to(sample.device)
        pair = torch.stack([sample.dot(last), (sample.dot(sample) + last.dot(last)) / 2])
        pair = pair.where(pair.isfinite().all(), 0.0)  # gradients that overflowed: fp16 leaves this step out
        self._sums = pair if self._sums is None else self._sums + pair

    def take(self, device: torch.device) -> Tensor:
        """float32 `[2]`: product and mean square, summed over the pairs since the last time; 0 if there were none."""
        sums, self._sums = self._sums, None
        return torch.zeros(2, device=device) if sums is None else sums.to(device)

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""
        return {
            name: None if (x := getattr(self, f"_{name}")) is None else x.cpu().clone() for name in ("last", "sums")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where [`state_dict`] was taken."""
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        for name, size in (("last", None), ("sums", 2)):
            value = read_tensor(state, name, [size], torch.float32, optional=True)
            setattr(self, f"_{name}", None if value is None else value.to(device))


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _choose(parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, int]]:
    """Those whose rows are looked at, and every how many: matrices, or whatever there is if there are none."""
    usable = [p for p in parameters if p.grad is not None and not p.grad.is_sparse and _local(p.grad).numel()]
    matrices = [p for p in usable if p.dim() > 1] or [p for p in usable if p.dim() > 0]
    step = -(-len(matrices) // _MAX_TENSORS) if matrices else 1
    chosen = matrices[::-1][::step]
    each = _MAX_ELEMENTS // max(1, len(chosen))
    return [(p, max(1, -(-_local(p.grad).numel() // each))) for p in chosen]
