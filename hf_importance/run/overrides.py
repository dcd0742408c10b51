"""Checks for overrides by users that importance sampling cannot honour, with messages that name the fix."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import TrainerCallback, TrainingArguments

from hf_importance.adapters.known import adapted_class

_LOSS_FUNCTION = "pass per_example_loss_func=f with f(outputs, labels) -> Tensor[batch], and remove the override"
_HOOKS = {
    "compute_loss": "To add a term to the loss, start from loss, outputs = super().compute_loss(model, inputs, True, "
    f"...). For your own loss (class weights, distillation), {_LOSS_FUNCTION}.",
    "training_step": f"Call it in the override. For your own loss, {_LOSS_FUNCTION}.",
    "_get_train_sampler": "It decides which examples are drawn, which is what importance sampling does: remove it, or "
    "use Trainer. Rare classes that are hard are drawn more often anyway; to weight them in the loss, use "
    "per_example_loss_func.",
    "get_train_dataloader": "Change the dataset or the collator instead, or use Trainer.",
    "get_batch_samples": "Call it in the override, and modify what it returns.",
    "_inner_training_loop": "Call it in the override.",
    "_save_rng_state": "Call it in the override, or checkpoints lose the importances.",
    "_load_optimizer_and_scheduler": "Call it in the override, or resuming loses the importances.",
}
"""Methods that importance sampling overrides, and the fix if a user's override does not call them."""


def refuse_overrides(cls: type, mixin: type, has_loss_function: bool) -> None:
    """Refuse overrides by users that would be ignored, or would disable importance sampling.

    Overrides that call `super()` are supported. This function refuses those that certainly do not; [`TrainingWatch`]
    detects the others at the first step.

    Args:
        cls: class of the trainer.
        mixin: `ImportanceTrainerMixin`, one of its bases.
        has_loss_function: whether there is a `per_example_loss_func`.

    Raises:
        ValueError: for such an override.
    """
    theirs = list(_user_classes(cls, mixin))
    for owner, is_before in theirs:
        for name, way_out in _HOOKS.items():
            counts = is_before or name == "_get_train_sampler"
            if counts and name in vars(owner) and _never_calls_super(owner, name, [other for other, _ in theirs]):
                raise ValueError(
                    f"{owner.__name__}.{name} does not call super().{name}(), which importance sampling relies on. "
                    f"{way_out}"
                )
        if not is_before and "compute_loss" in vars(owner) and not has_loss_function:
            raise ValueError(
                f"{owner.__name__}.compute_loss comes after {mixin.__name__} in the bases of {cls.__name__}, so "
                f"training would never call it. If it calls super().compute_loss(), put {owner.__name__} first: class "
                f"{cls.__name__}({owner.__name__}, ImportanceTrainer). If it computes its own loss, pass "
                "per_example_loss_func=f with f(outputs, labels) -> Tensor[batch], which replaces it."
            )


class TrainingWatch(TrainerCallback):
    """Stops training if no importance is measured, before the optimizer step.

    It is the first callback, so the callbacks of users get a preview dataloader instead of that of the training loop.

    Args:
        trainer: an `ImportanceTrainer`.
        mixin: `ImportanceTrainerMixin`, one of its bases.
    """

    def __init__(self, trainer: Any, mixin: type) -> None:
        self._trainer, self._mixin = trainer, mixin
        self._unmeasured = 0  # consecutive unmeasured steps

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Give other callbacks a preview dataloader."""
        self._unmeasured = 0
        self._trainer.callback_handler.train_dataloader = self._trainer._preview_loader()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise an error if the first step, or two consecutive steps, were not measured."""
        self._unmeasured = 0 if self._trainer._has_measured() else self._unmeasured + 1
        if self._unmeasured and (state.global_step == 0 or self._unmeasured > 1):
            raise unmeasured(type(self._trainer), self._mixin)


def unmeasured(cls: type, mixin: type) -> ValueError:
    """The error for a step without measured importances."""
    hooks = ("compute_loss", "training_step", "get_batch_samples", "get_train_dataloader")
    found = [
        f"{owner.__name__}.{name}" for owner, _ in _user_classes(cls, mixin) for name in hooks if name in vars(owner)
    ]
    return ValueError(
        f"No importance was measured in this step: "
        f"{' or '.join(found) or 'a replaced method of the trainer'} does not reach the method of ImportanceTrainer. "
        f"Call super() in it in every step. For your own loss, {_LOSS_FUNCTION}."
    )


def _user_classes(cls: type, mixin: type) -> Iterator[tuple[type, bool]]:
    """Classes written by users before any adapted class, and whether they precede `mixin`."""
    adapted = adapted_class(cls)
    order = cls.__mro__ if adapted is None else cls.__mro__[: cls.__mro__.index(adapted)]
    for place, owner in enumerate(order):
        if owner.__module__.split(".")[0] not in ("transformers", "hf_importance", "builtins"):
            yield owner, place < order.index(mixin)


def _never_calls_super(owner: type, name: str, classes: list[type]) -> bool:
    """Whether an override cannot call the overridden method, because neither it nor its helpers refer to it."""
    override = _function(vars(owner)[name])
    if override is None or "super" in _names(override):
        return False
    helpers = [_function(member) for other in classes for member in vars(other).values() if member is not override]
    return not any(name in _names(function) for function in [override, *helpers] if function is not None)


def _function(member: Any) -> FunctionType | None:
    function = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else member
    return function if isinstance(function, FunctionType) else None


def _names(function: FunctionType, depth: int = 3) -> set[str]:
    """All names used in a function, in the functions that it calls by name, and in its closure."""
    names = _names_in(function.__code__)
    around = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    called = [function.__globals__.get(name) for name in function.__code__.co_names]
    for other in (*around, *called):
        other = _function(other)
        if other is not None and depth:
            names |= {other.__name__} | _names(other, depth - 1)
    return names


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def refuse_loader(loader: Any, cls: type, batch_size: int, drop_last: bool, length: int) -> None:
    """Refuse a training dataloader that importance sampling cannot replace without changing its behaviour.

    Raises:
        ValueError: if it has its own sampler or iteration.
    """
    batches = getattr(loader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)  # unwrap the shards of accelerate
    sampler = getattr(batches, "sampler", None)
    usual = type(sampler) in (RandomSampler, SeedableRandomSampler) and not sampler.replacement
    if (
        not isinstance(loader, DataLoader)
        or getattr(type(batches), "__iter__", None) is not BatchSampler.__iter__
        or not usual
    ):
        found = f"uses the sampler {type(sampler or batches).__name__}"
    elif len(sampler) != length or len(loader.dataset) != length:
        found = f"draws {len(sampler)} of {len(loader.dataset)} examples, while train_dataset has {length}"
    elif (batches.batch_size, batches.drop_last) != (batch_size, drop_last):
        found = f"has batches of {batches.batch_size} (drop_last={batches.drop_last}), unlike TrainingArguments"
    elif type(loader).__iter__.__module__.split(".")[0] not in ("torch", "accelerate"):
        found = f"iterates with {type(loader).__name__}.__iter__"
    else:
        return
    hooks = ("_get_train_sampler", "get_train_dataloader")
    theirs = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in ("transformers", "hf_importance")]
    owners = [f"{owner.__name__}.{hook}" for owner in theirs for hook in hooks if hook in vars(owner)]
    raise ValueError(
        f"{' or '.join(owners) or 'The training dataloader'} {found}, which importance sampling would replace: "
        "change the dataset, the collator or TrainingArguments instead, or use Trainer."
    )
