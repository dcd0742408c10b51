"""Maps trainers of other libraries to adapters, and says why others are refused."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_importance.adapters.base import LossAdapter
from hf_importance.errors import UnweightedError
from hf_importance.losses.first_batch import Gather, alone

_ADAPTERS = {
    "trl": {"SFTTrainer": "SFTLoss", "RewardTrainer": "RewardLoss", "DPOTrainer": "DPOLoss"},
    "sentence_transformers": {
        "SentenceTransformerTrainer": "SentenceLoss",
        "CrossEncoderTrainer": "SentenceLoss",
        "SparseEncoderTrainer": "SentenceLoss",
        "MultiVectorEncoderTrainer": "SentenceLoss",
    },
}
"""Adapters by package, which is also the name of our module, and class."""
_ON_POLICY = "it compares completions that the model generates with each other, so there is no per-example loss"
_COUPLED = {
    "GRPOTrainer": _ON_POLICY,
    "RLOOTrainer": _ON_POLICY,
    "KTOTrainer": "the loss of an example contains the mean KL divergence of the batch, so it depends on the others",
}


def adapted_class(cls: type) -> type | None:
    """The base class whose `compute_loss` is adapted; None for trainers of transformers, else an `UnweightedError`."""
    for base in cls.__mro__:
        library = _library(base)
        known = _ADAPTERS.get(library, {})
        if base.__name__ in known:
            return base
        if known and {"compute_loss", "_compute_loss"} & set(vars(base)):
            first = next(c.__name__ for c in cls.__mro__ if _library(c) == library)
            reason = _COUPLED.get(base.__name__, "its loss is not supported")
            raise UnweightedError(
                f"{first} cannot be used with importance sampling: {reason}. Use it without ImportanceTrainerMixin. "
                f"Supported trainers of {library}: {', '.join(known)}."
            )
    return None


def has_own_loss(cls: type) -> bool:
    """Whether it is a trainer of another library, which computes its own loss."""
    return any(_library(base) in _ADAPTERS and "compute_loss" in vars(base) for base in cls.__mro__)


def adapter_of(trainer: Any, base: type, gather: Gather = alone) -> LossAdapter | None:
    """The adapter of a trainer with this [`adapted_class`]; None if a `per_example_loss_func` replaces its loss."""
    library = _library(base)
    module = import_module(f"hf_importance.adapters.{library}")
    adapter = getattr(module, _ADAPTERS[library][base.__name__])
    if trainer.per_example_loss_func is None:
        return adapter(trainer, gather)
    if adapter.takes_own_loss:
        return None
    raise ValueError(
        f"per_example_loss_func must be None for {base.__name__}, which computes its own loss: set "
        "the loss as for that trainer."
    )


def _library(cls: type) -> str:
    return cls.__module__.split(".")[0]
