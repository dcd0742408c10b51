"""The trainers of sentence-transformers, with losses based on means of torch losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_importance.adapters.base import UNKNOWN, ComputeLoss, Inputs, Lengths, LossAdapter
from hf_importance.errors import UnweightedError
from hf_importance.losses.custom import copies_of
from hf_importance.losses.first_batch import FirstBatches, Gather, alone, losses_agree
from hf_importance.losses.isolation import without_side_effects
from hf_importance.losses.objective import Measured
from hf_importance.losses.outputs import observed_of

_TRAINER = "Use the trainer of sentence-transformers."
_OF_CLASSES = {F.cross_entropy, F.nll_loss}
_OF_LOGARITHMS = {F.kl_div, F.nll_loss}
_OTHERS = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.huber_loss,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
}
"""The functions of torch that compute losses of an `input` and a `target`, also in its modules."""


class SentenceLoss(LossAdapter):
    """Losses that are the mean of a torch loss (module or function), or a linear combination of such means.

    These include the losses of cross-encoders (binary cross-entropy, cross-entropy, squared error), cosine similarity,
    margin and distillation losses. The coefficients are determined by autograd. Importance is the norm of the gradient
    with respect to the inputs of the torch losses: logits, similarities or embeddings.
    """

    def __init__(self, trainer: Any, gather: Gather = alone) -> None:
        super().__init__(trainer, gather)
        _validate_arguments(trainer)
        self._coupling = FirstBatches(gather, _TRAINER)
        self._name = type(trainer.loss).__name__

    def _measure(self, compute_loss: ComputeLoss, model: Any, inputs: Inputs, batch: int, lengths: Lengths) -> Measured:
        if self._coupling.due():
            self._coupling.refuse_coupled(
                partial(self._first_losses_change, compute_loss, model, inputs, batch),
                UnweightedError(
                    f"{self._name} compares the examples of a batch with each other (in-batch negatives): the "
                    f"loss of the first one changes with the others, so it cannot be weighted on its own. {_TRAINER}"
                ),
                "its losses are not finite",
            )
        loss, calls = self._record_losses(compute_loss, model, inputs)
        calls = [call for call in calls if call.mean.requires_grad]
        factors = torch.autograd.grad(loss, [c.mean for c in calls], retain_graph=True, allow_unused=True)
        used = [(factor, call) for factor, call in zip(factors, calls, strict=True) if factor is not None]
        if not used:
            raise self._no_losses()
        losses = sum(factor * call.losses(batch) for factor, call in used)

        def of_inputs() -> Tensor:
            return torch.cat([gradient for _, call in used for gradient in call.gradients(losses)], 1).norm(dim=1)

        first = used[0][1]
        observed = observed_of(losses, first.input, first.target)
        return Measured(losses, self.importance(losses, of_inputs), observed, counted=first.counted)

    def _record_losses(self, compute_loss: ComputeLoss, model: Any, inputs: Inputs) -> tuple[Tensor, list[_LossCall]]:
        """The loss of the trainer, and the calls of torch losses that return a mean for it."""
        with _Recorder() as recorder:
            loss = compute_loss(model, dict(inputs))
        if not recorder.calls:
            raise self._no_losses()
        if any(call.function in _OF_CLASSES and call.settings["weight"] is not None for call in recorder.calls):
            raise UnweightedError(
                f"{self._name} has class weights, and divides the batch loss by their sum, so it is not a mean "
                f"over examples. Remove them: hard examples are drawn more often anyway. Otherwise: {_TRAINER}"
            )
        return loss[0] if isinstance(loss, tuple) else loss, recorder.calls

    def _no_losses(self) -> UnweightedError:
        return UnweightedError(
            f"{self._name} is not based on the mean of a torch loss such as nn.MSELoss, so its per-example losses "
            "are unknown. Losses that compare the examples of a batch with each other (in-batch negatives, mined "
            f"triplets) have none. {_TRAINER}"
        )

    def _another_loss(self, loss: float, mean: float) -> UnweightedError:
        return UnweightedError(
            f"{self._name} is {loss:.5g} on the first batch, but the mean of the torch losses in it is "
            f"{mean:.5g}: it has other terms, or is a sum instead of a mean. {_TRAINER}"
        )

    def _first_losses_change(
        self, compute_loss: ComputeLoss, model: Any, inputs: Inputs, batch: int, separately: bool
    ) -> list[bool]:
        """Whether the losses of the first example are finite, and others in a batch of its copies.

        Untrained models hardly distinguish examples, so losses without labels are refused as well.
        """
        trainer, results = self.trainer, []
        components, trainer.accum_loss_components = trainer.accum_loss_components, {"train": {}, "eval": {}}
        try:
            for columns in (inputs, copies_of(inputs, batch)):
                with without_side_effects(nn.ModuleList([trainer.model, trainer.loss]), separately):
                    _, calls = self._record_losses(compute_loss, model, columns)
                    results.append([call.losses(batch)[0] for call in calls])
            terms = {name for logged in trainer.accum_loss_components.values() for name in logged} - {"steps"}
        finally:
            trainer.accum_loss_components = components
        if len(terms) > 1:
            raise UnweightedError(
                f"{self._name} is a sum of {', '.join(sorted(terms))}. Such terms, for example "
                f"regularisers over the batch, are not means over examples and cannot be weighted. {_TRAINER}"
            )
        if inputs.get("label") is None:
            raise UnweightedError(
                f"The training data has no label, so {self._name} is assumed to compare the examples of a batch "
                f"with each other (in-batch negatives): such losses have no per-example loss to weight. {_TRAINER}"
            )
        losses, of_copies = results
        precisely = trainer.accelerator.mixed_precision == "no"
        agree = map(partial(losses_agree, precisely=precisely), losses, of_copies)
        finite = all(loss.isfinite() for loss in losses)
        return [finite, finite and not (len(losses) == len(of_copies) and all(agree))]


def _validate_arguments(trainer: Any) -> None:
    for name in ("loss", "train_dataset"):
        value = getattr(trainer, name)
        if isinstance(value, dict):
            raise UnweightedError(
                f"{name} must be a single one, but is a dict of {', '.join(value)}. If one loss fits all datasets, "
                f"join them with datasets.concatenate_datasets. Otherwise: {_TRAINER}"
            )
    args = trainer.args
    if getattr(args.batch_sampler, "value", None) != "batch_sampler":
        raise UnweightedError(
            f"batch_sampler must be BatchSamplers.BATCH_SAMPLER, the default, but is {args.batch_sampler}: importance "
            f"sampling draws the batches. Remove it; if the loss compares the examples of a batch: {_TRAINER}"
        )
    if args.train_sampling_strategy == "group_by_length":
        raise UnweightedError(
            "train_sampling_strategy must be 'random', but is 'group_by_length', which the trainers of "
            "sentence-transformers ignore, because the lengths of their texts are unknown. Remove it."
        )


# ---- torch losses ----------------------------------------------------------------------------------------------------


class _Recorder(TorchFunctionMode):
    """Records the calls of torch losses that return a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_LossCall] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _OF_CLASSES | _OF_LOGARITHMS | _OTHERS and not result.dim():
            self.calls.append(_LossCall(function, args, kwargs or {}, result))
        return result


class _LossCall:
    """A call of a torch loss, with its result."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Inputs, mean: Tensor) -> None:
        self.function, self.mean = function, mean
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        self.settings = dict(bound.arguments)
        self.input, self.target = self.settings.pop("input"), self.settings.pop("target")

    def losses(self, size: int) -> Tensor:
        """Losses of `size` examples, `[size]`: the mean over several texts of each, or over elements."""
        each = self.function(self.input, self.target, **{**self.settings, "reduction": "none"}).float()
        if not each.dim() or len(each) % size:
            raise UnweightedError(f"A torch loss has shape {list(each.shape)} for {size} examples. {UNKNOWN}")
        each = _rows(each, size)
        return each.sum(1) if self.settings["reduction"] == "batchmean" else each.mean(1)

    def gradients(self, losses: Tensor) -> list[Tensor]:
        """Gradients of `losses` with respect to the inputs of this loss, `[size, elements]` each.

        For log probabilities, with respect to the logits: the gradient by log p is −t, independent of p.
        """
        tensors = [x for x in (self.input, self.target) if x.requires_grad]
        gradients = torch.autograd.grad(losses.sum(), tensors, retain_graph=True, allow_unused=True)
        pairs = [(x, gradient.float()) for x, gradient in zip(tensors, gradients, strict=True) if gradient is not None]
        if self.function in _OF_LOGARITHMS:
            pairs = [(x, gradient - x.float().exp() * gradient.sum(-1, keepdim=True)) for x, gradient in pairs]
        return [_rows(gradient, len(losses)) for _, gradient in pairs]

    @property
    def counted(self) -> Tensor | None:
        """Whether each example has a class, `[size]`; None if targets are not classes."""
        if self.function not in _OF_CLASSES or self.target.is_floating_point() or self.target.dim() != 1:
            return None
        return (self.target != self.settings["ignore_index"]).float()


def _rows(values: Tensor, size: int) -> Tensor:
    """Reshape to `[size, elements]`, also from concatenated text columns, `[columns · size, …]`."""
    return values.reshape(-1, size, values[0].numel()).transpose(0, 1).flatten(1)
