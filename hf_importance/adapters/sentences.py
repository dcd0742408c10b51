"""The trainers of sentence-transformers, with losses based on means of torch losses."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode

from hf_importance.adapters.base import UNKNOWN, ComputeLoss, LossAdapter
from hf_importance.losses.first_batch import FirstBatches, copies_of, losses_agree
from hf_importance.losses.isolation import without_side_effects
from hf_importance.losses.objective import Measured, observed_of
from hf_importance.sampling.draw import Draw

_FUNCTIONS = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
}
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_LOGARITHMS = (nn.KLDivLoss, nn.NLLLoss)
_TRAINER = "Use the trainer of sentence-transformers."


class SentenceLoss(LossAdapter):
    """Losses that are a mean of a torch loss (module or function), or a linear combination of such means.

    These include the losses of cross-encoders (binary cross-entropy, cross-entropy, squared error), cosine similarity,
    margin and distillation losses. The coefficients are determined by autograd. Importance is the norm of the gradient
    with respect to the inputs of the torch losses: logits, similarities or embeddings.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        _refuse_arguments(trainer)
        self.start()

    def start(self) -> None:
        """See [`LossAdapter`]."""
        super().start()
        self._coupling = FirstBatches(self.trainer._gather_values, _TRAINER)
        of_model = set(self.trainer.model.modules())
        self._modules = [m for m in self.trainer.loss.modules() if isinstance(m, _Loss) and m not in of_model]

    def measure(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> Measured:
        """See [`LossAdapter`]."""
        size = len(draw.index)
        if self._coupling.due():
            self._check_coupling(compute_loss, model, inputs, size)
        loss, calls = self._record_losses(compute_loss, model, inputs)
        calls = [call for call in calls if call.mean.requires_grad]
        factors = torch.autograd.grad(loss, [c.mean for c in calls], retain_graph=True, allow_unused=True)
        used = [(factor, call) for factor, call in zip(factors, calls, strict=True) if factor is not None]
        if not used:
            raise self._no_losses()
        losses = sum(factor * call.losses(size) for factor, call in used)

        def of_given() -> Tensor:
            return torch.cat([gradient for _, call in used for gradient in call.gradients(losses)], 1).norm(dim=1)

        first = used[0][1]
        return Measured(
            losses, self.importance(losses, of_given), observed_of(losses, *first.decision), 0.0, None, first.counted
        )

    def _record_losses(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, list[_LossCall]]:
        """The loss of the trainer, and the torch losses computed for it."""
        calls: list[_LossCall] = []
        hooks = [
            module.register_forward_hook(partial(_record_call, calls), with_kwargs=True) for module in self._modules
        ]
        try:
            if self._modules:
                loss = compute_loss(model, dict(inputs))
            else:
                with _LossRecorder(calls):
                    loss = compute_loss(model, dict(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        calls = [call for call in calls if not call.mean.dim()]
        if not calls:
            raise self._no_losses()
        if any(call.classes and call.settings["weight"] is not None for call in calls):
            raise ValueError(
                f"{self._loss_name} has class weights, and divides the batch loss by their sum, so it is not a mean "
                f"over examples. Remove them: hard examples are drawn more often anyway. Otherwise: {_TRAINER}"
            )
        return loss[0] if isinstance(loss, tuple) else loss, calls

    @property
    def _loss_name(self) -> str:
        return type(self.trainer.loss).__name__

    def _no_losses(self) -> ValueError:
        return ValueError(
            f"{self._loss_name} is not based on the mean of a torch loss such as nn.MSELoss, so its per-example losses "
            "are unknown. Losses that compare the examples of a batch with each other (in-batch negatives, mined "
            f"triplets) have none. {_TRAINER}"
        )

    def _compare(self, theirs: Tensor, ours: Tensor) -> None:
        if not losses_agree(theirs, ours):
            raise ValueError(
                f"{self._loss_name} is {theirs.item():.5g} on the first batch, but the mean of the torch losses in it "
                f"is {ours.item():.5g}: it has other terms, or is a sum instead of a mean. {_TRAINER}"
            )

    def _check_coupling(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], size: int) -> None:
        """Refuse losses that compare examples, which change in a batch of copies of the first example.

        Untrained models hardly distinguish examples, so losses without labels are refused as well. A change may be due
        to dropout or batch statistics: then both batches are evaluated without these.
        """
        given = (compute_loss, model, inputs, size)
        _, found = self._coupling.together(partial(self._refuse_terms, *given), 2)
        if found[:, 1].any():
            self._coupling.together(partial(self._refuse_coupled, *given), 0)
        self._coupling.decide(bool(found[:, 0].any()), "its losses are not finite")

    def _refuse_terms(self, *given: Any) -> tuple[None, list[bool]]:
        """Refuse sums and data without labels; return whether the first losses are finite, and whether they change."""
        trainer, inputs = self.trainer, given[2]
        components, trainer.accum_loss_components = trainer.accum_loss_components, {"train": {}, "eval": {}}
        try:
            finite, alike = self._first_losses_alone(*given)
            terms = {name for found in trainer.accum_loss_components.values() for name in found} - {"steps"}
        finally:
            trainer.accum_loss_components = components
        if len(terms) > 1:
            raise ValueError(
                f"{self._loss_name} is a sum of {', '.join(sorted(terms))}. Such terms, for example "
                f"regularisers over the batch, are not means over examples and cannot be weighted. {_TRAINER}"
            )
        if inputs.get("label") is None:
            raise ValueError(
                f"The training data has no label, so {self._loss_name} is assumed to compare the examples of a batch "
                f"with each other (in-batch negatives): such losses have no per-example loss to weight. {_TRAINER}"
            )
        return None, [finite, finite and not alike]

    def _refuse_coupled(self, *given: Any) -> tuple[None, list[bool]]:
        trainer = self.trainer
        components, trainer.accum_loss_components = trainer.accum_loss_components, {"train": {}, "eval": {}}
        try:
            finite, alike = self._first_losses_alone(*given, separately=True)
        finally:
            trainer.accum_loss_components = components
        if finite and not alike:
            raise ValueError(
                f"{self._loss_name} compares the examples of a batch with each other (in-batch negatives): the loss "
                f"of the first one changes with the others, so it cannot be weighted on its own. {_TRAINER}"
            )
        return None, []

    def _first_losses_alone(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], size: int, separately: bool = False
    ) -> tuple[bool, bool]:
        """Whether the losses of the first example are finite, and the same in a batch of its copies."""
        trainer, found = self.trainer, []
        for batch in (inputs, copies_of(inputs, size)):
            with without_side_effects(nn.ModuleList([trainer.model, trainer.loss]), separately):
                _, calls = self._record_losses(compute_loss, model, batch)
                found.append([call.losses(size)[0] for call in calls])
        losses, alone = found
        precisely = trainer.accelerator.mixed_precision == "no"
        agree = map(partial(losses_agree, precisely=precisely), losses, alone)
        return all(loss.isfinite() for loss in losses), len(losses) == len(alone) and all(agree)


def _refuse_arguments(trainer: Any) -> None:
    for name in ("loss", "train_dataset"):
        value = getattr(trainer, name)
        if isinstance(value, dict):
            raise ValueError(
                f"{name} must be a single one, but is a dict of {', '.join(value)}. If one loss fits all datasets, "
                f"join them with datasets.concatenate_datasets. Otherwise: {_TRAINER}"
            )
    args = trainer.args
    if getattr(args.batch_sampler, "value", None) != "batch_sampler":
        raise ValueError(
            f"batch_sampler must be BatchSamplers.BATCH_SAMPLER, the default, but is {args.batch_sampler}: importance "
            f"sampling draws the batches. Remove it; if the loss compares the examples of a batch: {_TRAINER}"
        )
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "train_sampling_strategy must be 'random', but is 'group_by_length', which the trainers of "
            "sentence-transformers ignore, because the lengths of their texts are unknown. Remove it."
        )


# ---- torch losses ----------------------------------------------------------------------------------------------------


@dataclass
class _LossCall:
    """A recorded call of a torch loss.

    Args:
        mean: its result.
        each: the loss without reduction.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        classes: whether the targets are classes.
        logarithms: whether the inputs are log probabilities.
        settings: other settings of the loss.
    """

    mean: Tensor
    each: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    classes: bool
    logarithms: bool
    settings: dict[str, Any]

    def losses(self, size: int) -> Tensor:
        """Losses of `size` examples, `[size]`: the mean over several texts of each, or over elements."""
        each = self.each(*self.args, **self.kwargs).float()
        if not each.dim() or len(each) % size:
            raise ValueError(f"A torch loss has shape {list(each.shape)} for {size} examples. {UNKNOWN}")
        each = _rows(each, size)
        return each.sum(1) if self.settings.get("reduction") == "batchmean" else each.mean(1)

    def gradients(self, losses: Tensor) -> list[Tensor]:
        """Gradients of `losses` with respect to the inputs of this loss, `[size, elements]` each.

        For log probabilities, with respect to the logits: the gradient by log p is −t, independent of p.
        """
        given = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        found = torch.autograd.grad(losses.sum(), given, retain_graph=True, allow_unused=True)
        pairs = [(x, gradient.float()) for x, gradient in zip(given, found, strict=True) if gradient is not None]
        if self.logarithms:
            pairs = [(x, gradient - x.float().exp() * gradient.sum(-1, keepdim=True)) for x, gradient in pairs]
        return [_rows(gradient, len(losses)) for _, gradient in pairs]

    @property
    def decision(self) -> tuple[Tensor | None, Tensor | None]:
        """Prediction and target, if they were positional arguments."""
        return self.args[:2] if len(self.args) > 1 else (None, None)

    @property
    def counted(self) -> Tensor | None:
        """Whether each example has a class, `[size]`; None if targets are not classes."""
        target = self.decision[1]
        if not self.classes or target is None or target.is_floating_point() or target.dim() != 1:
            return None
        return (target != self.settings["ignore_index"]).float()


def _record_call(
    calls: list[_LossCall], module: _Loss, args: tuple[Any, ...], kwargs: dict[str, Any], mean: Tensor
) -> None:
    each = copy.copy(module)
    each.reduction = "none"
    settings = {name: getattr(module, name, None) for name in ("weight", "ignore_index", "reduction")}
    kind = isinstance(module, _OF_CLASSES), isinstance(module, _OF_LOGARITHMS)
    calls.append(_LossCall(mean, each, args, kwargs, *kind, settings))


class _LossRecorder(TorchFunctionMode):
    """Records the calls of loss functions."""

    def __init__(self, calls: list[_LossCall]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in _FUNCTIONS:
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            settings = dict(bound.arguments)
            given = settings.pop("input"), settings.pop("target")
            each = partial(function, **{**settings, "reduction": "none"})
            kind = function is F.cross_entropy, function is F.kl_div
            self._calls.append(_LossCall(result, each, given, {}, *kind, settings))
        return result


def _rows(values: Tensor, size: int) -> Tensor:
    """Reshape to `[size, elements]`, also from concatenated text columns, `[columns · size, …]`."""
    return values.reshape(-1, size, values[0].numel()).transpose(0, 1).flatten(1)
