"""Checks for unsupported arguments, overrides and data, with messages that name the fix."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

import transformers
from accelerate.data_loader import SeedableRandomSampler
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import SchedulerType

from hf_importance.adapters.known import adapted_class
from hf_importance.config import ImportanceConfig
from hf_importance.lengths import name_of_tokens, refuse_unknown_lengths
from hf_importance.losses.heads import with_inputs
from hf_importance.schedule import ALL_STEPS

_PRIVATE_HOOKS = ("_inner_training_loop", "_save_rng_state", "_load_optimizer_and_scheduler", "_finish_current_push")
_LARGEST_SEED = 2**63 - 1
_BY_RESULTS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
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
_STRATEGIES = {
    "sequential": "importance sampling draws examples in an order of its own. Remove the argument",
    "batch_rebalance": "it distributes batches of different sizes among the processes, while here each process draws "
    "batches of one size from its own part of the data. Use 'group_by_length'",
}


def refuse_version(trainer: type = Trainer) -> None:
    """Refuse versions of transformers without the private methods that hf_importance overrides.

    Raises:
        ImportError: if one of them is missing.
    """
    missing = [name for name in _PRIVATE_HOOKS if not hasattr(trainer, name)]
    if missing:
        raise ImportError(
            f"hf_importance overrides Trainer.{missing[0]}, which transformers {transformers.__version__} does not "
            "have: install a version of transformers that has it (5.23 does), or a newer hf_importance."
        )


# ---- arguments -------------------------------------------------------------------------------------------------------


def refuse_arguments(trainer: Any) -> None:
    """Refuse invalid arguments of an `ImportanceTrainer`.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for a seed out of range.
    """
    args = trainer.args
    if not isinstance(trainer.importance_config, ImportanceConfig):
        raise TypeError(f"importance must be an ImportanceConfig, but is {type(trainer.importance_config).__name__}.")
    if not isinstance(trainer.report_examples_to_hub, bool):
        raise TypeError(f"report_examples_to_hub must be True or False, but is {trainer.report_examples_to_hub!r}.")
    function = trainer.per_example_loss_func
    if not (function is None or callable(function)):
        raise TypeError(
            "per_example_loss_func must be a function f(outputs, labels) -> Tensor[batch], but is "
            f"{type(function).__name__}."
        )
    if function is not None:
        with_inputs(function)
    seed = seed_of(trainer.importance_config, args)
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"data_seed must be in 0 … 2^63 − 1, but is {seed}.")


def refuse_training(trainer: Any, schedule: LRScheduler | None) -> None:
    """Refuse settings that training with importance sampling does not support; evaluation may use them.

    Args:
        trainer: an `ImportanceTrainer` with training data.
        schedule: the schedule passed in `optimizers`.

    Raises:
        ValueError: for unsupported settings.
    """
    args = trainer.args
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func must be None, because it returns one loss per batch, which cannot be weighted per "
            "example: pass per_example_loss_func=f with f(outputs, labels) -> Tensor[batch] instead."
        )
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        raise ValueError(
            "train_sampling_strategy must be 'random' or 'group_by_length', but is "
            f"{args.train_sampling_strategy!r}: {_STRATEGIES[args.train_sampling_strategy]}, or use Trainer."
        )
    if max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        raise ValueError(
            "parallelism_config must not have tensor, context or sequence parallelism, where several processes share "
            "a batch: ImportanceTrainer only supports data parallelism (DDP, FSDP, ZeRO)."
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config.dispatch_batches must not be True: a batch that is split loses its draw.")
    if trainer.label_smoother is not None and type(trainer.label_smoother) is not LabelSmoother:
        raise ValueError(
            "label_smoother must be the one of label_smoothing_factor, but is "
            f"{type(trainer.label_smoother).__name__}, whose per-example losses are unknown: pass "
            "per_example_loss_func instead."
        )
    _refuse_data(trainer.train_dataset, args.world_size)
    if args.train_sampling_strategy == "group_by_length":
        refuse_unknown_lengths(trainer.train_dataset, args.length_column_name, name_of_tokens(trainer.processing_class))
    if trainer.importance_config.budget == "auto":
        refuse_schedule(args, schedule, _schedule_of_deepspeed(trainer))


def seed_of(importance: ImportanceConfig, args: TrainingArguments) -> int:
    """The seed of the sampler."""
    return next(seed for seed in (importance.seed, args.data_seed, args.seed) if seed is not None)


def _refuse_data(data: Any, ranks: int) -> None:
    stream = isinstance(data, IterableDataset)
    if stream or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            f"train_dataset must have a length and be indexed by position, but {type(data).__name__} is a stream, "
            "and importance sampling revisits examples: load it without streaming, or use Trainer."
        )
    if len(data) < ranks:
        raise ValueError(f"train_dataset must have at least one example per process ({ranks}), but has {len(data)}.")


def _schedule_of_deepspeed(trainer: Any) -> str | None:
    """Type of the schedule in the DeepSpeed config, which DeepSpeed creates and steps itself."""
    if not trainer.is_deepspeed_enabled:
        return None
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    return config["scheduler"].get("type", "?") if "scheduler" in config else None


def refuse_schedule(args: TrainingArguments, scheduler: LRScheduler | None, deepspeed: str | None) -> None:
    """Refuse a schedule that cannot follow the effective steps.

    Args:
        args: the training arguments.
        scheduler: the schedule passed in `optimizers`.
        deepspeed: type of the schedule in the DeepSpeed config.

    Raises:
        ValueError: if there is such a schedule.
    """
    found = None
    if args.lr_scheduler_type in _BY_RESULTS:
        found = f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r}"
    elif scheduler is not None:
        found = f"the schedule {type(scheduler).__name__} passed in optimizers"
    elif deepspeed is not None:
        found = f"the 'scheduler' in the DeepSpeed config ({deepspeed})"
    if found is not None:
        raise ValueError(
            f"With budget='auto' the learning rate follows the effective epochs, which {found} does not support. "
            f"{ALL_STEPS} Or use a schedule over steps, such as lr_scheduler_type='linear'"
            f"{'' if deepspeed is None else ', and remove the one in the DeepSpeed config'}."
        )


# ---- overrides by users ----------------------------------------------------------------------------------------------


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
