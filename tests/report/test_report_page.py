"""The files of the report: page, tables and plots."""

import csv

import pyarrow.parquet as pq
import pytest
import torch
from report_data import HOSTILE, findings, page_of

from hf_importance.report.examples import png_url
from hf_importance.report.findings import Findings
from hf_importance.report.page import write_report
from hf_importance.report.plots import THEMES, plots
from hf_importance.sampling.record import Distribution

# ---- page ------------------------------------------------------------------------------------------------------------


def test_page_escapes_texts_and_is_self_contained(tmp_path):
    page = page_of(
        write_report(tmp_path / "r", findings(), [{"text": f"{HOSTILE} {i}"} for i in range(4)], None, 9, HOSTILE)
    )
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object"}
    assert f"{HOSTILE} 1" in page.text, "the text of the suspect, unchanged"
    assert page.text.count(HOSTILE) >= 5, "titles, labels, texts"
    images = [attributes for tag, attributes in page.tags if tag in ("img", "source")]
    assert len(images) == 2 * len(plots(findings()))
    for attributes in images:
        assert attributes.get("src", attributes.get("srcset")).startswith("data:image/png;base64,")
    for tag, attributes in page.tags:
        assert tag != "img" or len(attributes["alt"]) > 20
        assert not any(name.startswith("on") for name in attributes)
        assert "http" not in attributes.get("src", "") + attributes.get("href", "")
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert ("html", {"lang": "en"}) in page.tags


@pytest.mark.parametrize(
    "names",
    [["a", "b"], {"0": "a", "1": "b"}, {0: "a", 1: "b"}, {0: "a", 1: "lone \ud83d"}, {0: "a", 1: "b", "neg": 0}],
)
def test_label_names_in_any_form_are_shown(tmp_path, names):
    found = Findings({n: c for n, c in findings().columns.items() if n != "suspect"}, label_names=names)
    assert found.name_of(0.0) == "a"
    page = write_report(tmp_path, found, [{"text": "lone surrogate \ud83d"}] * 4, None, 3, "t")
    assert "lone surrogate �" in page.read_text(encoding="utf-8")
    table = pq.read_table(tmp_path / "examples.parquet").to_pydict()
    assert table["label_name"][:2] == ["a", found.name_of(1.0)]


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
    write_report(tmp_path, Findings(c, label_names=["-x"]), [{"text": t} for t in texts], None, 8, "t")
    with (tmp_path / "hardest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows[-2:]] == ["a=1", "-0.5"], "control: texts and numbers are unchanged"
    for row, text in zip(rows[:-2], texts, strict=False):
        assert row["text"].startswith("'"), text
    assert rows[0]["label"] == "'-x"


# ---- plots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", THEMES)
def test_plots_are_drawn_and_described_in_each_theme(theme):
    found = findings()
    visits = torch.linspace(0, 2, 101)
    found.distributions = [
        Distribution(1.0, torch.linspace(0.5, 1, 101), torch.ones(101)),
        Distribution(2.0, torch.full((101,), torch.nan), visits),
    ]
    drawn = {plot.name: plot for plot in plots(found)}
    assert list(drawn) == ["importances", "spread", "gain", "visits"], "no coverage: it was not logged"
    for plot in drawn.values():
        assert plot.png(theme).startswith(b"\x89PNG")
    assert "variance ratio 0.90 → 0.70" in drawn["gain"].text
    assert "from 1 to 16 visits" in drawn["visits"].text
    assert "had 10% of them in the first pass and 19% in the last" in drawn["spread"].text
    assert "The median was 0.75 after 1.0 visits per example and 0.5 after 5.0" in drawn["importances"].text


def test_plot_files_equal_the_light_plots_of_the_page(tmp_path):
    page = page_of(write_report(tmp_path, findings(), [{"text": "t"}] * 4, None, 1, "t"))
    shown = {tag: [a.get("src", a.get("srcset")) for name, a in page.tags if name == tag] for tag in ("img", "source")}
    files = [png_url((tmp_path / f"{plot.name}.png").read_bytes()) for plot in plots(findings())]
    assert files == shown["img"]
    assert set(files).isdisjoint(shown["source"]), "control: the dark plots differ"
