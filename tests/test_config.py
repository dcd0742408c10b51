import json
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
        prune_mass=0.1,
        prune_until=0.5,
        revisit_pruned=0.0,
        uniform_below=0.4,
        guard=True,
        importance_increment=0.0,
        record=True,
        report_examples_to_hub=False,
        seed=None,
    )


def test_paper():
    config = ImportanceConfig.paper(memory_momentum=0.3)
    assert (config.sampling, config.memory_momentum, config.uniform_fraction) == ("replacement", 0.3, 0.0)
    assert (config.max_rate, config.weight_exponent) == (math.inf, 1.0)
    assert not config.guard
    assert (config.prune_mass, config.uniform_below) == (0.0, 0.0)
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


# ---- importance_config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ImportanceConfig(), ImportanceConfig.paper(), ImportanceConfig(seed=3, budget=0.5)])
def test_saved_and_loaded_is_the_same(tmp_path, config):
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "importance_config.json"
    assert ImportanceConfig.from_pretrained(path) == ImportanceConfig.from_pretrained(path.parent) == config
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity, which other readers do not know


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", "must hold an object with settings, but holds list"),
        ('{"budgets": 0.5}', r"settings that ImportanceConfig does not know: \['budgets'\]"),
        ('{"budget": -1}', "ImportanceConfig.budget must be above 0"),
        ('{"guard": "inf"}', "ImportanceConfig.guard must be True or False"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "importance_config.json").write_text(content)
    with pytest.raises((ValueError, TypeError), match=message):
        ImportanceConfig.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match=r"importance_config\.json"):
        ImportanceConfig.from_pretrained(tmp_path)
