"""`ImportanceConfig`: defaults, command-line flags, and `importance_config.json`."""

import json

import pytest
import tiny
import torch
from transformers import HfArgumentParser

from hf_importance import ImportanceConfig
from hf_importance.config import PaperConfig


def test_defaults_are_as_documented():
    assert ImportanceConfig() == ImportanceConfig(
        effective_epochs=True,
        visits_per_epoch=1.0,
        prune_mass=0.0,
        record=True,
        seed=None,
        metric="logit_gradient",
        memory_momentum=0.2,
        uniform_fraction=0.3,
        weight_exponent=1.0,
        suspect_weight=1.0,
        suspects_from=2.0,
        start_from=None,
    )


def test_settings_may_be_changed_until_the_training(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), num_train_epochs=1)
    run.importance_config.uniform_fraction = 7
    with pytest.raises(ValueError, match=r"ImportanceConfig.uniform_fraction must be in \[0, 1\], but is 7"):
        run.train()
    assert run.state.global_step == 0
    run.importance_config.uniform_fraction = 1.0
    run.train()
    assert run._run.sampler.visits.floor == 1.0, "what was set is used"


def test_unknown_settings_cannot_be_set():
    for settings in (ImportanceConfig(), ImportanceConfig.paper()):
        with pytest.raises(AttributeError, match=r"no setting 'budget'. It has \['backward'"):
            settings.budget = 1.0
    with pytest.raises(AttributeError, match="no setting 'importance_increment'"):
        ImportanceConfig().importance_increment = 1.0
    ImportanceConfig.paper().importance_increment = 1.0  # control


def test_paper_settings():
    config = ImportanceConfig.paper(memory_momentum=0.3)
    assert (config.sampling, config.memory_momentum, config.uniform_fraction) == ("replacement", 0.3, 0.0)
    assert (config.effective_epochs, config.visits_per_epoch) == (False, 1.0)
    assert (config.prune_mass, config.weight_exponent) == (0.0, 1.0)
    assert config.importance_increment > 0, "without a floor, examples of importance 0 need it to be revisited"


@pytest.mark.parametrize("name", ["sampling", "importance_increment"])
def test_settings_of_the_paper_are_not_public(name):
    with pytest.raises(TypeError, match=name):
        ImportanceConfig(**{name: getattr(ImportanceConfig.paper(), name)})


def config_of(*flags):
    (config,) = HfArgumentParser(ImportanceConfig).parse_args_into_dataclasses(list(flags))
    return config


def test_command_line_flags():
    flags = ["--metric", "loss", "--uniform_fraction", "0.5", "--effective_epochs", "false", "--seed", "3"]
    assert config_of(*flags) == ImportanceConfig(metric="loss", uniform_fraction=0.5, effective_epochs=False, seed=3)


def test_flag_of_another_training():
    assert config_of("--start_from", "outputs/run1").start_from == "outputs/run1"
    assert config_of().start_from is None


@pytest.mark.parametrize(("settings", "message"), [({"metric": "uniform"}, "metric"), ({}, "paper")])
def test_another_training_needs_rates_that_follow_importances(settings, message):
    cls = PaperConfig if message == "paper" else ImportanceConfig
    with pytest.raises(ValueError, match=rf"ImportanceConfig.start_from requires .*{message}"):
        cls(start_from="outputs/run1", **settings)


def test_tensors_are_copied_as_float32_and_are_null_in_json(tmp_path):
    given = torch.tensor([1, 2, 0])
    config = ImportanceConfig(start_from=given, seed=3)
    given[0] = 7
    assert torch.equal(config.start_from, torch.tensor([1.0, 2.0, 0.0]))
    assert ImportanceConfig.from_pretrained(config.save_pretrained(tmp_path)) == ImportanceConfig(seed=3)
    config = ImportanceConfig(start_from=tmp_path)
    assert config.start_from == str(tmp_path)
    assert ImportanceConfig.from_pretrained(config.save_pretrained(tmp_path)) == config


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
    ],
)
def test_values_at_the_bounds_are_accepted(name, value):
    assert getattr(ImportanceConfig(**{name: value}), name) == value


# ---- importance_config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [ImportanceConfig(), ImportanceConfig.paper(), ImportanceConfig(seed=3, prune_mass=0.5)]
)
def test_config_is_equal_after_saving_and_loading(tmp_path, config):
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "importance_config.json"
    assert ImportanceConfig.from_pretrained(path) == ImportanceConfig.from_pretrained(path.parent) == config
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity or NaN, which is not valid JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be valid JSON"),
        ("[1]", "must contain a JSON object of settings, but contains a list"),
        ('{"budget": "auto", "seed": 3}', r"settings \['budget'\].*version 0.2 had others.*remove"),
        ('{"prune_mass": -1}', "ImportanceConfig.prune_mass must be in"),
        ('{"record": "inf"}', "ImportanceConfig.record must be True or False"),
    ],
)
def test_invalid_files_are_refused(tmp_path, content, message):
    (tmp_path / "importance_config.json").write_text(content)
    with pytest.raises((ValueError, TypeError), match=message):
        ImportanceConfig.from_pretrained(tmp_path)


def test_missing_file_raises_os_error(tmp_path):
    with pytest.raises(OSError, match=r"importance_config\.json"):
        ImportanceConfig.from_pretrained(tmp_path)
