"""What is private in transformers, accelerate and torch, and used here: one table, checked at import.

Other names come from their documented interfaces. `pyproject.toml` bounds the versions, `scripts/constraints.txt` has
those that were tested.
"""

from __future__ import annotations

from typing import Any

import accelerate
import torch
import transformers
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import CallbackHandler

_USED: list[tuple[Any, str, str]] = [
    (Trainer, "_run_epoch", "the training loop would draw its batches without importance sampling"),
    (Trainer, "_init_training_state", "resumed trainings would begin at another place of the data"),
    (Trainer, "_save_rng_state", "checkpoints would lack the importances"),
    (Trainer, "_finish_current_push", "failed uploads would go unnoticed"),
    (Trainer, "set_initial_training_values", "the number of steps would not follow the sampler"),
    (CallbackHandler, "call_event", "epochs and the learning rate would not follow the effective steps"),
    (torch.nn.Module(), "_buffers", "checks on the first batches would change buffers"),
    (torch.nn.Module(), "_parameters", "checks on the first batches would take parameters for attributes"),
    (torch.Tensor, "_make_wrapper_subclass", "gradients of some rows could not look like those of the batch"),
    (torch._C, "_set_throw_on_mutable_data_ptr", "kernels could read the memory of gradients that have none"),
    (torch._C, "_current_graph_task_id", "selective backward would take recomputations for forward passes"),
    (torch._C, "_will_engine_execute_node", "selective backward would drop rows of gradients that users ask for"),
    (GradientCheckpointingLayer(), "gradient_checkpointing", "checkpointed blocks would be recomputed as a whole"),
]
"""Owner, name, and what would break without it."""
_USED_OF_TRAINERS: list[tuple[str, str]] = [
    ("_train_batch_size", "batches would have another size with auto_find_batch_size or several GPUs"),
    ("_loss_shifts_labels", "labels of causal language models would not be shifted"),
]
"""The same for attributes that `Trainer.__init__` sets."""


def validate_upstream(trainer: Trainer | None = None) -> None:
    """Check that the installed versions have all of it.

    Args:
        trainer: a trainer, whose attributes are then checked instead of classes.

    Raises:
        ImportError: if something is missing; the message says what would break, and the fix.
    """
    of_trainer = [] if trainer is None else [(trainer, *row) for row in _USED_OF_TRAINERS]
    for owner, name, breaks in of_trainer or _USED:
        if not hasattr(owner, name):
            owner = owner.__name__ if isinstance(owner, type) else type(owner).__name__
            raise ImportError(
                f"hf_importance needs {owner}.{name}, without which {breaks}, but it is missing in "
                f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch "
                f"{torch.__version__}: install transformers 5.23, which was tested, or a newer hf_importance."
            )


def unwrapped_scheduler(scheduler: Any) -> Any:
    """The schedule inside the wrapper that accelerate uses for schedules stepped by DeepSpeed."""
    return scheduler.scheduler if isinstance(scheduler, DeepSpeedSchedulerWrapper) else scheduler
