"""Maps trainers of other libraries to adapters, and lists unsupported ones."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

from hf_importance.adapters.base import LossAdapter

_ADAPTERS = {
    ("trl", "SFTTrainer"): "sft.SFTLoss",
    ("trl", "RewardTrainer"): "preference.RewardLoss",
    ("trl", "DPOTrainer"): "preference.DPOLoss",
    ("sentence_transformers", "SentenceTransformerTrainer"): "sentences.SentenceLoss",
    ("sentence_transformers", "CrossEncoderTrainer"): "sentences.SentenceLoss",
    ("sentence_transformers", "SparseEncoderTrainer"): "sentences.SentenceLoss",
    ("sentence_transformers", "MultiVectorEncoderTrainer"): "sentences.SentenceLoss",
}
"""Adapters by package and class."""
_TOO_OLD = {"trl": "trl>=1.16", "sentence_transformers": "sentence-transformers>=5.2.3"}
_ON_POLICY = (
    "it trains on completions that the model generates, and compares those of one prompt with each other, so there is "
    "no per-example loss"
)
_COUPLED = {
    "GRPOTrainer": _ON_POLICY,
    "RLOOTrainer": _ON_POLICY,
    "OnlineDPOTrainer": _ON_POLICY,
    "AsyncGRPOTrainer": _ON_POLICY,
    "KTOTrainer": "the loss of an example contains the mean KL divergence of the batch, so it depends on which other "
    "examples are drawn",
}
_UNKNOWN_LOSS = "its loss is not supported"
_LIBRARIES = ("trl", "sentence_transformers")


def adapted_class(cls: type) -> type | None:
    """The base class whose `compute_loss` is adapted; None for trainers of transformers.

    Args:
        cls: class of a trainer.

    Raises:
        ValueError: for trainers without a per-example loss, and unknown ones.
    """
    for base in cls.__mro__:
        library = base.__module__.split(".")[0]
        if (library, base.__name__) in _ADAPTERS:
            return base
        if library in _LIBRARIES and {"compute_loss", "_compute_loss"} & set(vars(base)):
            reason = _COUPLED.get(base.__name__, _UNKNOWN_LOSS)
            first = next(c.__name__ for c in cls.__mro__ if c.__module__.split(".")[0] == library)
            known = [name for package, name in _ADAPTERS if package == library]
            raise ValueError(
                f"{first} cannot be used with importance sampling: {reason}. Use it without ImportanceTrainerMixin. "
                f"Supported trainers of {library}: {', '.join(known)}."
            )
    return None


def adapter_of(trainer: Any, base: type) -> LossAdapter | None:
    """Create the adapter of a trainer; None if its loss is replaced by a `per_example_loss_func`.

    Args:
        trainer: the trainer, after its own `__init__`.
        base: result of [`adapted_class`].

    Raises:
        ImportError: if the library is too old.
        ValueError: for settings without per-example losses.
    """
    library = base.__module__.split(".")[0]
    module, name = _ADAPTERS[library, base.__name__].split(".")
    adapter = getattr(import_module(f"hf_importance.adapters.{module}"), name)
    if trainer.per_example_loss_func is not None:
        if adapter.takes_own_loss:
            return None
        raise ValueError(
            f"per_example_loss_func must be None for {base.__name__}, which computes its own loss: set "
            "the loss as for that trainer."
        )
    try:
        return adapter(trainer)
    except ImportError as error:
        version = metadata.version(library.replace("_", "-"))
        raise ImportError(
            f"{library} {version} lacks what importance sampling needs ({error}): install {_TOO_OLD[library]}."
        ) from error
