import math

import pytest
from transformers import HfArgumentParser

from hf_importance import ImportanceConfig


def test_defaults_are_the_documented_ones():
    assert ImportanceConfig() == ImportanceConfig(
        metric="logit_gradient",
        sampling="reshuffled",
        memory_momentum=0.2,
        uniform_fraction=0.3,
        max_rate=64.0,
        weight_exponent=1.0,
        budget=1.0,
        prune_mass=0.0,
        importance_increment=0.0,
        seed=None,
    )


def test_paper():
    config = ImportanceConfig.paper(memory_momentum=0.3)
    assert (config.sampling, config.memory_momentum, config.uniform_fraction) == ("replacement", 0.3, 0.0)
    assert (config.max_rate, config.weight_exponent) == (math.inf, 1.0)
    assert config.importance_increment > 0, "without a floor only the increment brings forgotten examples back"


def test_flags():
    flags = ["--metric", "loss", "--uniform_fraction", "0.5", "--budget", "0.7", "--seed", "3"]
    (config,) = HfArgumentParser(ImportanceConfig).parse_args_into_dataclasses(flags)
    assert config == ImportanceConfig(metric="loss", uniform_fraction=0.5, budget=0.7, seed=3)


BAD = [
    ("metric", "gradient", ValueError, "must be one of 'logit_gradient', 'loss', 'last_layer_gradient', 'uniform'"),
    ("sampling", "random", ValueError, "must be one of 'reshuffled', 'replacement'"),
    ("memory_momentum", 1.0, ValueError, r"must be in \[0, 1\), but is 1.0"),
    ("memory_momentum", -0.1, ValueError, r"must be in \[0, 1\)"),
    ("uniform_fraction", 1.1, ValueError, r"must be in \[0, 1\], but is 1.1 \(default: 0.3\)"),
    ("uniform_fraction", math.nan, ValueError, r"must be in \[0, 1\]"),
    ("uniform_fraction", "0.3", TypeError, r"must be a number in \[0, 1\], but is '0.3'"),
    ("max_rate", 0.5, ValueError, "must be at least 1"),
    ("weight_exponent", 2, ValueError, r"must be in \[0, 1\]"),
    ("weight_exponent", True, TypeError, "must be a number"),
    ("budget", 0.0, ValueError, "must be above 0 and finite"),
    ("budget", math.inf, ValueError, "must be above 0 and finite"),
    ("prune_mass", 1.0, ValueError, r"must be in \[0, 1\)"),
    ("importance_increment", -1.0, ValueError, "must be at least 0 and finite"),
    ("seed", -1, ValueError, "must be at least 0"),
    ("seed", 0.5, TypeError, "must be an int or None"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_bad_values(name, value, error, message):
    with pytest.raises(error, match=rf"ImportanceConfig.{name} {message}"):
        ImportanceConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory_momentum", 0), ("uniform_fraction", 1), ("max_rate", math.inf), ("prune_mass", 0.99), ("seed", 0)],
)
def test_bounds_that_are_allowed(name, value):
    assert getattr(ImportanceConfig(**{name: value}), name) == value


def test_uniform_metric_cannot_prune():
    with pytest.raises(ValueError, match="prune_mass must be 0 with metric='uniform'"):
        ImportanceConfig(metric="uniform", prune_mass=0.1)
