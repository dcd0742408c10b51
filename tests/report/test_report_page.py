"""The files of the report: page, tables and plots."""

import csv
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from report_data import HOSTILE, findings, page_of

from hf_importance.report.findings import Findings
from hf_importance.report.page import validate_report, write_report
from hf_importance.report.pictures import data_url
from hf_importance.report.plots import plots
from hf_importance.sampling.record import Distribution

# ---- page ------------------------------------------------------------------------------------------------------------


def test_page_escapes_texts_and_is_self_contained(tmp_path):
    page = page_of(
        write_report(tmp_path / "r", findings(), [{"text": f"{HOSTILE} {i}"} for i in range(4)], None, 9, HOSTILE)
    )
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object"}
    assert f"{HOSTILE} 1" in page.text, "the text of the suspect, unchanged"
    assert page.text.count(HOSTILE) >= 5, "titles, labels, texts"
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(plots(findings()))
    for attributes in images:
        assert attributes["src"].startswith("data:image/png;base64,")
    for tag, attributes in page.tags:
        assert tag != "img" or len(attributes["alt"]) > 20
        assert not any(name.startswith("on") for name in attributes)
        assert "http" not in attributes.get("src", "") + attributes.get("href", "")
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert ("html", {"lang": "en"}) in page.tags


@pytest.mark.parametrize(
    "names",
    [{"0": "a", "1": "b"}, {0: "a", 1: "b"}, {0: "a", 1: "lone \ud83d"}, {0: "a", 1: "b", "neg": 0}],
)
def test_label_names_in_any_form_are_shown(tmp_path, names):
    found = Findings({n: c for n, c in findings().columns.items() if n != "suspect"}, label_names=names)
    assert found.name_of(0.0) == "a"
    page = write_report(tmp_path, found, [{"text": "lone surrogate \ud83d"}] * 4, None, 3, "t")
    assert "lone surrogate �" in page.read_text(encoding="utf-8")
    table = pq.read_table(tmp_path / "examples.parquet").to_pydict()
    assert table["label_name"][:2] == ["a", found.name_of(1.0)]


# ---- arguments ------------------------------------------------------------------------------------------------------


def valid_arguments(model, **changes):
    arguments = {"training": SimpleNamespace(has_record=True, examples=4), "folder": model / "_report"}
    arguments |= {"examples": ["t"] * 4, "number": 3, "model_folder": model, "examples_to_hub": False}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": None}, "must be called after train"),
        ({"training": SimpleNamespace(has_record=False)}, r"requires ImportanceConfig\(record=True\)"),
        ({"number": 0}, "number must be an int of at least 1, but is 0"),
        ({"number": True}, "number must be an int of at least 1, but is True"),
        ({"examples": ["t"] * 3}, "examples must have the 4 items of train_dataset, but has 3"),
    ],
)
def test_invalid_arguments_of_a_report(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        validate_report(**valid_arguments(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [(".", False), ("report", False), ("a/_b", False), ("_a/b", True), ("checkpoint-3", True), ("../outside", True)],
)
def test_folders_that_are_uploaded_are_refused(tmp_path, name, allowed):
    validate_report(**valid_arguments(tmp_path, folder=tmp_path / name, examples_to_hub=True))
    refused = nullcontext() if allowed else pytest.raises(ValueError, match="pushing to the Hub would upload it")
    with refused:
        validate_report(**valid_arguments(tmp_path, folder=tmp_path / name))


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_table_has_all_examples(tmp_path):
    write_report(tmp_path, findings(), [{"text": "t"}] * 4, None, 1, "t")
    table = pq.read_table(tmp_path / "examples.parquet").to_pydict()
    assert table["index"] == [0, 1, 2, 3]
    assert table["label"] == [0, 1, 1, None]
    assert table["prediction"] == [0, 0, 1, None]
    assert table["label_name"] == ["cat", HOSTILE, HOSTILE, None]
    assert table["prediction_name"] == ["cat", "cat", HOSTILE, None]
    assert table["probability"] == pytest.approx([0.9, 0.8, 0.6, None])
    assert table["loss"] == pytest.approx([0.1, 1.6, 0.5, None])
    assert table["mean_loss"] == pytest.approx([0.2, 1.2, 0.4, None])
    assert table["importance"] == pytest.approx([0.1, 1.2, 0.5, None])
    assert table["visits"] == [1, 16, 3, 0]
    assert table["pruned"] == [True, False, False, False]
    assert table["suspect"] == [False, True, False, False]
    with (tmp_path / "suspects.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["index"], row["label"], row["prediction"], row["text"]) == ("1", HOSTILE, "cat", "t")


def test_formulas_in_csv_cells_are_escaped(tmp_path):
    texts = ['=HYPERLINK("http://example.invalid")', "+1+1", "-2+3", "@sum", "\t=1", "\n =1", "a=1", "-0.5"]
    c = {name: torch.zeros(8) for name in ("label", "prediction", "probability", "loss", "mean_loss")}
    c |= {"importance": torch.arange(8, 0, -1.0), "visits": torch.ones(8).int(), "pruned": torch.zeros(8) > 0}
    write_report(tmp_path, Findings(c, label_names={0: "-x"}), [{"text": t} for t in texts], None, 8, "t")
    with (tmp_path / "hardest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows[-2:]] == ["a=1", "-0.5"], "control: texts and numbers are unchanged"
    for row, text in zip(rows[:-2], texts, strict=False):
        assert row["text"].startswith("'"), text
    assert rows[0]["label"] == "'-x"


# ---- plots -----------------------------------------------------------------------------------------------------------


def test_plots_are_drawn_and_described():
    found = findings()
    visits = torch.linspace(0, 2, 101)
    found.distributions = [
        Distribution(1.0, torch.linspace(0.5, 1, 101), torch.ones(101)),
        Distribution(2.0, torch.full((101,), torch.nan), visits),
    ]
    drawn = {plot.name: plot for plot in plots(found)}
    assert list(drawn) == ["importances", "spread", "gain", "visits"], "no coverage: it was not logged"
    for plot in drawn.values():
        assert plot.png().startswith(b"\x89PNG")
    assert "variance ratio 0.90 → 0.70" in drawn["gain"].text
    assert "from 1 to 16 visits" in drawn["visits"].text
    assert "had 10% of them in the first pass and 19% in the last" in drawn["spread"].text
    assert "The median was 0.75 after 1.0 visits per example and 0.5 after 5.0" in drawn["importances"].text


def test_plot_files_equal_the_plots_of_the_page(tmp_path):
    page = page_of(write_report(tmp_path, findings(), [{"text": "t"}] * 4, None, 1, "t"))
    files = [data_url((tmp_path / f"{plot.name}.png").read_bytes()) for plot in plots(findings())]
    assert files == [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(set(files)) == len(files), "control: plots differ"
