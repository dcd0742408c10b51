"""All settings, checked at construction."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from transformers.utils import cached_file

CONFIG_FILE = "importance_config.json"

Metric = Literal["logit_gradient", "loss", "last_layer_gradient", "uniform"]
Sampling = Literal["reshuffled", "replacement"]


def _setting(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ImportanceConfig:
    """How importance is measured, remembered and sampled. `HfArgumentParser` turns the fields into flags.

    Raises:
        ValueError: where a value is out of its range; the message says which and what to pass instead.
        TypeError: where it has the wrong type.

    >>> ImportanceConfig(uniform_fraction=0.5).metric
    'logit_gradient'
    """

    metric: Metric = _setting(
        "logit_gradient",
        "What importance is: the norm of the gradient of an example's loss with respect to the logits "
        "(logit_gradient) or to the weights of a linear last layer (last_layer_gradient), its loss (loss), or the same "
        "for all (uniform: plain reshuffling, all weights 1).",
    )
    sampling: Sampling = _setting(
        "reshuffled",
        "reshuffled: passes that visit each example as often as its rate says, in random order. "
        "replacement: independent draws, as in the paper.",
    )
    memory_momentum: float = _setting(0.2, "Share of the old importance when a new one is measured, in [0, 1).")
    uniform_fraction: float = _setting(
        0.3,
        "Lowest floor of the rates, in [0, 1]: this share of the visits is uniform; no weight is above its inverse.",
    )
    max_rate: float = _setting(64.0, "No example is visited more often than this many times the average, at least 1.")
    weight_exponent: float = _setting(
        1.0,
        "Weight of a visit is rate^-exponent, in [0, 1]. 1 keeps the gradient unbiased; less prefers important "
        "examples, which pays only with clean labels.",
    )
    budget: float = _setting(1.0, "Visits per epoch over the number of examples, above 0.")
    prune_mass: float = _setting(
        0.1,
        "After each pass leave out the examples that together hold less than this share of the importance, in [0, 1). "
        "0 prunes nothing.",
    )
    prune_until: float = _setting(
        0.5,
        "Share of the training after which nothing is pruned any more, in (0, 1]. 1 prunes to the end.",
    )
    revisit_pruned: float = _setting(
        0.0,
        "Share of the visits that go to pruned examples, in [0, 1): they can come back, and the gradient stays that of "
        "all examples.",
    )
    uniform_below: float = _setting(
        0.4,
        "Sampling becomes uniform, and nothing is pruned, as the mean importance falls from twice this share of what "
        "it was when the examples were new to once this share, in [0, 1]. 0: never.",
    )
    guard: bool = _setting(
        True,
        "Raise the floor, up to uniform sampling, where the measured variance of the gradient asks for it. Not with "
        "weight_exponent 0, where there is no variance to compare.",
    )
    importance_increment: float = _setting(
        0.0,
        "Added to every known importance at the end of each pass, at least 0: the paper's way to forget no example.",
    )
    record: bool = _setting(
        True, "Keep what importance_report shows of every example: visits, loss, prediction; 24 bytes each."
    )
    report_examples_to_hub: bool = _setting(
        False,
        "Let push_to_hub upload the whole report, in which training examples, their labels and predictions can be "
        "seen; by default only importances and plots.",
    )
    seed: int | None = _setting(None, "Seed of the sampler; by default data_seed or seed of TrainingArguments.")

    @classmethod
    def paper(cls, memory_momentum: float = 0.2, importance_increment: float = 1e-3) -> ImportanceConfig:
        """The sampler of Salaün et al. 2023: with replacement, without a floor or a cap.

        They give α ∈ {0, 0.1, 0.2, 0.3} for the momentum and no figure for the increment, which is our choice.
        """
        return cls(
            sampling="replacement",
            memory_momentum=memory_momentum,
            uniform_fraction=0.0,
            max_rate=math.inf,
            prune_mass=0.0,
            uniform_below=0.0,
            guard=False,
            importance_increment=importance_increment,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> ImportanceConfig:
        """Load `importance_config.json`.

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
            raise ValueError(f"{path} must be JSON, but cannot be read ({error}).") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path} must hold an object with settings, but holds {type(settings).__name__}.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"{path} has settings that ImportanceConfig does not know: {unknown}. Known: {sorted(known)}."
            )
        return cls(**{name: math.inf if value == "inf" else value for name, value in settings.items()})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `importance_config.json` into a folder, which is made if it is not there; returns its path.

        Infinity, which JSON does not have, is written as "inf".
        """
        settings = {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def __post_init__(self) -> None:
        self._check_choice("metric", get_args(Metric))
        self._check_choice("sampling", get_args(Sampling))
        self._check_range("memory_momentum", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_range("uniform_fraction", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("max_rate", "at least 1", lambda x: x >= 1)
        self._check_range("weight_exponent", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("budget", "above 0 and finite", lambda x: 0 < x < math.inf)
        self._check_range("prune_mass", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_range("prune_until", "in (0, 1]", lambda x: 0 < x <= 1)
        self._check_range("uniform_below", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_range("revisit_pruned", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_range("importance_increment", "at least 0 and finite", lambda x: 0 <= x < math.inf)
        if self.seed is not None:
            if isinstance(self.seed, bool) or not isinstance(self.seed, int):
                raise TypeError(self._message("seed", "an int or None"))
            if self.seed < 0:
                raise ValueError(self._message("seed", "at least 0"))
        for name in ("guard", "record", "report_examples_to_hub"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(self._message(name, "True or False"))

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(self._message(name, "one of " + ", ".join(map(repr, choices))))

    def _check_range(self, name: str, wanted: str, accepts: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(self._message(name, f"a number {wanted}"))
        if not accepts(value):
            raise ValueError(self._message(name, wanted))

    def _message(self, name: str, wanted: str) -> str:
        default = next(f.default for f in fields(self) if f.name == name)
        return f"ImportanceConfig.{name} must be {wanted}, but is {getattr(self, name)!r} (default: {default!r})."
