"""What is not supported, refused with messages that name the fix: arguments, data, schedules, overrides of users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import SchedulerType

from hf_importance.adapters.known import adapted_class
from hf_importance.config import ImportanceConfig
from hf_importance.errors import UnweightedError
from hf_importance.losses.custom import validate_function
from hf_importance.run.effective_epochs import ALL_STEPS, is_function_of_steps

_LARGEST_SEED = 2**63 - 1
_BY_RESULTS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_STRATEGIES = {
    "sequential": "importance sampling draws examples in an order of its own. Remove the argument",
    "batch_rebalance": "it distributes batches of different sizes among the processes, while here each process draws "
    "batches of one size from its own part of the data. Use 'group_by_length'",
}
_LOSS_FUNCTION = "pass per_example_loss_func=f with f(outputs, labels) -> Tensor[batch], and remove the override"


def seed_of(importance: ImportanceConfig, args: TrainingArguments) -> int:
    """The seed of the sampler."""
    return next(seed for seed in (importance.seed, args.data_seed, args.seed) if seed is not None)


# ---- arguments -------------------------------------------------------------------------------------------------------


def validate_arguments(trainer: Any) -> None:
    """Check the arguments of an `ImportanceTrainer`.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for a seed out of range.
    """
    if not isinstance(trainer.importance_config, ImportanceConfig):
        raise TypeError(f"importance must be an ImportanceConfig, but is {type(trainer.importance_config).__name__}.")
    if not isinstance(trainer.report_examples_to_hub, bool):
        raise TypeError(f"report_examples_to_hub must be True or False, but is {trainer.report_examples_to_hub!r}.")
    trainer.importance_config.validate()  # again: settings may have been changed
    if trainer.per_example_loss_func is not None:
        validate_function(trainer.per_example_loss_func)
    seed = seed_of(trainer.importance_config, trainer.args)
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"data_seed must be in 0 … 2^63 − 1, but is {seed}.")


def validate_training(trainer: Any, mixin: type, schedule: LRScheduler | None = None) -> None:
    """Check what training with importance sampling does not support; evaluation may use it.

    Args:
        trainer: an `ImportanceTrainer` with training data.
        mixin: `ImportanceTrainerMixin`, one of its bases.
        schedule: the schedule passed in `optimizers`.

    Raises:
        ValueError: for unsupported settings, data and overrides.
    """
    args = trainer.args
    if trainer.compute_loss_func is not None:
        raise UnweightedError(
            "compute_loss_func must be None, because it returns one loss per batch, which cannot be weighted per "
            "example: pass per_example_loss_func=f with f(outputs, labels) -> Tensor[batch] instead."
        )
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        raise UnweightedError(
            "train_sampling_strategy must be 'random' or 'group_by_length', but is "
            f"{args.train_sampling_strategy!r}: {_STRATEGIES[args.train_sampling_strategy]}, or use Trainer."
        )
    if max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        raise ValueError(
            "parallelism_config must not have tensor, context or sequence parallelism, where several processes share "
            "a batch: ImportanceTrainer only supports data parallelism (DDP, FSDP, ZeRO)."
        )
    if args.accelerator_config.dispatch_batches:
        raise UnweightedError(
            "accelerator_config.dispatch_batches must not be True: a batch that is split loses its draw."
        )
    if trainer.label_smoother is not None and type(trainer.label_smoother) is not LabelSmoother:
        raise UnweightedError(
            "label_smoother must be the one of label_smoothing_factor, but is "
            f"{type(trainer.label_smoother).__name__}, whose per-example losses are unknown: pass "
            "per_example_loss_func instead."
        )
    _validate_data(trainer.train_dataset, args.world_size)
    if trainer.importance_config.effective_epochs:
        validate_schedule(args, schedule, _schedule_of_deepspeed(trainer))
    _validate_overrides(type(trainer), mixin, trainer.per_example_loss_func is not None)


def _validate_data(data: Any, ranks: int) -> None:
    stream = isinstance(data, IterableDataset)
    if stream or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UnweightedError(
            f"train_dataset must have a length and be indexed by position, but {type(data).__name__} is a stream, "
            "and importance sampling revisits examples: load it without streaming, or use Trainer."
        )
    if len(data) < ranks:
        raise ValueError(f"train_dataset must have at least one example per process ({ranks}), but has {len(data)}.")


# ---- schedules of the learning rate ----------------------------------------------------------------------------------


def validate_schedule(args: TrainingArguments, passed: LRScheduler | None, deepspeed: str | None) -> None:
    """Check that the schedule can follow the effective steps.

    Args:
        args: the training arguments.
        passed: the schedule passed in `optimizers`.
        deepspeed: type of the schedule in the DeepSpeed config.

    Raises:
        ValueError: if it cannot.
    """
    schedule = None
    if args.lr_scheduler_type in _BY_RESULTS:
        schedule = f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r}"
    elif passed is not None and not is_function_of_steps(passed):
        schedule = f"the schedule {type(passed).__name__} passed in optimizers"
    elif deepspeed is not None:
        schedule = f"the 'scheduler' in the DeepSpeed config ({deepspeed})"
    if schedule is not None:
        raise ValueError(
            f"With effective_epochs=True the learning rate follows the effective epochs, which {schedule} does not "
            f"support. {ALL_STEPS} Or use a schedule over steps, such as lr_scheduler_type='linear'"
            f"{'' if deepspeed is None else ', and remove the one in the DeepSpeed config'}."
        )


def _schedule_of_deepspeed(trainer: Any) -> str | None:
    """Type of the schedule in the DeepSpeed config, which DeepSpeed creates and steps itself."""
    if not trainer.is_deepspeed_enabled:
        return None
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    return config["scheduler"].get("type", "?") if "scheduler" in config else None


# ---- overrides of users ----------------------------------------------------------------------------------------------


def overrides_of(cls: type, mixin: type, names: Sequence[str]) -> list[str]:
    """Methods with these names in classes written by users, as in `Mine.compute_loss`."""
    return [
        f"{owner.__name__}.{name}" for owner, _ in _user_classes(cls, mixin) for name in names if name in vars(owner)
    ]


def unmeasured(
    cls: type, mixin: type, names: Sequence[str] = ("compute_loss", "training_step", "get_batch_samples", "_run_epoch")
) -> UnweightedError:
    """The error for a training step without measured importances.

    Args:
        cls: class of the trainer.
        mixin: `ImportanceTrainerMixin`, one of its bases.
        names: methods, one of which does not call `super()`.
    """
    overrides = " or ".join(overrides_of(cls, mixin, names)) or "a replaced method of the trainer"
    return UnweightedError(
        f"No importance was measured in this step: {overrides} does not reach the method of ImportanceTrainer. Call "
        "super() in every step. To add a term to the loss, start from loss, outputs = super().compute_loss(model, "
        f"inputs, True, ...). For your own loss (class weights, distillation), {_LOSS_FUNCTION}."
    )


def _validate_overrides(cls: type, mixin: type, has_loss_function: bool) -> None:
    """Check that no override of `compute_loss` would be ignored; those that replace ours show at the first step."""
    for owner, is_before in _user_classes(cls, mixin):
        if not is_before and "compute_loss" in vars(owner) and not has_loss_function:
            raise UnweightedError(
                f"{owner.__name__}.compute_loss comes after {mixin.__name__} in the bases of {cls.__name__}, so "
                f"training would never call it. If it calls super().compute_loss(), put {owner.__name__} first: class "
                f"{cls.__name__}({owner.__name__}, ImportanceTrainer). If it computes its own loss, pass "
                "per_example_loss_func=f with f(outputs, labels) -> Tensor[batch], which replaces it."
            )


def _user_classes(cls: type, mixin: type) -> Iterator[tuple[type, bool]]:
    """Classes written by users before any adapted class, and whether they precede `mixin`."""
    adapted = adapted_class(cls)
    order = cls.__mro__ if adapted is None else cls.__mro__[: cls.__mro__.index(adapted)]
    for place, owner in enumerate(order):
        if owner.__module__.split(".")[0] not in ("transformers", "hf_importance", "builtins"):
            yield owner, place < order.index(mixin)
