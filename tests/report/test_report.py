"""The report and the model card of training runs."""

import re
import sys

import datasets
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from report_data import page_of


def table_of(page):
    return pq.read_table(page.parent / "examples.parquet").to_pydict()


# ---- report ----------------------------------------------------------------------------------------------------------


def test_report_and_summary_agree_with_the_training(tmp_path, caplog):
    rows = datasets.Dataset.from_list([{**row, "text": f"text {i}"} for i, row in enumerate(tiny.texts(24))])
    importance = {"prune_mass": 0.1, **tiny.FIXED}
    trainer = tiny.trained(tmp_path / "out", tiny.opinionated_bert(), rows, importance=importance)
    printed = [line for line in caplog.messages if line.startswith("Importance sampling: ")]
    assert printed == [trainer._findings().summary()]
    assert "72 visits of 24 examples" in printed[0]
    page = trainer.importance_report()
    assert page == tmp_path / "out" / "_importance_report" / "report.html"
    assert "text 3" in page_of(page).text
    assert re.search(r"measured \d\.\d+ → 1\.00, pruned", page_of(page).text), "the curve of measured examples"
    table = table_of(page)
    torch.testing.assert_close(torch.tensor(table["importance"]), trainer.importances)
    assert table["pruned"] == trainer._run.sampler.pruned.tolist()
    assert sum(table["visits"]) == 72
    assert table["label"] == [row["labels"] for row in rows]
    distributions = trainer._run.sampler.record.distributions
    assert len(distributions) == trainer._run.sampler.visits.passes - 1 >= 2, "one for each complete pass"


@pytest.mark.parametrize("other", [None, tiny.texts(40), tiny.texts(24)])
def test_report_is_on_the_data_of_the_training(tmp_path, other):
    """Also if users exchange `train_dataset` afterwards, for other data or to free its memory."""
    rows = [{**row, "text": f"text {i}"} for i, row in enumerate(tiny.texts(24))]
    trainer = tiny.trained(tmp_path / "out", tiny.opinionated_bert(), rows, num_train_epochs=1)
    before = trainer.importances
    trainer.train_dataset = other
    assert torch.equal(trainer.importances, before)
    assert "text 3" in page_of(trainer.importance_report()).text
    assert len(trainer.kept_indices) <= 24
    if other is not None:
        trainer.train()
        assert len(trainer.importances) == len(other)
        assert "text 3" not in page_of(trainer.importance_report()).text


@pytest.mark.parametrize("task", ["regression", "multi", "tokens", "images"])
def test_only_single_label_tasks_have_suspects(tmp_path, task):
    model, data = {
        "regression": lambda: (tiny.bert(num_labels=1), tiny.texts(16, "regression")),
        "multi": lambda: (tiny.bert(), tiny.texts(16, "multi")),
        "tokens": lambda: (tiny.token_bert(), tiny.token_rows(16)),
        "images": lambda: (tiny.vit(), tiny.images(16)),
    }[task]()
    more = {"data_collator": tiny.pad} if task == "tokens" else {}
    page = tiny.trained(tmp_path, model, data, more=more, max_steps=4).importance_report()
    assert ("Suspected label errors" in page_of(page).text) == (task == "images")
    assert (table_of(page)["suspect"] == [None] * 16) == (task != "images")


def test_wrong_labels_are_the_first_suspects(tmp_path):
    """Images of four classes that differ clearly; every tenth has a wrong label."""
    g = torch.Generator().manual_seed(0)
    classes = torch.randn(4, 1, 8, 8, generator=g)
    data = [
        {"pixel_values": classes[i % 4] + 0.3 * torch.randn(1, 8, 8, generator=g), "labels": i % 4} for i in range(80)
    ]
    wrong = list(range(0, 80, 10))
    for i in wrong:
        data[i]["labels"] = (data[i]["labels"] + 1) % 4
    trainer = tiny.trained(tmp_path, tiny.vit(), data, num_train_epochs=6)
    assert set(trainer._findings().most_suspect(8)) == set(wrong)
    assert len(trainer.suspects) < 16
    correct = [{**row, "labels": i % 4} for i, row in enumerate(data)]
    control = tiny.trained(tmp_path, tiny.vit(), correct, num_train_epochs=6)
    assert len(control.suspects) <= 2


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_importance_report_refuses_invalid_calls_and_uploaded_folders(tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    with pytest.raises(ValueError, match="must be called after train"):
        trainer.importance_report()
    trainer.train()
    with pytest.raises(ValueError, match="number must be an int of at least 1, but is 0"):
        trainer.importance_report(number=0)
    with pytest.raises(ValueError, match="examples must have the 40 items of train_dataset, but has 3"):
        trainer.importance_report(examples=[1, 2, 3])
    for inside in (tmp_path, tmp_path / "report"):
        with pytest.raises(ValueError, match="pushing to the Hub would upload it"):
            trainer.importance_report(inside)
    assert not (tmp_path / "report").exists()
    assert trainer.importance_report(tmp_path.parent / "outside" / "deep").exists()
    assert trainer.importance_report(tmp_path / "_private").exists()
    more = {"report_examples_to_hub": True}
    trainer = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), more=more, max_steps=1)
    assert trainer.importance_report(tmp_path / "report").exists()
    assert trainer.importance_report(tmp_path).exists()


def test_report_and_card_without_a_record(tmp_path, caplog):
    importance = {"record": False, **tiny.FIXED}
    trainer = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), importance=importance, max_steps=1)
    with pytest.raises(ValueError, match=r"requires ImportanceConfig\(record=True\)"):
        trainer.importance_report()
    assert "Importance sampling:" not in caplog.text
    trainer.create_model_card()
    assert "Importance sampling" not in (tmp_path / "README.md").read_text()


def test_report_and_card_without_the_extra_dependencies(tmp_path, monkeypatch):
    trainer = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    monkeypatch.setitem(sys.modules, "hf_importance.report.plots", None)
    with pytest.raises(ImportError, match=r"pip install jinja2 matplotlib"):
        trainer.importance_report()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "## Importance sampling" in card
    assert "![" not in card


# ---- model card ------------------------------------------------------------------------------------------------------


def test_repeated_model_cards_have_one_section(tmp_path):
    trainer = tiny.trained(tmp_path, tiny.bert(), tiny.texts())
    for _ in range(2):
        trainer.create_model_card(tags="mine")
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
