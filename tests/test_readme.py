"""What the README says runs, and its table of settings is that of the code."""

import re
from dataclasses import fields
from pathlib import Path

import benchmark
import pytest
import run_image_classification
import run_text_classification
import tiny
from arguments import parse

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
        exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].per_example_loss_func is names["focal_loss"]
    names["trainer"].train()
    assert names["trainer"].importances.isfinite().sum() == 16


def commands():
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.split("#")[0].split() for line in text.splitlines() if line.startswith("python scripts/")]


@pytest.mark.parametrize("command", commands(), ids=lambda words: words[1])
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


def test_tables_are_those_of_the_results(tmp_path):
    marks = re.findall(r"^<!-- (\w+) -->$", README, flags=re.MULTILINE)
    assert {"accuracy", "label_errors"} <= set(marks)
    assert benchmark.with_tables(README) == README, "run: python scripts/benchmark.py readme"
    for part in marks:
        found = benchmark.results.load(benchmark.results.FOLDER / f"{part}.json")
        assert len(found["runs"]) >= 4
        key = "auroc_mean_loss" if part == "label_errors" else "accuracy"
        changed = [run | ({key: 0.123} if key in run else {}) for run in found["runs"]]
        benchmark.results.save(tmp_path / f"{part}.json", found | {"runs": changed}, ["task", "seed"])
    assert benchmark.with_tables(README, tmp_path) != README, "control"
