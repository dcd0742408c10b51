"""TRL's fused head, which computes log probabilities without materialising the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_importance.losses.first_batch import without_peft


def request_sum_of_squares(model: nn.Module, outputs: tuple[str, ...]) -> None:
    """Make the head of the model also return Σ p² of each token, which its importance requires.

    Args:
        model: model of a TRL trainer, possibly in a PEFT wrapper.
        outputs: other outputs that the trainer needs.

    Raises:
        ImportError: if this version of TRL has no such head.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(without_peft(model), outputs=(*outputs, "log_sum_sq_probs"))


def auxiliary_loss(trainer: Any, outputs: Any) -> Tensor | float:
    """Auxiliary loss of a mixture-of-experts model for a batch."""
    return trainer.router_aux_loss_coef * outputs.aux_loss if trainer.aux_loss_enabled else 0.0
