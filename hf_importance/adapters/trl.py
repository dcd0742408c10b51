"""TRL's trainers: supervised fine-tuning, and preference pairs, where an example is a pair. No logits are built."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_importance.adapters.base import ComputeLoss, Inputs, Lengths, LossAdapter
from hf_importance.errors import UnweightedError
from hf_importance.losses.first_batch import Gather, alone
from hf_importance.losses.objective import Measured, predicted
from hf_importance.losses.outputs import observed_of, without_peft
from hf_importance.losses.per_example import (
    IGNORE_INDEX,
    cross_entropy,
    cross_entropy_importance,
    squares_of_fused_head,
)

_DPO = {"loss_types": ["sigmoid"], "f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
"""Settings of DPO with a closed form per pair, by attribute of the trainer."""
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_PREPARED: WeakSet[nn.Module] = WeakSet()


class SFTLoss(LossAdapter):
    """The losses of `SFTTrainer`: `nll` and `dft`, label smoothing, and the auxiliary loss of mixtures of experts.

    With packing, an example is a packed row of the dataset.
    """

    takes_own_loss = True

    def __init__(self, trainer: Any, gather: Gather = alone) -> None:
        super().__init__(trainer, gather)
        _request_sum_of_squares(trainer.model, "log_probs", "entropy", "is_top1")

    def _measure(self, compute_loss: ComputeLoss, model: Any, inputs: Inputs, batch: int, lengths: Lengths) -> Measured:
        labels = inputs["labels"]
        counted = self.count(labels, lengths)
        outputs = _outputs_of(compute_loss, model, inputs)
        if getattr(outputs, "log_probs", None) is None:  # TRL then also omits the auxiliary loss
            losses, squares = self._smoothed(outputs["logits"], labels)
            added, self._scored = 0.0, counted
        else:
            losses, squares = self._fused(outputs)
            added, self._scored = _auxiliary_loss(self.trainer, outputs), outputs.label_mask
        rows = _rows_of(labels, batch, lengths)
        losses = _sum_of_rows(losses, rows, batch)
        importance = self.importance(losses, lambda: _sum_of_rows(squares, rows, batch).sqrt())
        observed = observed_of(losses / counted.clamp(min=1))
        return Measured(losses, importance, observed, added, None, counted, are_sums=True)

    def mean_of(self, measured: Measured) -> Tensor:
        """See [`LossAdapter`]. For a single batch, TRL also counts tokens predicted by virtual tokens."""
        return measured.weighted_mean(torch.ones_like(measured.losses), self._scored.sum())

    def _fused(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Loss and ‖∂loss/∂logits‖² of each position, `[rows, positions]`; 0 where there is no loss."""
        log_p = outputs.log_probs
        losses, squares = -log_p, squares_of_fused_head(log_p, outputs.log_sum_sq_probs)
        if self.trainer.args.loss_type == "dft":  # p · −log p with p a constant (Wu et al. 2025, arXiv 2508.05629)
            p = log_p.detach().exp()
            losses, squares = losses * p, squares * p.square()
        return F.pad(losses, (0, 1)), F.pad(squares, (0, 1))  # the last token has no target

    def _smoothed(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As [`_fused`], from the logits that TRL computes for label smoothing."""
        virtual = logits.shape[1] - labels.shape[1]
        labels = predicted(F.pad(labels, (virtual, 0), value=IGNORE_INDEX), True)
        arguments = logits.flatten(0, 1), labels.flatten(), self.trainer.label_smoother.epsilon
        losses = cross_entropy(*arguments).view_as(labels)
        return losses, cross_entropy_importance(*arguments).square().view_as(labels)

    def count(self, labels: Tensor, lengths: Lengths = None) -> Tensor:
        """Number of tokens with a loss per example, `[batch]`. As in `Trainer`, virtual tokens are ignored."""
        has_loss = (predicted(labels, True) != IGNORE_INDEX).float()
        batch = len(labels) if lengths is None else len(lengths)
        return _sum_of_rows(has_loss, _rows_of(labels, batch, lengths), batch)


class RewardLoss(LossAdapter):
    """The loss of `RewardTrainer`: −log σ(Δ − margin) + c · (r₁ + r₂)² for rewards r₁, r₂ with difference Δ.

    If c is 0, the importance is √2 · σ(margin − Δ).
    """

    def _measure(self, compute_loss: ComputeLoss, model: Any, inputs: Inputs, batch: int, lengths: Lengths) -> Measured:
        outputs = _outputs_of(compute_loss, model, inputs)
        chosen, rejected = outputs["logits"].squeeze(-1).float().chunk(2)
        difference, total = chosen - rejected - inputs.get("margin", 0.0), chosen + rejected
        centering = self.trainer.args.center_rewards_coefficient or 0.0
        losses = -F.logsigmoid(difference) + centering * total.square()

        def of_logits() -> Tensor:
            slope, pull = torch.sigmoid(-difference), 2 * centering * total
            return (2 * (slope.square() + pull.square())).sqrt()

        return Measured(losses, self.importance(losses, of_logits), observed_of(losses))


class DPOLoss(LossAdapter):
    """The loss of `DPOTrainer`: −log σ(βΔ), with Δ the difference of the log ratios of chosen and rejected answer.

    A log ratio is the log probability of the answer minus that of the reference model. The importance is the norm of
    the gradient with respect to the logits of the tokens of both answers, β σ(−βΔ) · √(Σ ‖p − e_y‖²).
    """

    def __init__(self, trainer: Any, gather: Gather = alone) -> None:
        super().__init__(trainer, gather)
        for name, value in _DPO.items():
            if getattr(trainer, name) != value:
                argument = "loss_type" if name == "loss_types" else name
                raise UnweightedError(
                    f"{argument} must be {value!r}, but is {getattr(trainer, name)!r}, for which there is no per-pair "
                    f"loss to weight: set {argument}={value!r} in DPOConfig, or use DPOTrainer alone."
                )
        _request_sum_of_squares(trainer.model, "log_probs", "entropy", "mean_logits", "is_top1")

    def _measure(self, compute_loss: ComputeLoss, model: Any, inputs: Inputs, batch: int, lengths: Lengths) -> Measured:
        trainer = self.trainer
        reference, outputs = self._with_reference(compute_loss, model, inputs)
        tokens = inputs["completion_mask"].shape[1] - 1
        log_p = outputs.log_probs[:, -tokens:]  # prompt tuning adds virtual tokens in front
        chosen, rejected = log_p.sum(1).chunk(2)
        margin = trainer.beta * ((chosen - reference[0]) - (rejected - reference[1]))
        losses = -trainer.loss_weights[0] * F.logsigmoid(margin)

        def of_logits() -> Tensor:
            squares = squares_of_fused_head(log_p, outputs.log_sum_sq_probs[:, -tokens:])
            slope = trainer.loss_weights[0] * trainer.beta * torch.sigmoid(-margin)
            return slope.abs() * squares.sum(1).view(2, batch).sum(0).sqrt()

        importance = self.importance(losses, of_logits)
        return Measured(losses, importance, observed_of(losses), _auxiliary_loss(trainer, outputs))

    def _with_reference(self, compute_loss: ComputeLoss, model: nn.Module, inputs: Inputs) -> tuple[list[Tensor], Any]:
        """The log probabilities by the reference model, and the outputs of the model.

        They are computed before the loss, and passed to it as precomputed ones, so that there is no further pass.
        """
        trainer, precomputed = self.trainer, self.trainer.precompute_ref_logps
        if not precomputed:
            reference = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
            inputs = {**inputs, **dict(zip(_REFERENCE, reference, strict=True))}
        trainer.precompute_ref_logps = True
        try:
            outputs = _outputs_of(compute_loss, model, inputs)
        finally:
            trainer.precompute_ref_logps = precomputed
        return [inputs[name] for name in _REFERENCE], outputs


# ---- the model -------------------------------------------------------------------------------------------------------


def _request_sum_of_squares(model: nn.Module, *outputs: str) -> None:
    """Make the fused head of the model return these outputs and Σ p² of each token, which its importance requires.

    Once per model: after the engine has wrapped its forward pass, another head would bypass that.
    """
    from trl.trainer.utils import add_fused_lm_head  # from TRL 1.16 on

    base = without_peft(model)
    if base not in _PREPARED:
        add_fused_lm_head(base, outputs=(*outputs, "log_sum_sq_probs"))
        _PREPARED.add(base)


def _outputs_of(compute_loss: ComputeLoss, model: nn.Module, inputs: Inputs) -> Any:
    """Outputs of the first call of the model by `compute_loss`; later ones are for metrics, without gradient."""
    outputs = []

    def call(**kwargs: Any) -> Any:
        outputs.append(model(**kwargs))
        return outputs[-1]

    compute_loss(call, inputs)
    return outputs[0]


def _auxiliary_loss(trainer: Any, outputs: Any) -> Tensor | float:
    """Auxiliary loss of a mixture-of-experts model for a batch."""
    return trainer.router_aux_loss_coef * outputs.aux_loss if trainer.aux_loss_enabled else 0.0


# ---- examples that a collator has concatenated into one row, as for padding-free attention ---------------------------


def _rows_of(labels: Tensor, batch: int, lengths: Lengths) -> Tensor | None:
    """The example of the (next) token that each position predicts, int64 `[positions]`; None with one row per example.

    >>> _rows_of(torch.zeros(1, 6), batch=2, lengths=[3, 2])  # and one token of padding
    tensor([0, 0, 1, 1, 1, 1])
    """
    if len(labels) == batch:
        return None
    if len(labels) != 1 or lengths is None or sum(lengths) > labels.shape[1]:
        raise UnweightedError(
            f"A batch of {batch} examples has labels of shape {list(labels.shape)}, so the example of each token is "
            "unknown: the data collator must return one row per example, or one row with the 'input_ids' of all "
            "examples in order."
        )
    rows = torch.arange(batch).repeat_interleave(torch.tensor(lengths))[1:]
    behind = rows.new_full((labels.shape[1] - len(rows),), batch - 1)
    return torch.cat([rows, behind]).to(labels.device, non_blocking=True)


def _sum_of_rows(values: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """Sum `values` `[rows, positions]` per example, float32 `[batch]`; leading virtual tokens are ignored."""
    if rows is None:
        return values.float().sum(1)
    flat = values[0, -len(rows) :].float()
    return torch.zeros(batch, dtype=flat.dtype, device=values.device).index_add(0, rows, flat)
