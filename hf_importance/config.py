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

Metric = Literal["logit_gradient", "loss", "last_layer_gradient", "uniform"]
Sampling = Literal["reshuffled", "replacement"]
if TYPE_CHECKING:
    Budget = float | Literal["auto"]
else:
    Budget = str  # a flag has one type; numbers are made of it below

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
    """How importance is measured, remembered and sampled. `HfArgumentParser` turns the fields into flags.

    What people set: `budget`, `prune_mass`, `record`, `seed`, and where labels are wrong
    `suspect_weight`. What experiments need: the others.

    Raises:
        ValueError: where a value is out of its range; the message says which and what to pass instead.
        TypeError: where it has the wrong type.

    >>> ImportanceConfig(budget=0.5).metric
    'logit_gradient'
    """

    budget: Budget = _setting(
        "auto",
        "auto: training ends, and the learning rate has decayed, when as much was learnt as uniform sampling learns in "
        "num_train_epochs or max_steps. While a step is worth g uniform ones, the learning rate is √g times as high. "
        "A number above 0: so many visits per epoch over the number of examples, and all epochs or steps are made.",
    )
    prune_mass: float = _setting(
        0.0,
        "After each pass leave out the examples that together hold less than this share of the importance, in [0, 1). "
        "0 prunes nothing.",
    )
    record: bool = _setting(
        True, "Keep what importance_report shows of every example: visits, loss, prediction; 28 bytes each."
    )
    seed: int | None = _setting(None, "Seed of the sampler; by default data_seed or seed of TrainingArguments.")
    metric: Metric = _setting(
        "logit_gradient",
        "What importance is: the norm of the gradient of an example's loss with respect to the logits "
        "(logit_gradient) or to the weights of a linear last layer (last_layer_gradient), its loss (loss), or the same "
        "for all (uniform: plain reshuffling, all weights 1).",
    )
    sampling: Sampling = _setting(
        "reshuffled",
        "reshuffled: visits as even as the rates allow, with rates of the last eighth of a pass, and a guard that "
        "makes them uniform where importances tell nothing. replacement: independent draws, as in the paper.",
    )
    memory_momentum: float = _setting(0.2, "Share of the old importance when a new one is measured, in [0, 1).")
    uniform_fraction: float = _setting(
        0.3,
        "Lowest floor of the rates, in [0, 1]: this share of the visits is uniform; no weight is above its inverse.",
    )
    weight_exponent: float = _setting(
        1.0,
        "Weight of a visit is rate^-exponent, in [0, 1]. 1 keeps the gradient unbiased; less prefers important "
        "examples, which pays only with clean labels.",
    )
    importance_increment: float = _setting(
        0.0,
        "Added to every known importance at the end of each pass, at least 0: the paper's way to forget no example.",
    )

    suspect_weight: float = _setting(
        1.0,
        "Weight in the loss of examples whose label is probably wrong, in [0, 1]: 0 leaves them out. Less than 1 "
        "changes what is minimised. It is for wrong labels, and puts rare classes at risk.",
    )
    suspects_from: float = _setting(2.0, "Effective epochs from which on suspect_weight holds, at least 0.")

    @classmethod
    def paper(cls, memory_momentum: float = 0.2, importance_increment: float = 1e-3) -> ImportanceConfig:
        """The sampler of Salaün et al. 2023: with replacement, without a floor, for all the steps.

        They give α ∈ {0, 0.1, 0.2, 0.3} for the momentum and no figure for the increment, which is our choice.
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
        """Load `importance_config.json`. Of settings of version 0.1 that are no more it says what took their place.

        Args:
            name_or_path: the file, a folder that has it, or a model on the Hub.
            **hub: `revision`, `token`, `cache_dir`, … for the Hub.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not JSON, or has settings that we do not know or values out of range.
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
        """Write `importance_config.json` into a folder, which is made if it is not there; returns its path."""
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
            if isinstance(self.budget, str):
                raise ValueError(self._message("budget", "'auto' or a number above 0"))
            self._check_range("budget", "'auto' or a number above 0 and finite", lambda x: 0 < x < math.inf)

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
