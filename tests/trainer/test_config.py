import json

import pytest
from transformers import HfArgumentParser

from hf_importance import ImportanceConfig


def test_defaults_are_the_documented_ones():
    assert ImportanceConfig() == ImportanceConfig(
        budget="auto",
        prune_mass=0.0,
        record=True,
        seed=None,
        metric="logit_gradient",
        sampling="reshuffled",
        memory_momentum=0.2,
        uniform_fraction=0.3,
        weight_exponent=1.0,
        importance_increment=0.0,
    )


def test_paper():
    config = ImportanceConfig.paper(memory_momentum=0.3)
    assert (config.sampling, config.memory_momentum, config.uniform_fraction) == ("replacement", 0.3, 0.0)
    assert (config.budget, config.prune_mass, config.weight_exponent) == (1.0, 0.0, 1.0)
    assert config.importance_increment > 0, "without a floor only the increment brings forgotten examples back"


def parsed(*flags):
    (config,) = HfArgumentParser(ImportanceConfig).parse_args_into_dataclasses(list(flags))
    return config


def test_flags():
    flags = ["--metric", "loss", "--uniform_fraction", "0.5", "--budget", "0.7", "--seed", "3"]
    assert parsed(*flags) == ImportanceConfig(metric="loss", uniform_fraction=0.5, budget=0.7, seed=3)


@pytest.mark.parametrize(("flags", "budget"), [([], "auto"), (["auto"], "auto"), (["1"], 1.0), (["1e-1"], 0.1)])
def test_budget_of_flags(flags, budget):
    found = parsed(*(["--budget", *flags] if flags else [])).budget
    assert found == budget
    assert type(found) is type(budget)


@pytest.mark.parametrize("flag", ["Auto", "", "0", "-1", "nan", "inf", "ten"])
def test_budget_of_flags_is_checked(flag):
    with pytest.raises(ValueError, match=r"ImportanceConfig.budget must be 'auto' or a number above 0"):
        parsed("--budget", flag)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_momentum", 0),
        ("uniform_fraction", 0),
        ("uniform_fraction", 1),
        ("weight_exponent", 0),
        ("weight_exponent", 1),
        ("prune_mass", 0.99),
        ("seed", 0),
        ("budget", 1),
        ("budget", 1e-9),
    ],
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


@pytest.fixture
def warnings_of(monkeypatch):
    found = []
    monkeypatch.setattr("hf_importance.config.logger.warning", found.append)
    return found


OLD = {
    "metric": "loss",
    "sampling": "replacement",
    "memory_momentum": 0.1,
    "uniform_fraction": 0.4,
    "max_rate": "inf",
    "weight_exponent": 0.5,
    "budget": 0.7,
    "prune_mass": 0.1,
    "prune_until": 0.5,
    "revisit_pruned": 0.0,
    "uniform_below": 0.4,
    "guard": True,
    "importance_increment": 0.01,
    "record": False,
    "report_examples_to_hub": True,
    "seed": 3,
}
"""All settings of version 0.1, as it wrote them."""
GONE = {"max_rate", "prune_until", "revisit_pruned", "uniform_below", "guard", "report_examples_to_hub"}


def test_a_file_of_version_0_1(tmp_path, warnings_of):
    """Existing settings are kept; removed ones are named with their values, one line each."""
    path = tmp_path / "importance_config.json"
    path.write_text(json.dumps(OLD))
    config = ImportanceConfig.from_pretrained(tmp_path)
    kept = {name: value for name, value in OLD.items() if name not in GONE}
    assert config == ImportanceConfig(**kept)
    assert len(kept) == 10
    assert len(warnings_of) == 6
    for name in GONE:
        (line,) = [line for line in warnings_of if f"the setting {name}={OLD[name]!r} was removed " in line]
        assert line.startswith(f"{path}: ")
    warnings_of.clear()
    ImportanceConfig.from_pretrained(config.save_pretrained(tmp_path))
    assert warnings_of == [], "control: nothing is said of a file of this version"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be valid JSON"),
        ("[1]", "must contain a JSON object of settings, but contains a list"),
        ('{"budgets": 0.5}', r"unknown settings \['budgets'\]"),
        ('{"budgets": 0.5, "guard": true}', r"unknown settings \['budgets'\]"),
        ('{"budget": -1}', "ImportanceConfig.budget must be 'auto' or a number above 0"),
        ('{"budget": "much"}', "ImportanceConfig.budget must be 'auto' or a number above 0"),
        ('{"record": "inf"}', "ImportanceConfig.record must be True or False"),
    ],
)
def test_bad_files(tmp_path, content, message, warnings_of):
    (tmp_path / "importance_config.json").write_text(content)
    with pytest.raises((ValueError, TypeError), match=message):
        ImportanceConfig.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match=r"importance_config\.json"):
        ImportanceConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(GONE))
def test_what_is_gone_is_refused_in_code(name):
    with pytest.raises(TypeError, match=name):
        ImportanceConfig(**{name: OLD[name]})
