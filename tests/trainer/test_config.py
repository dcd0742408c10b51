"""`ImportanceConfig`: defaults, command-line flags, and `importance_config.json`, also of version 0.1."""

import json

import pytest
from transformers import HfArgumentParser

from hf_importance import ImportanceConfig


def test_defaults_are_as_documented():
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
        suspect_weight=1.0,
        suspects_from=2.0,
    )


def test_paper_settings():
    config = ImportanceConfig.paper(memory_momentum=0.3)
    assert (config.sampling, config.memory_momentum, config.uniform_fraction) == ("replacement", 0.3, 0.0)
    assert (config.budget, config.prune_mass, config.weight_exponent) == (1.0, 0.0, 1.0)
    assert config.importance_increment > 0, "without a floor, examples of importance 0 need it to be revisited"


def config_of(*flags):
    (config,) = HfArgumentParser(ImportanceConfig).parse_args_into_dataclasses(list(flags))
    return config


def test_command_line_flags():
    flags = ["--metric", "loss", "--uniform_fraction", "0.5", "--budget", "0.7", "--seed", "3"]
    assert config_of(*flags) == ImportanceConfig(metric="loss", uniform_fraction=0.5, budget=0.7, seed=3)


@pytest.mark.parametrize(("flags", "budget"), [([], "auto"), (["auto"], "auto"), (["1"], 1.0), (["1e-1"], 0.1)])
def test_budget_flag(flags, budget):
    found = config_of(*(["--budget", *flags] if flags else [])).budget
    assert found == budget
    assert type(found) is type(budget)


@pytest.mark.parametrize("flag", ["Auto", "", "0", "-1", "nan", "inf", "ten"])
def test_invalid_budget_flag_is_refused(flag):
    with pytest.raises(ValueError, match=r"ImportanceConfig.budget must be 'auto' or a number above 0"):
        config_of("--budget", flag)


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
def test_values_at_the_bounds_are_accepted(name, value):
    assert getattr(ImportanceConfig(**{name: value}), name) == value


# ---- importance_config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ImportanceConfig(), ImportanceConfig.paper(), ImportanceConfig(seed=3, budget=0.5)])
def test_config_is_equal_after_saving_and_loading(tmp_path, config):
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "importance_config.json"
    assert ImportanceConfig.from_pretrained(path) == ImportanceConfig.from_pretrained(path.parent) == config
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity or NaN, which is not valid JSON


@pytest.fixture
def logged_warnings(monkeypatch):
    found = []
    monkeypatch.setattr("hf_importance.config.logger.warning", found.append)
    return found


VERSION_0_1 = {
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
"""All settings of version 0.1, as it saved them."""
REMOVED = {"max_rate", "prune_until", "revisit_pruned", "uniform_below", "guard", "report_examples_to_hub"}


def test_file_of_version_0_1_is_loaded(tmp_path, logged_warnings):
    """With a warning for each removed setting that has its value."""
    path = tmp_path / "importance_config.json"
    path.write_text(json.dumps(VERSION_0_1))
    config = ImportanceConfig.from_pretrained(tmp_path)
    kept = {name: value for name, value in VERSION_0_1.items() if name not in REMOVED}
    assert config == ImportanceConfig(**kept)
    assert len(kept) == 10
    assert len(logged_warnings) == 6
    for name in REMOVED:
        (line,) = [line for line in logged_warnings if f"the setting {name}={VERSION_0_1[name]!r} was removed " in line]
        assert line.startswith(f"{path}: ")
    logged_warnings.clear()
    ImportanceConfig.from_pretrained(config.save_pretrained(tmp_path))
    assert logged_warnings == [], "control: no warnings for a file of this version"


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
def test_invalid_files_are_refused(tmp_path, content, message, logged_warnings):
    (tmp_path / "importance_config.json").write_text(content)
    with pytest.raises((ValueError, TypeError), match=message):
        ImportanceConfig.from_pretrained(tmp_path)


def test_missing_file_raises_os_error(tmp_path):
    with pytest.raises(OSError, match=r"importance_config\.json"):
        ImportanceConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_removed_settings_are_refused_as_arguments(name):
    with pytest.raises(TypeError, match=name):
        ImportanceConfig(**{name: VERSION_0_1[name]})
