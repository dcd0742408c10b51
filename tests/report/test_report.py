"""The report: figures by hand, files read back, and the parsed page."""

import csv
import math
import sys

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from pages import HOSTILE, findings, page_of
from PIL import Image

from hf_importance.record import Distribution, suspects
from hf_importance.report.examples import png_url
from hf_importance.report.page import write_report
from hf_importance.report.plots import THEMES, plots

# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    found = findings()
    assert found.visits == 20
    assert found.share_with_most_visits == 2 / 4, "16 and 3 of 20 visits are more than 90 %; 16 alone are not"
    assert (found.measured_share, found.pruned) == (3 / 4, 1 / 4)
    assert found.columns["suspect"].tolist() == [False, True, False, False]
    assert found.most_suspect(3) == [1]
    assert found.hardest(2) == [1, 2]
    assert found.hardest(9) == [1, 2, 0], "the unknown one is not among them"
    assert found.logged("variance_ratio") == ([5, 10], [0.9, 0.7])
    assert found.mean_logged("variance_ratio") == pytest.approx(0.8)
    assert found.mean_logged("seen") is None
    assert found.figures()["suspected label errors"] == "1 (25.0%)"
    assert found.summary() == (
        "Importance sampling: 20 visits of 4 examples, 90 % of them on 50% of the examples, "
        "second moment of the gradient 0.80 times that of uniform sampling, at most 25% pruned."
    )
    found.history.append({"step": 15, "importance/pruned": 0.5})
    assert found.pruned == 0.5, "they came back since"
    assert found.figures()["examples pruned"] == "up to 50.0%"


def test_nothing_is_said_of_pruning_where_none_was():
    found = findings(pruned=torch.zeros(4, dtype=torch.bool))
    assert "examples pruned" not in found.figures()
    assert "pruned" not in found.summary()


def test_busy_of_equal_visits():
    equal = findings(visits=torch.full((4,), 5, dtype=torch.int32))
    assert equal.share_with_most_visits == 1.0, "three of four have 75 %"
    assert findings(visits=torch.zeros(4, dtype=torch.int32)).share_with_most_visits == 0.0


# ---- files -----------------------------------------------------------------------------------------------------------


def test_page_is_safe_and_stands_alone(tmp_path):
    page = page_of(
        write_report(tmp_path / "r", findings(), [{"text": f"{HOSTILE} {i}"} for i in range(4)], None, 9, HOSTILE)
    )
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object"}
    assert f"{HOSTILE} 1" in page.text, "the text of the suspect one, as it is"
    assert page.text.count(HOSTILE) >= 5, "titles, labels, texts"
    pictures = [attributes for tag, attributes in page.tags if tag in ("img", "source")]
    assert len(pictures) == 2 * len(plots(findings()))
    for attributes in pictures:
        assert attributes.get("src", attributes.get("srcset")).startswith("data:image/png;base64,")
    for tag, attributes in page.tags:
        assert tag != "img" or len(attributes["alt"]) > 20
        assert not any(name.startswith("on") for name in attributes)
        assert "http" not in attributes.get("src", "") + attributes.get("href", "")
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert ("html", {"lang": "en"}) in page.tags


def test_plots_in_files_are_those_of_the_light_page(tmp_path):
    page = page_of(write_report(tmp_path, findings(), [{"text": "t"}] * 4, None, 1, "t"))
    shown = {tag: [a.get("src", a.get("srcset")) for name, a in page.tags if name == tag] for tag in ("img", "source")}
    files = [png_url((tmp_path / f"{plot.name}.png").read_bytes()) for plot in plots(findings())]
    assert files == shown["img"]
    assert set(files).isdisjoint(shown["source"]), "control: the dark ones"


def test_table_of_all_examples(tmp_path):
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


def test_pictures_become_contact_sheets(tmp_path):
    shades = [{"image": Image.new("L", (300, 200), 60 * i)} for i in range(4)]
    page = page_of(write_report(tmp_path, findings(), shades, None, 9, "t"))
    assert "Training example 1, labelled " + HOSTILE + ", predicted cat" in [a.get("alt") for _, a in page.tags]
    with Image.open(tmp_path / "hardest.png") as sheet:
        assert sheet.width > 500
    assert not (tmp_path / "hardest.csv").exists()
    write_report(tmp_path, findings(), [{"text": "t"}] * 4, None, 9, "t")
    assert not (tmp_path / "hardest.png").exists(), "an earlier report leaves nothing behind"


@pytest.mark.parametrize("shape", [(3, 6, 4), (1, 6, 4), (6, 4, 3)])
def test_pixel_values_become_pictures(shape):
    from hf_importance.report.examples import picture_of

    values = torch.linspace(-2, 3, math.prod(shape)).view(shape)
    picture = picture_of({"pixel_values": values, "labels": 1})
    assert picture.size == (4, 6)
    pixels = np.asarray(picture)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert picture_of({"input_ids": [1, 2]}) is None


@pytest.mark.parametrize(
    ("example", "text"),
    [
        ("plain", "plain"),
        ({"text": "one", "label": 3}, "one"),
        ({"question": "why", "context": "so"}, "question: why\ncontext: so"),
        ({"input_ids": [5, 6]}, "5+6"),
        ({"values": [1.0]}, ""),
        (7, ""),
        ({"text": "x" * 900}, "x" * 499 + "…"),
    ],
)
def test_texts(example, text):
    from hf_importance.report.examples import text_of

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "+".join(map(str, ids))

    assert text_of(example, Tokenizer()) == text


@pytest.mark.parametrize("theme", THEMES)
def test_plots_are_drawn_for_both_pages(theme):
    found = findings()
    visits = torch.linspace(0, 2, 101)
    found.distributions = [
        Distribution(1.0, torch.linspace(0.5, 1, 101), torch.ones(101)),
        Distribution(2.0, torch.full((101,), torch.nan), visits),
    ]
    drawn = {plot.name: plot for plot in plots(found)}
    assert list(drawn) == ["importances", "spread", "gain", "visits"], "nothing was logged of what was seen and pruned"
    for plot in drawn.values():
        assert plot.png(theme).startswith(b"\x89PNG")
    assert "variance ratio 0.90 → 0.70" in drawn["gain"].text
    assert "from 1 to 16 visits" in drawn["visits"].text
    assert "had 10% of them in the first pass and 19% in the last" in drawn["spread"].text
    assert "The median was 0.75 after 1.0 visits per example and 0.5 after 5.0" in drawn["importances"].text


# ---- of real trainings -----------------------------------------------------------------------------------------------


def test_report_of_a_training(tmp_path, caplog):
    rows = datasets.Dataset.from_list([{**row, "text": f"text {i}"} for i, row in enumerate(tiny.texts(24))])
    a = tiny.trainer(tmp_path / "out", tiny.opinionated_bert(), rows, importance={"prune_mass": 0.1, **tiny.FIXED})
    a.train()
    printed = [line for line in caplog.messages if line.startswith("Importance sampling: ")]
    assert printed == [a._findings().summary()]
    assert "72 visits of 24 examples" in printed[0]
    page = a.importance_report()
    assert page == tmp_path / "out" / "_importance_report" / "report.html"
    assert "text 3" in page_of(page).text
    table = pq.read_table(page.parent / "examples.parquet").to_pydict()
    torch.testing.assert_close(torch.tensor(table["importance"]), a.importances)
    assert table["pruned"] == a._sampler.pruned.tolist()
    assert sum(table["visits"]) == 72
    assert table["label"] == [row["labels"] for row in rows]
    assert len(a._sampler.record.distributions) == a._sampler.visits.passes - 1 >= 2, "one for each pass that is over"


@pytest.mark.parametrize("task", ["regression", "multi", "tokens", "images"])
def test_report_of_other_tasks(tmp_path, task):
    model, data = {
        "regression": lambda: (tiny.bert(num_labels=1), tiny.texts(16, "regression")),
        "multi": lambda: (tiny.bert(), tiny.texts(16, "multi")),
        "tokens": lambda: (tiny.token_bert(), tiny.token_rows(16)),
        "images": lambda: (tiny.vit(), tiny.images(16)),
    }[task]()
    more = {"data_collator": tiny.pad} if task == "tokens" else {}
    a = tiny.trained(tmp_path, model, data, more=more, max_steps=4)
    page = page_of(a.importance_report())
    assert ("Suspected label errors" in page.text) == (task == "images")
    suspect = pq.read_table(tmp_path / "_importance_report/examples.parquet").to_pydict()["suspect"]
    assert (suspect == [None] * 16) == (task != "images")


def test_wrong_labels_are_found(tmp_path):
    """Images of four classes that differ clearly; every tenth has a wrong label."""
    g = torch.Generator().manual_seed(0)
    classes = torch.randn(4, 1, 8, 8, generator=g)
    data = [
        {"pixel_values": classes[i % 4] + 0.3 * torch.randn(1, 8, 8, generator=g), "labels": i % 4} for i in range(80)
    ]
    wrong = list(range(0, 80, 10))
    for i in wrong:
        data[i]["labels"] = (data[i]["labels"] + 1) % 4
    a = tiny.trained(tmp_path, tiny.vit(), data, num_train_epochs=6)
    found = a._findings()
    assert set(found.most_suspect(8)) == set(wrong)
    assert suspects(found.columns).sum() < 16
    clean = [{**row, "labels": i % 4} for i, row in enumerate(data)]
    control = tiny.trained(tmp_path, tiny.vit(), clean, num_train_epochs=6)
    assert suspects(control._findings().columns).sum() <= 2


def test_what_is_refused(tmp_path):
    a = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    with pytest.raises(ValueError, match="must be called after train"):
        a.importance_report()
    a.train()
    with pytest.raises(ValueError, match="number must be an int of at least 1, but is 0"):
        a.importance_report(number=0)
    with pytest.raises(ValueError, match="examples must have the 40 items of train_dataset, but has 3"):
        a.importance_report(examples=[1, 2, 3])
    for inside in (tmp_path, tmp_path / "report"):
        with pytest.raises(ValueError, match="pushing to the Hub would upload it"):
            a.importance_report(inside)
    assert not (tmp_path / "report").exists()
    assert a.importance_report(tmp_path.parent / "outside" / "deep").exists()
    assert a.importance_report(tmp_path / "_private").exists()
    more = {"report_examples_to_hub": True}
    a = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more=more, max_steps=1)
    assert a.importance_report(tmp_path / "report").exists()
    assert a.importance_report(tmp_path).exists()


def test_without_record(tmp_path, caplog):
    a = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), importance={"record": False, **tiny.FIXED}, max_steps=1)
    with pytest.raises(ValueError, match=r"requires ImportanceConfig\(record=True\)"):
        a.importance_report()
    assert "Importance sampling:" not in caplog.text
    a.create_model_card()
    assert "Importance sampling" not in (tmp_path / "README.md").read_text()


def test_without_what_draws_it(tmp_path, monkeypatch):
    a = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    monkeypatch.setitem(sys.modules, "hf_importance.report.page", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_importance\[report\]'"):
        a.importance_report()
    a.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "## Importance sampling" in card
    assert "![" not in card


def test_card_is_made_anew_each_time(tmp_path):
    a = tiny.trained(tmp_path, tiny.bert(), tiny.texts())
    for _ in range(2):
        a.create_model_card(tags="mine")
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Importance sampling") == 1
    assert card.count("- hf_importance") == 1
    assert "- mine" in card
    assert sorted(path.name for path in (tmp_path / "importance_report").iterdir()) == [
        "coverage.png",
        "gain.png",
        "importances.csv",
        "importances.png",
        "spread.png",
        "visits.png",
    ]


def test_tensorboard_shows_it(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    a = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    names = {log for logs in a.state.log_history for log in logs if log.startswith("importance/")}
    assert len(names) == 7
    for name in names:
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        logged = {log["step"]: log[name] for log in a.state.log_history if name in log}
        assert written == pytest.approx(logged, rel=1e-6)
        assert len(written) == 3
