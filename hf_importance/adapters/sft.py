"""TRL's `SFTTrainer`, measured without materialising logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_importance.adapters.base import ComputeLoss, LossAdapter, outputs_of
from hf_importance.adapters.fused_head import auxiliary_loss, request_sum_of_squares
from hf_importance.losses import per_example
from hf_importance.losses.heads import predicted
from hf_importance.losses.objective import Measured, observed_of
from hf_importance.losses.rows import rows_of, sum_of_rows
from hf_importance.sampling.draw import Draw


class SFTLoss(LossAdapter):
    """The losses of `SFTTrainer`: `nll` and `dft`, label smoothing, and the auxiliary loss of mixtures of experts.

    With packing, an example is a packed row of the dataset.
    """

    takes_own_loss = True

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        request_sum_of_squares(trainer.model, ("log_probs", "entropy", "is_top1"))

    def measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """See [`LossAdapter`]."""
        labels, batch = inputs["labels"], len(draw.index)
        counted = self.count(labels, draw.lengths)
        outputs = outputs_of(compute_loss, model, inputs)[0]  # later calls are for metrics, without gradient
        if getattr(outputs, "log_probs", None) is None:  # TRL then also omits the auxiliary loss
            losses, squares = self._smoothed(outputs["logits"], labels)
            added, self._scored = 0.0, counted
        else:
            losses, squares = self._fused(outputs)
            added, self._scored = auxiliary_loss(self.trainer, outputs), outputs.label_mask
        rows = rows_of(labels, batch, draw.lengths)
        losses = sum_of_rows(losses, rows, batch)
        importance = self.importance(losses, lambda: sum_of_rows(squares, rows, batch).sqrt())
        observed = observed_of(losses / counted.clamp(min=1))
        return Measured(losses, importance, observed, added, None, counted, are_sums=True)

    def mean_of(self, measured: Measured) -> Tensor:
        """See [`LossAdapter`]. For a single batch, TRL also counts tokens predicted by virtual tokens."""
        return measured.weighted_mean(torch.ones_like(measured.losses), self._scored.sum())

    def _fused(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ‖∂loss/∂logits‖² of each position, `[rows, positions]`; 0 where there is no loss."""
        log_p = outputs.log_probs
        losses, squares = -log_p, per_example.squares_of_fused_head(log_p, outputs.log_sum_sq_probs)
        if self.trainer.args.loss_type == "dft":  # p · −log p with p a constant (Wu et al. 2025, arXiv 2508.05629)
            p = log_p.detach().exp()
            losses, squares = losses * p, squares * p.square()
        return F.pad(losses, (0, 1)), F.pad(squares, (0, 1))  # the last token has no target

    def _smoothed(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As [`_fused`], from the logits that TRL computes for label smoothing."""
        labels = predicted(F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=per_example.IGNORE_INDEX), True)
        flat, smoothing = (logits.flatten(0, 1), labels.flatten()), self.trainer.label_smoother.epsilon
        losses = per_example.cross_entropy(*flat, smoothing).view_as(labels)
        squares = per_example.cross_entropy_importance(*flat, smoothing).square().view_as(labels)
        return losses, squares

    def count(self, labels: Tensor, lengths: list[int] | None = None) -> Tensor:
        """See [`LossAdapter`]. As in `Trainer`, virtual tokens are ignored."""
        has_loss = (predicted(labels, True) != per_example.IGNORE_INDEX).float()
        batch = len(labels) if lengths is None else len(lengths)
        return sum_of_rows(has_loss, rows_of(labels, batch, lengths), batch)
