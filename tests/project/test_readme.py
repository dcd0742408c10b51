"""The code blocks of the README run, and its table of settings matches the code."""

import importlib
import re
import shlex
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import tiny
from benchmarks import from_scratch, methods, picture, results, rivals
from benchmarks.methods import METHODS
from benchmarks.tasks import Entry
from PIL import Image
from runs import data_arguments
from transformers import TrainingArguments

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.command_line.arguments import ModelArguments, parse

PAGES = {
    page.relative_to(benchmark.ROOT).as_posix(): page.read_text(encoding="utf-8")
    for folder in (".", "hf_importance", "hf_importance/report", "scripts", "scripts/results")
    for page in (benchmark.ROOT / folder).glob("README.md")
}
README, METHOD, SCRIPTS, RESULTS = (
    PAGES[f"{folder}README.md"] for folder in ("", "hf_importance/", "scripts/", "scripts/results/")
)


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_python_runs(tmp_path):
    names = {
        "model": tiny.bert(),
        "training_args": tiny.arguments(tmp_path, max_steps=2),
        "train_dataset": tiny.texts(),
        "ImportanceTrainer": ImportanceTrainer,
    }
    code = blocks("python", METHOD)
    assert len(code) >= 4
    for block in code:
        missing = [name for name in ("trl", "sentence_transformers") if not find_spec(name)]  # TRL needs Python 3.11
        if any(f"from {name}" in block for name in missing):
            continue
        exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].per_example_loss_func is names["focal_loss"]


@pytest.mark.parametrize(("sign", "name"), [("+", "ImportanceTrainer"), ("-", "Trainer")])
def test_the_change_trains_before_and_after(tmp_path, sign, name):
    (change,) = blocks("diff")
    names = {
        "model": tiny.bert(),
        "training_args": tiny.arguments(tmp_path, max_steps=2),
        "train_dataset": tiny.texts(),
        "eval_dataset": tiny.texts(8),
    }
    lines = [line[1:] for line in change.splitlines() if not line or line[0] in (" ", sign)]
    exec("\n".join(lines), names)
    assert type(names["trainer"]).__name__ == name
    assert names["trainer"].state.global_step == 2
    if sign == "+":
        report, settings = blocks("python")
        exec(report, names)
        assert (tmp_path / "_importance_report" / "report.html").exists()
        exec(settings, names)
        assert names["trainer"].importance_config.budget == 0.7


def anchors(page):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", page) if not link.startswith("https://")]


def broken(name, page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (benchmark.ROOT / name).parent / path if path else benchmark.ROOT / name
        text = page if not path else target.read_text(encoding="utf-8") if target.suffix == ".md" else ""
        if not target.exists() or (anchor and anchor not in anchors(text)):
            yield link


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert list(broken(name, PAGES[name])) == []


def test_control_of_links():
    page = "# A heading, *so*\n[good](#a-heading-so) [bad](#a-heading) [none](nowhere.png) [there](LICENSE)"
    assert list(broken("README.md", page)) == ["#a-heading", "nowhere.png"]
    assert sum(len(links(page)) for page in PAGES.values()) > 20


def test_the_first_page_is_one_that_one_reads():
    assert len(README.splitlines()) <= 150
    assert README.index("scripts/quickstart.sh") < README.index("scripts/test.sh") < README.index("## ")


def commands(script, page=README):
    """The words from the script on, of the lines that run it, by whatever program."""
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    found = [re.search(rf"^[^#]*\bscripts/({script}\w*\.py.*)", line) for line in lines]
    return [shlex.split(line[1], comments=True) for line in found if line]


@pytest.mark.parametrize("command", commands("benchmark", RESULTS), ids=lambda words: words[1])
def test_parts_of_the_benchmark_are_known(command, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "hardest", METHODS["InfoBatch"])
    assert benchmark.new_parser().parse_args(command[1:]).part == command[1]
    with pytest.raises(SystemExit):
        benchmark.new_parser().parse_args([*command[1:], "--unknown"])


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


@pytest.mark.parametrize("command", commands("run"), ids=lambda words: words[0])
def test_flags_are_known(command):
    script = importlib.import_module(Path(command[0]).stem)
    parse(command[1:], data_arguments(script), script.EMBEDDED)
    with pytest.raises(ValueError, match="Some specified arguments are not used"):
        parse([*command[1:], "--unknown", "1"], data_arguments(script), script.EMBEDDED)


@pytest.mark.parametrize("command", commands("run", SCRIPTS), ids=" ".join)
def test_flags_for_several_processes_are_known(command):
    """Their names: what they are set to needs the engines, and files."""
    script = importlib.import_module(Path(command[0]).stem)
    kinds = (ModelArguments, data_arguments(script), TrainingArguments, ImportanceConfig)
    known = {f"--{field.name}" for kind in kinds for field in fields(kind)}
    assert {word for word in command if word.startswith("--")} <= known
    assert "--unknown" not in known, "control"


def test_settings_are_those_of_the_config():
    table = METHOD.split("| setting | default |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, flags=re.MULTILINE))
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
    "short": ("steps", "accuracy", "error"),
    "decision": ("steps", "ours"),
    "whole": ("accuracy", "error"),
    "match": ("accuracy", "error"),
    "same": ("accuracy", "error"),
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


@pytest.mark.parametrize("name", ["accuracy.png", "savings.png"])
def test_plots_are_those_of_the_results(name):
    runs = runs_of("accuracy")
    assert Image.open(results.FOLDER / name).text["Source"] == results.digest(runs)
    assert results.digest(runs[1:]) != results.digest(runs), "control"


def test_the_picture_of_a_report_is_of_the_page_as_it_is():
    with Image.open(picture.PICTURE) as drawn:
        assert drawn.text["Source"] == picture.digest(), "run: python scripts/benchmark.py picture"
    assert f"](scripts/results/{picture.PICTURE.name})" in README
