"""The README files: code blocks run, links and flags exist, tables and plots match the results."""

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
import torch
from benchmarks import from_scratch, methods, pages, picture, results, rivals
from benchmarks.methods import METHODS
from benchmarks.tasks import Entry
from PIL import Image
from transformers import TrainingArguments

from hf_importance import ImportanceConfig, ImportanceTrainer
from hf_importance.run.reuse import write_importances

PAGES = {
    page.relative_to(pages.ROOT).as_posix(): page.read_text(encoding="utf-8")
    for folder in (".", "hf_importance", "hf_importance/report", "scripts", "scripts/results")
    for page in (pages.ROOT / folder).glob("README.md")
}
README, METHOD, SCRIPTS, RESULTS = (
    PAGES[f"{folder}README.md"] for folder in ("", "hf_importance/", "scripts/", "scripts/results/")
)


def blocks(language, page=README):
    """Code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_importances("outputs/run1", torch.arange(40.0), {"datasets": None, "columns": {}}, "logit_gradient")
    names = {
        "fold": [3, 5],
        "model": tiny.bert(),
        "training_args": tiny.arguments(tmp_path, max_steps=2),
        "train_dataset": tiny.texts(),
        "ImportanceTrainer": ImportanceTrainer,
    }
    code = blocks("python", METHOD)
    assert len(code) >= 4
    for block in code:
        missing = [name for name in ("trl", "sentence_transformers") if not find_spec(name)]  # TRL requires Python 3.11
        if any(f"from {name}" in block for name in missing):
            continue
        exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].per_example_loss_func is names["focal_loss"]
    assert names["known"][names["fold"]].tolist() == [3.0, 5.0]


@pytest.mark.parametrize(("sign", "name"), [("+", "ImportanceTrainer"), ("-", "Trainer")])
def test_both_sides_of_the_diff_train(tmp_path, sign, name):
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
        assert names["trainer"].importance_config.prune_mass == 0.1


def anchors(page):
    """Anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """Links of a page, except those to other sites."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", page) if not link.startswith("https://")]


def broken_links(name, page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (pages.ROOT / name).parent / path if path else pages.ROOT / name
        text = page if not path else target.read_text(encoding="utf-8") if target.suffix == ".md" else ""
        if not target.exists() or (anchor and anchor not in anchors(text)):
            yield link


@pytest.mark.parametrize("name", PAGES)
def test_links_are_not_broken(name):
    assert list(broken_links(name, PAGES[name])) == []


def test_control_broken_links_are_found():
    page = "# A heading, *so*\n[good](#a-heading-so) [bad](#a-heading) [none](nowhere.png) [there](LICENSE)"
    assert list(broken_links("README.md", page)) == ["#a-heading", "nowhere.png"]
    assert sum(len(links(page)) for page in PAGES.values()) > 20


def test_readme_is_short_and_begins_with_the_two_commands():
    assert len(README.splitlines()) <= 150
    assert README.index("scripts/quickstart.sh") < README.index("scripts/test.sh") < README.index("## ")


def commands(script, page=README):
    """Words of the lines that run a script, from the name of the script on."""
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    matches = [re.search(rf"^[^#]*\bscripts/({script}\w*\.py.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in matches if match]


@pytest.mark.parametrize("command", commands("benchmark", RESULTS), ids=lambda words: words[1])
def test_flags_of_the_benchmark_exist(command, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "hardest", METHODS["InfoBatch"])
    assert benchmark.new_parser().parse_args(command[1:]).part == command[1]
    with pytest.raises(SystemExit):
        benchmark.new_parser().parse_args([*command[1:], "--unknown"])


def test_instructions_for_a_new_method_and_a_new_task_work(tmp_path):
    method, task = blocks("python", RESULTS)
    names = {**vars(rivals), **vars(from_scratch)}
    exec(compile(method, "README.md", "exec"), names)
    exec(compile(task, "README.md", "exec"), names)
    for line in ("Method(rival=Hardest)", "Method(ImportanceConfig(uniform_fraction=0.5))"):
        assert line in RESULTS
        new_method = eval(line, {**vars(methods), **names})
        parity = names["parity_task"]()
        assert new_method.trainer(parity, 20, 1, str(tmp_path)).train().global_step == 20
    (entry,) = re.findall(r'"parity": (Entry\(.*?\)), ?`|"parity": (Entry\(.*?\))`', RESULTS)
    assert eval(entry[0] or entry[1], {"Entry": Entry, "from_scratch": SimpleNamespace(**names)}).embedded
    assert "hardest" not in METHODS, "premise: the page adds it"
    with pytest.raises(SystemExit):
        benchmark.new_parser().parse_args(["accuracy", "--methods", "hardest"])


def test_gpu_check_runs_parts_of_the_benchmark_that_exist():
    script = (pages.ROOT / "scripts/gpu_check.sh").read_text(encoding="utf-8")
    found = re.findall(r'^"\$VENV/bin/python" scripts/benchmark\.py (.+)', script, flags=re.MULTILINE)
    assert [words.split()[0] for words in found] == ["backward", "overhead"]
    for words in found:
        benchmark.new_parser().parse_args(shlex.split(words))


@pytest.mark.parametrize("command", commands("run"), ids=lambda words: words[0])
def test_flags_of_the_scripts_exist(command):
    script = importlib.import_module(Path(command[0]).stem)
    script.parse(command[1:])
    with pytest.raises(ValueError, match="Some specified arguments are not used"):
        script.parse([*command[1:], "--unknown", "1"])


@pytest.mark.parametrize("command", commands("run", SCRIPTS), ids=" ".join)
def test_flags_for_several_processes_exist(command):
    """Only the names of the flags: their values require files, and the packages of the engines."""
    script = importlib.import_module(Path(command[0]).stem)
    kinds = (script.ScriptArguments, TrainingArguments, ImportanceConfig)
    flags = {f"--{field.name}" for kind in kinds for field in fields(kind)}
    assert {word for word in command if word.startswith("--")} <= flags
    assert "--unknown" not in flags, "control: not every flag exists"


def test_table_of_settings_has_the_fields_and_defaults_of_the_config():
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
    "saved": ("steps", "seconds"),
    "minutes": ("seconds",),
    "headline": ("seconds",),
    "methods": ("seconds",),
    "trainings": ("seconds",),
    "decision": ("steps", "ours"),
    "whole": ("accuracy", "error"),
    "match": ("accuracy", "error"),
    "same": ("accuracy", "error"),
    "figures": ("accuracy", "error"),
    "backward": ("milliseconds",),
    "families": ("model",),
    "overhead": ("ratio",),
    "draws": ("batch_mean",),
    "label_errors": ("auroc_mean_loss",),
    "suspects": ("accuracy",),
    "grouping": ("accuracy",),
    "reuse": ("accuracy",),
}
"""For each table, figures of the runs that it shows."""


def changed(run, figures, factor):
    """The run with some figures multiplied by a factor."""
    return {name: factor * value if name in figures else value for name, value in run.items()}


def test_tables_match_the_results():
    texts = {page: (pages.ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES}
    marks = {page: re.findall(r"^<!-- (\w+) -->$", text, flags=re.MULTILINE) for page, text in texts.items()}
    assert {mark for names in marks.values() for mark in names} == set(pages.TABLES)
    for text in texts.values():
        assert pages.with_tables(text) == text, "run: python scripts/benchmark.py pages"
    for name, (parts, tables) in pages.TABLES.items():
        runs = [pages.runs_of(part) for part in parts]
        assert len(runs[0]) >= 4
        other = [[changed(run, FIGURES[name], 1 + i % 3) for i, run in enumerate(part)] for part in runs]
        for text in (text for page, text in texts.items() if name in marks[page]):
            assert tables(*runs) in text
            assert tables(*other) not in text, f"control: other runs, {name}"


@pytest.mark.parametrize(
    ("name", "parts"),
    [("accuracy.png", ["accuracy"]), ("savings.png", ["accuracy"]), ("seconds.png", ["fine_tuning", "networks"])],
)
def test_plots_match_the_results(name, parts):
    runs = [run for part in parts for run in pages.runs_of(part)]
    assert Image.open(results.FOLDER / name).text["Source"] == results.digest(runs)
    assert results.digest(runs[1:]) != results.digest(runs), "control: other runs"


def test_picture_of_a_report_matches_the_current_page():
    with Image.open(picture.PICTURE) as image:
        assert image.text["Source"] == picture.digest(), "run: python scripts/benchmark.py picture"
    assert f"](scripts/results/{picture.PICTURE.name})" in README
