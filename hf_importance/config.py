"""All settings, checked at construction."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

CONFIG_FILE = "importance_config.json"
_MAX_BUDGET = 10

Metric = Literal["logit_gradient", "loss", "last_layer_gradient", "uniform"]
Sampling = Literal["reshuffled", "replacement"]
if TYPE_CHECKING:
    Budget = float | Literal["auto"]
else:
    Budget = str  # a command-line flag has one type; __post_init__ converts numbers

_REMOVED = {
    "max_rate": "rates are now capped at 64 times the average",
    "prune_until": "training now ends by itself (budget='auto')",
    "uniform_below": "training now ends by itself (budget='auto')",
    "revisit_pruned": "pruned examples are now reconsidered after each pass",
    "guard": "it is now always on with sampling='reshuffled' and off with 'replacement'",
    "report_examples_to_hub": "pass it to ImportanceTrainer instead",
}
"""Settings of version 0.1 that were removed, and what replaces them."""


def _setting(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ImportanceConfig:
    """Settings of how importance is measured, remembered and sampled. `HfArgumentParser` turns the fields into flags.

    The settings for everyday use are `budget`, `prune_mass`, `record`, `seed`, and `suspect_weight` for noisy labels.
    The others are for experiments.

    Raises:
        ValueError: if a value is out of range; the message names the field and the accepted values.
        TypeError: if a value has the wrong type.

    >>> ImportanceConfig(budget=0.5).metric
    'logit_gradient'
    """

    budget: Budget = _setting(
        "auto",
        "auto: num_train_epochs or max_steps count uniform-equivalent steps. Each epoch ends once it has those of a "
        "uniform epoch, and training after the last, when the learning rate has decayed; while a step is worth g "
        "uniform steps, the learning rate is √g times as high. "
        "A number above 0 and at most 10: run all epochs or steps, with this many visits per epoch relative to the "
        "dataset size.",
    )
    prune_mass: float = _setting(
        0.0,
        "After each pass, prune the examples that together hold less than this share of the importance, in [0, 1). "
        "0 prunes nothing.",
    )
    record: bool = _setting(
        True, "Record the visits, loss and prediction of every example for importance_report; 28 bytes each."
    )
    seed: int | None = _setting(None, "Seed of the sampler. Defaults to data_seed or seed of TrainingArguments.")
    metric: Metric = _setting(
        "logit_gradient",
        "Definition of importance: the norm of the gradient of an example's loss with respect to the logits "
        "(logit_gradient) or to the weights of a linear last layer (last_layer_gradient), the loss itself (loss), or "
        "equal for all (uniform: plain reshuffling, all weights 1).",
    )
    sampling: Sampling = _setting(
        "reshuffled",
        "reshuffled: visits in strata, one in each stretch of 1/rate passes, with rates updated eight times per pass, "
        "and a guard that makes them uniform if importances are not informative. replacement: independent draws, as in "
        "the paper.",
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
    importance_increment: float = _setting(
        0.0,
        "Added to every known importance after each pass, at least 0, so no example is forgotten (as in the paper).",
    )

    suspect_weight: float = _setting(
        1.0,
        "Weight in the loss of examples whose label is probably wrong, in [0, 1]; 0 excludes them. Below 1, the "
        "training objective changes. Intended for noisy labels; it can hurt rare classes.",
    )
    suspects_from: float = _setting(2.0, "Effective epochs after which suspect_weight applies, at least 0.")

    @classmethod
    def paper(cls, memory_momentum: float = 0.2, importance_increment: float = 1e-3) -> ImportanceConfig:
        """The sampler of Salaün et al. 2023: with replacement, without a uniform share, for all steps.

        The paper gives α ∈ {0, 0.1, 0.2, 0.3} for the momentum, but no value for the increment, which is our choice.
        """
        return cls(
            budget=1.0,
            sampling="replacement",
            memory_momentum=memory_momentum,
            uniform_fraction=0.0,
            importance_increment=importance_increment,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> ImportanceConfig:
        """Load `importance_config.json`. Warns about settings of version 0.1 that were removed.

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
        for name in sorted(_REMOVED.keys() & settings):
            logger.warning(
                f"{path}: the setting {name}={settings.pop(name)!r} was removed in hf_importance 0.2: {_REMOVED[name]}."
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"{path} has unknown settings {unknown}: remove them. ImportanceConfig has {sorted(known)}."
            )
        return cls(**settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `importance_config.json` into a folder, created if needed, and return its path."""
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def __post_init__(self) -> None:
        self._check_choice("metric", get_args(Metric))
        self._check_choice("sampling", get_args(Sampling))
        self._check_range("memory_momentum", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_range("uniform_fraction", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("weight_exponent", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_budget()
        self._check_range("prune_mass", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_range("importance_increment", "at least 0 and finite", lambda x: 0 <= x < math.inf)
        self._check_range("suspect_weight", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("suspects_from", "at least 0 and finite", lambda x: 0 <= x < math.inf)
        if self.seed is not None:
            if isinstance(self.seed, bool) or not isinstance(self.seed, int):
                raise TypeError(self._message("seed", "an int or None"))
            if not 0 <= self.seed < 2**63:
                raise ValueError(self._message("seed", "in 0 … 2^63 − 1"))
        if not isinstance(self.record, bool):
            raise TypeError(self._message("record", "True or False"))
        if self.suspect_weight < 1:
            self._check_suspects()

    def _check_budget(self) -> None:
        if isinstance(self.budget, str) and self.budget != "auto":
            with contextlib.suppress(ValueError):
                self.budget = float(self.budget)  # from the command line
        if self.budget != "auto":
            wanted = f"'auto' or a number above 0 and at most {_MAX_BUDGET} (0.7 for 70 % of the visits)"
            if isinstance(self.budget, str):
                raise ValueError(self._message("budget", wanted))
            self._check_range("budget", wanted, lambda x: 0 < x <= _MAX_BUDGET)

    def _check_suspects(self) -> None:
        start = f"ImportanceConfig.suspect_weight={self.suspect_weight!r} is below 1, which requires"
        if not self.record:
            raise ValueError(f"{start} record=True: suspects are found from the recorded visits.")
        if self.sampling != "reshuffled":
            raise ValueError(f"{start} sampling='reshuffled', but sampling is {self.sampling!r}.")
        if not self.suspect_weight and not self.uniform_fraction:
            raise ValueError(f"{start} uniform_fraction above 0: otherwise suspects would never be visited again.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(self._message(name, "one of " + ", ".join(map(repr, choices))))

    def _check_range(self, name: str, wanted: str, accepts: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(self._message(name, wanted if "number" in wanted else f"a number {wanted}"))
        if not accepts(value):
            raise ValueError(self._message(name, wanted))

    def _message(self, name: str, wanted: str) -> str:
        default = next(f.default for f in fields(self) if f.name == name)
        return f"ImportanceConfig.{name} must be {wanted}, but is {getattr(self, name)!r} (default: {default!r})."
