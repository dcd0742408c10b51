"""The fused head of TRL: it multiplies by the weights and takes the softmax at once, and no logits are built."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_importance.losses.first_batch import without_peft


def request_sum_of_squares(model: nn.Module, outputs: tuple[str, ...]) -> None:
    """Have the head of the model also return Σ p² of each token, from which its importance follows.

    Args:
        model: of a trainer of TRL, maybe in the wrapper of PEFT.
        outputs: what else the trainer wants of it.

    Raises:
        ImportError: if this version of TRL has no such head.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(without_peft(model), outputs=(*outputs, "log_sum_sq_probs"))


def auxiliary_loss(trainer: Any, outputs: Any) -> Tensor | float:
    """What a mixture of experts adds to the loss of a batch."""
    return trainer.router_aux_loss_coef * outputs.aux_loss if trainer.aux_loss_enabled else 0.0
