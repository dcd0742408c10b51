"""The code blocks of the README run, and its table of settings matches the code."""

import re
import shlex
from dataclasses import fields
from importlib.util import find_spec
from types import SimpleNamespace

import benchmark
import pytest
import run_image_classification
import run_text_classification
import tiny
from benchmarks import from_scratch, methods, picture, results, rivals
from benchmarks.methods import METHODS
from benchmarks.tasks import Entry
from PIL import Image

from hf_importance import ImportanceConfig
from hf_importance.command_line.arguments import parse

README, RESULTS = ((benchmark.ROOT / page).read_text(encoding="utf-8") for page in benchmark.PAGES)


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


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


def commands(script, page=README):
    text = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    return [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(f"python scripts/{script}")
    ]


@pytest.mark.parametrize("command", commands("benchmark", RESULTS), ids=lambda words: words[2])
def test_parts_of_the_benchmark_are_known(command, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "hardest", METHODS["InfoBatch"])
    assert benchmark.new_parser().parse_args(command[2:]).part == command[2]
    with pytest.raises(SystemExit):
        benchmark.new_parser().parse_args([*command[2:], "--unknown"])


def test_a_method_and_a_task_are_added_as_the_page_says(tmp_path):
    method, task = blocks("python", RESULTS)
    names = {**vars(rivals), **vars(from_scratch)}
    exec(compile(method, "README.md", "exec"), names)
    exec(compile(task, "README.md", "exec"), names)
    for line in ("Method(rival=Hardest)", 'Method({"uniform_fraction": 0.5})'):
        assert line in RESULTS
        added = eval(line, {**vars(methods), **names})
        parity = names["parity_task"]()
        assert added.trainer(parity, 20, 1, str(tmp_path)).train().global_step == 20
    (entry,) = re.findall(r'"parity": (Entry\(.*?\)), ?`|"parity": (Entry\(.*?\))`', RESULTS)
    assert eval(entry[0] or entry[1], {"Entry": Entry, "from_scratch": SimpleNamespace(**names)}).embedded
    assert "hardest" not in METHODS, "it needs to be named there"
    with pytest.raises(SystemExit):
        benchmark.new_parser().parse_args(["accuracy", "--methods", "hardest"])


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
    "saved": ("steps",),
    "decision": ("steps", "ours"),
    "whole": ("accuracy", "error"),
    "match": ("accuracy", "error"),
    "figures": ("accuracy", "error"),
    "overhead": ("ratio",),
    "draws": ("batch_mean",),
    "label_errors": ("auroc_mean_loss",),
    "suspects": ("accuracy",),
}
"""Some that the tables are made of."""


def runs_of(part):
    return results.load(results.FOLDER / f"{part}.json")["runs"]


def test_tables_are_those_of_the_results():
    pages = {page: (benchmark.ROOT / page).read_text(encoding="utf-8") for page in benchmark.PAGES}
    marks = {page: re.findall(r"^<!-- (\w+) -->$", text, flags=re.MULTILINE) for page, text in pages.items()}
    assert {mark for found in marks.values() for mark in found} == set(benchmark.TABLES)
    for text in pages.values():
        assert benchmark.with_tables(text) == text, "run: python scripts/benchmark.py pages"
    for name, (parts, tables) in benchmark.TABLES.items():
        runs = [runs_of(part) for part in parts]
        assert len(runs[0]) >= 4
        changed = [[_changed(run, FIGURES[name], 1 + i % 3) for i, run in enumerate(part)] for part in runs]
        for text in (text for page, text in pages.items() if name in marks[page]):
            assert tables(*runs) in text
            assert tables(*changed) not in text, f"control: {name}"


def _changed(run, figures, factor):
    return {name: factor * value if name in figures else value for name, value in run.items()}


def test_the_plot_is_that_of_the_results():
    runs = runs_of("accuracy")
    assert Image.open(results.FOLDER / "accuracy.png").text["Source"] == results.digest(runs)
    assert results.digest(runs[1:]) != results.digest(runs), "control"


def test_the_picture_of_a_report_is_of_the_page_as_it_is():
    with Image.open(picture.PICTURE) as drawn:
        assert drawn.text["Source"] == picture.digest(), "run: python scripts/benchmark.py picture"
    assert f"](scripts/results/{picture.PICTURE.name})" in README
