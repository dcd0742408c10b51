"""What the README says runs, and its table of settings is that of the code."""

import re
import shlex
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import benchmark
import pytest
import run_image_classification
import run_text_classification
import tiny
from arguments import parse
from benchmarks import accuracy, results
from PIL import Image

from hf_importance import ImportanceConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs(tmp_path):
    names = {
        "model": tiny.bert(),
        "training_args": tiny.arguments(tmp_path, max_steps=2),
        "train_dataset": tiny.texts(),
        "eval_dataset": tiny.texts(8),
    }
    code = blocks("python")
    assert len(code) >= 3
    for block in code:
        missing = [name for name in ("trl", "sentence_transformers") if not find_spec(name)]  # TRL needs Python 3.11
        if any(f"from {name}" in block for name in missing):
            continue
        exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].per_example_loss_func is names["focal_loss"]
    names["trainer"].train()
    assert names["trainer"].importances.isfinite().sum() == 16


def commands(script):
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(f"python scripts/{script}")
    ]


@pytest.mark.parametrize("command", commands("benchmark"), ids=lambda words: words[2])
def test_parts_of_the_benchmark_are_known(command, capsys):
    assert benchmark.new_parser().parse_args(command[2:]).part == command[2]
    with pytest.raises(SystemExit):
        benchmark.new_parser().parse_args([*command[2:], "--unknown"])


@pytest.mark.parametrize("command", commands("run"), ids=lambda words: words[1])
def test_flags_are_known(command):
    module = {"text": run_text_classification, "image": run_image_classification}[command[1].split("_")[1]]
    data = module.TextArguments if module is run_text_classification else module.ImageArguments
    parse(command[2:], data, module.EMBEDDED)
    with pytest.raises(ValueError, match="Some specified arguments are not used"):
        parse([*command[2:], "--unknown", "1"], data, module.EMBEDDED)


def test_settings_are_those_of_the_config():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, flags=re.MULTILINE))
    assert list(rows) == [field.name for field in fields(ImportanceConfig)]
    for field in fields(ImportanceConfig):
        if isinstance(field.default, bool):
            assert rows[field.name] == str(field.default)
        elif isinstance(field.default, float):
            assert float(rows[field.name]) == field.default
        elif field.default is not None:
            assert rows[field.name] == f"`{field.default}`"


FIGURES = {
    "accuracy": ("accuracy", "steps"),
    "overhead": ("ratio",),
    "draws": ("batch_mean",),
    "label_errors": ("auroc_mean_loss",),
    "texts": ("loss", "tokens"),
}
"""Some that the tables are made of."""


def runs_of(part):
    return results.load(results.FOLDER / f"{part}.json")["runs"]


def test_tables_are_those_of_the_results():
    assert set(re.findall(r"^<!-- (\w+) -->$", README, flags=re.MULTILINE)) == set(benchmark.TABLES)
    assert benchmark.with_tables(README) == README, "run: python scripts/benchmark.py readme"
    for name, (part, tables) in benchmark.TABLES.items():
        runs = runs_of(part)
        assert len(runs) >= 4
        changed = [run | {figure: 0.123 for figure in FIGURES[part] if figure in run} for run in runs]
        assert tables(changed) not in README, f"control: {name}"


def test_the_plot_and_the_figures_of_all_methods_are_those_of_the_results():
    runs = runs_of("accuracy")
    assert Image.open(results.FOLDER / "accuracy.png").text["Source"] == results.digest(runs)
    assert (results.FOLDER / "accuracy.md").read_text() == accuracy.details(runs)
    assert results.digest(runs[1:]) != results.digest(runs), "control"
