"""The help of the scripts, and scripts that are copied elsewhere."""

import dataclasses
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import benchmark
import compare_runs
import pytest
from transformers import TrainingArguments

import hf_importance
from hf_importance import ImportanceConfig

SCRIPTS = sorted(Path(compare_runs.__file__).parent.glob("*.py"))
PARTS = next(iter(benchmark.new_parser()._subparsers._group_actions)).choices
HELP = [[path.stem] for path in SCRIPTS] + [["benchmark", part] for part in PARTS]
FINE_TUNING = [path for path in SCRIPTS if path.stem.startswith("run_")]


def flags_of(name, part=None):
    """Flags and names that the help of a script, or of a part of the benchmark, must list."""
    if part is not None:
        return [flag for action in PARTS[part]._actions for flag in action.option_strings]
    if name.startswith("run_"):
        classes = (importlib.import_module(name).ScriptArguments, TrainingArguments, ImportanceConfig)
        return [f"--{field.name}" for cls in classes for field in dataclasses.fields(cls) if field.init]
    return {"benchmark": list(PARTS), "compare_runs": ["folder"]}.get(name, ["--help"])


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_lists_all_flags(words, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(words[0]).main([*words[1:], "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in flags_of(*words):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag
    assert not re.search(r"(?<![\w-])--unknown(?![\w-])", text), "control"


def test_help_shows_the_defaults_for_own_data(capsys):
    """And those for the embedded data at its end."""
    with pytest.raises(SystemExit):
        importlib.import_module("run_text_classification").main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {TrainingArguments.learning_rate})" in text
    assert "embedded data are used, with the defaults" in text
    assert "--learning_rate 0.001" in text


def run_alone(script, *more):
    """Run a script with the package on the path, but not the folder of the scripts."""
    paths = {"PYTHONPATH": str(Path(hf_importance.__file__).parent.parent)}
    command = [sys.executable, script, *more]
    return subprocess.run(command, cwd=script.parent, env={**os.environ, **paths}, capture_output=True, text=True)


@pytest.mark.parametrize("path", FINE_TUNING, ids=lambda path: path.stem)
def test_copied_scripts_run_alone(tmp_path, path):
    done = run_alone(Path(shutil.copy(path, tmp_path)), "--help")
    assert done.returncode == 0, done.stderr
    assert "--do_train" in done.stdout
    other = tmp_path / "other.py"
    other.write_text("import compare_runs")
    assert "No module named 'compare_runs'" in run_alone(other).stderr, "control: other scripts cannot be imported"


COPIES = {
    ("text_classification", "image_classification", "language_modeling"): (
        *("load_files", "load_file", "csv_features", "choose_splits", "find_column", "column_fix", "load_pretrained"),
        *("Clock", "train", "save_metrics", "save_predictions", "publish"),
    ),
    ("text_classification", "image_classification"): (
        *("find_label_column", "drop_missing_labels", "lacks_label", "label_names", "as_number", "label_name"),
        *("label_id", "validate_known_labels"),
    ),
    ("text_classification", "language_modeling"): ("load", "definitions"),
}


@pytest.mark.parametrize(("tasks", "name"), [(tasks, name) for tasks, names in COPIES.items() for name in names])
def test_copies_in_the_scripts_are_the_same(tasks, name):
    """The scripts share no code, so that each can be copied alone; a change in one must be made in the others."""
    sources = {inspect.getsource(getattr(importlib.import_module(f"run_{task}"), name)) for task in tasks}
    assert len(sources) == 1


def test_control_other_functions_differ():
    sources = {inspect.getsource(importlib.import_module(path.stem).main) for path in FINE_TUNING}
    assert len(sources) == len(FINE_TUNING) == 3
