"""All settings, checked at construction."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers.utils import cached_file

CONFIG_FILE = "importance_config.json"
_MOST_VISITS = 10

Metric = Literal["logit_gradient", "loss", "uniform"]
Backward = Literal["auto", "full", "selective"]


def _setting(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ImportanceConfig:
    """Settings of how importance is measured, remembered and sampled. `HfArgumentParser` turns the fields into flags.

    The settings for everyday use are `effective_epochs`, `backward`, `prune_mass`, `record`, `seed`, for noisy labels
    `suspect_weight`, and for another training on the same data `start_from`. The others are for experiments.

    Raises:
        ValueError: if a value is out of range; the message names the field and the accepted values.
        TypeError: if a value has the wrong type.

    >>> ImportanceConfig(effective_epochs=False).metric
    'logit_gradient'
    """

    effective_epochs: bool = _setting(
        True,
        "num_train_epochs or max_steps count what uniform sampling learns in them: each epoch ends once it has made "
        "the progress of a uniform epoch, training after the last, when the learning rate has decayed; while a step is "
        "worth g uniform steps, the learning rate is √g times as high. False: make all steps.",
    )
    visits_per_epoch: float = _setting(
        1.0,
        "Visits per epoch relative to the number of training examples, above 0 and at most 10; other than 1 only "
        "without effective_epochs.",
    )
    backward: Backward = _setting(
        "auto",
        "Which examples of a batch are propagated back: only those whose gradients matter, without bias (selective), "
        "all (full), or selective where models and batches are large enough for it to pay (auto).",
    )
    backward_tolerance: float = _setting(
        0.1,
        "Largest relative rise of the second moment of the gradient that selective backward may cause, in (0, 1].",
    )
    prune_mass: float = _setting(
        0.0,
        "After each pass, prune the examples that together hold less than this share of the importance, in [0, 1). "
        "0 prunes nothing.",
    )
    record: bool = _setting(
        True,
        "Record the visits, loss and prediction of every example, for importance_report and to tell noisy labels; 28 "
        "bytes each.",
    )
    seed: int | None = _setting(None, "Seed of the sampler. Defaults to data_seed or seed of TrainingArguments.")
    metric: Metric = _setting(
        "logit_gradient",
        "Definition of importance: the norm of the gradient of an example's loss with respect to the logits "
        "(logit_gradient), the loss itself (loss), or equal for all (uniform: plain reshuffling, all weights 1).",
    )
    memory_momentum: float = _setting(0.2, "Weight of the old importance when a new one is measured, in [0, 1).")
    uniform_fraction: float = _setting(
        0.3,
        "Minimum share of the visits that is uniform, in [0, 1]; importance weights are at most about its inverse.",
    )
    weight_exponent: float = _setting(
        1.0,
        "The importance weight of a visit is rate^-exponent, in [0, 1]. 1 keeps the gradient unbiased; less emphasises "
        "important examples, which only helps with clean labels.",
    )
    suspect_weight: float = _setting(
        1.0,
        "Weight in the loss of examples whose label is probably wrong, in [0, 1]; 0 excludes them. Below 1, the "
        "training objective changes. Intended for noisy labels; it can hurt rare classes.",
    )
    suspects_from: float = _setting(2.0, "Effective epochs after which suspect_weight applies, at least 0.")
    start_from: Tensor | str | None = _setting(
        None,
        "Importances of another training on the same data to start with: a folder with its model, or a model on the "
        "Hub. In Python also a tensor [examples], at least 0, NaN where unknown.",
    )

    sampling: ClassVar[Literal["reshuffled", "replacement"]] = "reshuffled"
    importance_increment: ClassVar[float] = 0.0

    @staticmethod
    def paper(memory_momentum: float = 0.2, importance_increment: float = 1e-3) -> PaperConfig:
        """The sampler of Salaün et al. 2023: with replacement, without a uniform share, for all steps.

        The paper gives α ∈ {0, 0.1, 0.2, 0.3} for the momentum, but no value for the increment, which is our choice.
        """
        return PaperConfig(memory_momentum=memory_momentum, importance_increment=importance_increment)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> ImportanceConfig:
        """Load `importance_config.json`.

        Args:
            name_or_path: the file, a folder that contains it, or a model on the Hub.
            **hub: `revision`, `token`, `cache_dir`, … for the Hub.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not JSON, or has unknown settings or values out of range.
        """
        path = Path(name_or_path)
        if not path.is_file():
            path = Path(cached_file(str(name_or_path), CONFIG_FILE, **hub))
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must be valid JSON, but could not be parsed ({error}).") from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"{path} must contain a JSON object of settings, but contains a {type(settings).__name__}."
            )
        cls = PaperConfig if "importance_increment" in settings else ImportanceConfig
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"{path} has settings {unknown}, which ImportanceConfig does not have (version 0.2 had others): remove "
                f"them. It has {sorted(known)}."
            )
        return cls(**settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `importance_config.json` into a folder, created if needed, and return its path."""
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def to_dict(self) -> dict[str, Any]:
        """The settings in a form for JSON, in which a tensor `start_from` is null.

        >>> ImportanceConfig(start_from=torch.ones(3)).to_dict()["start_from"]
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return settings | {"start_from": self.start_from if isinstance(self.start_from, str) else None}

    def __post_init__(self) -> None:
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in {f.name for f in fields(self)}:
            raise AttributeError(
                f"ImportanceConfig has no setting {name!r}. It has {sorted(f.name for f in fields(self))}."
            )
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Check all settings, again at the start of each training, as they may be changed before it.

        Raises:
            ValueError: if a value is out of range; the message names the field and the accepted values.
            TypeError: if a value has the wrong type.
        """
        if self.metric not in get_args(Metric):
            raise ValueError(self._message("metric", "one of " + ", ".join(map(repr, get_args(Metric)))))
        if self.backward not in get_args(Backward):
            raise ValueError(self._message("backward", "one of " + ", ".join(map(repr, get_args(Backward)))))
        self._check_range("backward_tolerance", "above 0 and at most 1", lambda x: 0 < x <= 1)
        self._check_range("memory_momentum", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_range("uniform_fraction", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("weight_exponent", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("visits_per_epoch", f"above 0 and at most {_MOST_VISITS}", lambda x: 0 < x <= _MOST_VISITS)
        self._check_range("prune_mass", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_range("importance_increment", "at least 0 and finite", lambda x: 0 <= x < math.inf)
        self._check_range("suspect_weight", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("suspects_from", "at least 0 and finite", lambda x: 0 <= x < math.inf)
        for name in ("effective_epochs", "record"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(self._message(name, "True or False"))
        if self.seed is not None:
            if isinstance(self.seed, bool) or not isinstance(self.seed, int):
                raise TypeError(self._message("seed", "an int or None"))
            if not 0 <= self.seed < 2**63:
                raise ValueError(self._message("seed", "in 0 … 2^63 − 1"))
        if self.effective_epochs and self.visits_per_epoch != 1:
            raise ValueError(
                f"ImportanceConfig.visits_per_epoch={self.visits_per_epoch!r} requires effective_epochs=False: here "
                "an epoch ends when it has made the progress of a uniform epoch."
            )
        if self.suspect_weight < 1:
            self._check_suspects()
        if self.start_from is not None:
            self._check_start()

    def _check_suspects(self) -> None:
        start = f"ImportanceConfig.suspect_weight={self.suspect_weight!r} is below 1, which requires"
        if not self.record:
            raise ValueError(f"{start} record=True: suspects are found from the recorded visits.")
        if self.sampling != "reshuffled":
            raise ValueError(f"{start} another sampler than that of ImportanceConfig.paper().")
        if not self.suspect_weight and not self.uniform_fraction:
            raise ValueError(f"{start} uniform_fraction above 0: otherwise suspects would never be visited again.")

    def _check_start(self) -> None:
        name, value = "ImportanceConfig.start_from", self.start_from
        if isinstance(value, os.PathLike):
            value = self.start_from = os.fspath(value)
        if isinstance(value, Tensor):
            self.start_from = checked_importances(value, name)
        elif not isinstance(value, str):
            raise TypeError(
                f"{name} must be a folder, a model on the Hub, or a tensor [examples], but is {type(value).__name__}."
            )
        elif not value:
            raise ValueError(f"{name} must be a folder, a model on the Hub, a tensor or None, but is empty.")
        if self.sampling != "reshuffled":
            raise ValueError(f"{name} requires another sampler than that of ImportanceConfig.paper().")
        if self.metric == "uniform":
            raise ValueError(f"{name} requires a metric other than 'uniform', with which all are equally important.")

    def _check_range(self, name: str, wanted: str, accepts: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(self._message(name, f"a number {wanted}"))
        if not accepts(value):
            raise ValueError(self._message(name, wanted))

    def _message(self, name: str, wanted: str) -> str:
        default = next(f.default for f in fields(self) if f.name == name)
        return f"ImportanceConfig.{name} must be {wanted}, but is {getattr(self, name)!r} (default: {default!r})."


def checked_importances(importance: Tensor, name: str) -> Tensor:
    """Importances of another training as float32 `[examples]`, on the CPU; NaN where unknown.

    Raises:
        TypeError: if they are no numbers.
        ValueError: if they have another shape, or are negative or infinite; the message starts with `name`.
    """
    if importance.is_complex() or importance.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of numbers, but is one of {importance.dtype}.")
    if importance.dim() != 1:
        raise ValueError(f"{name} must be a tensor [examples], but has the shape {list(importance.shape)}.")
    importance = importance.detach().to("cpu", torch.float32, copy=True)
    wrong = (importance < 0) | importance.isinf()
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must be at least 0 and finite, or NaN where unknown, but is {importance[first]:g} for example "
            f"{first} ({int(wrong.sum())} such values)."
        )
    return importance


@dataclass
class PaperConfig(ImportanceConfig):
    """The settings of [`ImportanceConfig.paper`].

    Independent draws with replacement instead of strata, and `importance_increment`, which is added to every known
    importance after each pass, so that no example is forgotten.
    """

    effective_epochs: bool = False
    backward: Backward = "full"
    uniform_fraction: float = 0.0
    importance_increment: float = 1e-3

    sampling: ClassVar[Literal["reshuffled", "replacement"]] = "replacement"
