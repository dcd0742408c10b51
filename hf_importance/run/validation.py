"""Checks for unsupported arguments and data, with messages that name the fix."""

from __future__ import annotations

from typing import Any

import transformers
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import SchedulerType

from hf_importance.config import ImportanceConfig
from hf_importance.data.lengths import name_of_tokens, refuse_unknown_lengths
from hf_importance.losses.heads import with_inputs
from hf_importance.run.schedule import ALL_STEPS

_PRIVATE_HOOKS = (
    "_inner_training_loop",
    "_init_training_state",
    "_save_rng_state",
    "_load_optimizer_and_scheduler",
    "_finish_current_push",
)
_LARGEST_SEED = 2**63 - 1
_BY_RESULTS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
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
