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
        revisit_pruned=0.0,
        guard=True,
        importance_increment=0.0,
        seed=None,
    )


def test_paper():
    config = ImportanceConfig.paper(memory_momentum=0.3)
    assert (config.sampling, config.memory_momentum, config.uniform_fraction) == ("replacement", 0.3, 0.0)
    assert (config.max_rate, config.weight_exponent) == (math.inf, 1.0)
    assert not config.guard
    assert config.importance_increment > 0, "without a floor only the increment brings forgotten examples back"


def test_flags():
    flags = ["--metric", "loss", "--uniform_fraction", "0.5", "--budget", "0.7", "--seed", "3"]
    (config,) = HfArgumentParser(ImportanceConfig).parse_args_into_dataclasses(flags)
    assert config == ImportanceConfig(metric="loss", uniform_fraction=0.5, budget=0.7, seed=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory_momentum", 0), ("uniform_fraction", 1), ("max_rate", math.inf), ("prune_mass", 0.99), ("seed", 0)],
)
def test_bounds_that_are_allowed(name, value):
    assert getattr(ImportanceConfig(**{name: value}), name) == value
