"""TRL's trainers on preference pairs: an example is a pair."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_importance.adapters.base import UNKNOWN, ComputeLoss, LossAdapter, outputs_of
from hf_importance.adapters.fused_head import auxiliary_loss, request_sum_of_squares
from hf_importance.losses import per_example
from hf_importance.losses.objective import Measured, observed_of
from hf_importance.sampling.draw import Draw

_COUPLED = {
    "aot": "sorts the margins of the batch",
    "aot_unpaired": "sorts the log ratios of the batch",
    "sft": "is a mean over the tokens of all pairs",
}


class RewardLoss(LossAdapter):
    """The loss of `RewardTrainer`: −log σ(Δ − margin) + c · (r₁ + r₂)² for rewards r₁, r₂ with difference Δ."""

    def measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """See [`LossAdapter`]. The importance is √2 · σ(margin − Δ) if c is 0."""
        (outputs,) = outputs_of(compute_loss, model, inputs)
        chosen, rejected = outputs["logits"].squeeze(-1).float().chunk(2)
        difference, total = chosen - rejected - inputs.get("margin", 0.0), chosen + rejected
        centering = self.trainer.args.center_rewards_coefficient or 0.0
        losses = -F.logsigmoid(difference) + centering * total.square()

        def of_logits() -> Tensor:
            slope, pull = torch.sigmoid(-difference), 2 * centering * total
            return (2 * (slope.square() + pull.square())).sqrt()

        return Measured(losses, self.importance(losses, of_logits), observed_of(losses), 0.0, None)


class DPOLoss(LossAdapter):
    """The losses of `DPOTrainer`: each `loss_type` that is a mean over pairs, and weighted sums of them.

    They are functions of the log probabilities of the tokens of both answers. The importance is the norm of the
    gradient with respect to the logits of these tokens, √(Σ g² ‖p − e_y‖²), where g is the derivative with respect to
    the log probability of a token. For `sigmoid` it is β σ(−βΔ) · √(Σ ‖p − e_y‖²), summed over both answers.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        for kind in trainer.loss_types:
            if kind in _COUPLED:
                raise ValueError(
                    f"loss_type={kind!r} {_COUPLED[kind]}, so there is no per-pair loss to weight: use another "
                    "loss_type, or DPOTrainer alone."
                )
        request_sum_of_squares(trainer.model, ("log_probs", "entropy", "mean_logits", "is_top1"))

    def measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """See [`LossAdapter`]."""
        pairs, weights = len(draw.index), self.trainer.loss_weights
        means: list[Tensor] = []
        log_probs: list[Tensor] = []

        def watch(outputs: Any) -> None:
            log_probs.append(outputs.log_probs)
            outputs.log_probs = _capture_means(outputs.log_probs, pairs, means)

        (outputs,) = outputs_of(compute_loss, model, inputs, watch)
        if len(means) < len(weights):
            raise ValueError(f"The loss of {self.name} is not a mean over pairs. {UNKNOWN}")
        losses = sum(weight * loss for weight, loss in zip(weights, means, strict=False))
        means.clear()  # the class that references it lives until garbage collection

        def of_logits() -> Tensor:
            (slope,) = torch.autograd.grad(losses.sum(), log_probs, retain_graph=True)
            squares = per_example.squares_of_fused_head(*log_probs, outputs.log_sum_sq_probs)
            of_answers = (slope.float().square() * squares).sum(1)
            return of_answers.view(2, pairs).sum(0).sqrt()

        importance = self.importance(losses, of_logits)
        return Measured(losses, importance, observed_of(losses), auxiliary_loss(self.trainer, outputs), None)


def _capture_means(values: Tensor, size: int, means: list[Tensor]) -> Tensor:
    """Return the same values, and append to `means` each vector `[size]` computed from them that is averaged.

    This captures the per-pair losses, which TRL only keeps until their mean is computed. The comparison of the means on
    the first batch verifies them.
    """

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is Tensor.mean and args[0].shape == (size,) and args[0].requires_grad:
                means.append(args[0].as_subclass(Tensor))
            return super().__torch_function__(function, types, args, kwargs)

    return values.as_subclass(Watched)
