"""Duplicate texts with different labels."""

import csv

import datasets
import pytest
import tiny
import torch
from PIL import Image
from report_data import NumberTokenizer, PartlyUnreadable, as_dataset, findings, page_of
from transformers import BertForMultipleChoice

from hf_importance.report.duplicates import conflicts
from hf_importance.report.findings import Findings
from hf_importance.report.page import write_report

TEXTS = ["Lost my card!", "lost  MY card", "How are you?", "lost my card.", "how are you", "only once", "", ""]
LABELS = torch.tensor([0.0, 1.0, 2.0, 0.0, 2.0, 1.0, 0.0, 1.0])

# ---- texts and tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "examples",
    [
        TEXTS,
        [{"text": text, "id": f"no {i}"} for i, text in enumerate(TEXTS)],
        as_dataset([{"text": text, "id": f"no {i}", "label": i} for i, text in enumerate(TEXTS)]),
        as_dataset([{"a": text[:4], "b": text[4:]} for text in TEXTS]).with_format("torch"),
    ],
    ids=["texts", "rows", "dataset", "two columns"],
)
def test_duplicate_texts_with_different_labels_are_found(examples):
    (found,) = conflicts(examples, LABELS)
    assert (found.index, found.labels) == ([0, 1, 3], [0.0, 1.0, 0.0])
    same = torch.where(torch.arange(8) == 1, 0.0, LABELS)
    assert conflicts(examples, same) == [], "control: equal labels"
    unknown = torch.where(torch.arange(8) == 1, torch.nan, LABELS)
    assert conflicts(examples, unknown) == []


def test_duplicate_tokens_with_different_labels_are_found():
    rows = [{"input_ids": ids} for ids in ([5, 6], [5, 7], [5, 6], [5])]
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for examples in (rows, as_dataset(rows), [{"input_ids": torch.tensor(row["input_ids"])} for row in rows]):
        (found,) = conflicts(examples, labels)
        assert found.index == [0, 2]


@pytest.mark.parametrize(
    "same", [("Hello, you!", "hello  YOU"), ("don't", "don t"), ("ﬁne", "FINE"), ("C#", "c#"), ("दिन।", "दिन")]
)
def test_texts_are_equal_after_normalisation(same):
    assert len(conflicts([*same, "other", "one more"], torch.tensor([0.0, 1.0, 0.0, 1.0]))) == 1


@pytest.mark.parametrize(
    "other",
    [
        ("C++", "C#"),
        ("C", "C#"),
        ("दिन", "दान"),
        ("great 😀", "great 😡"),
        ("a + b", "a b"),
        ("x" * 20_001, "x" * 20_002),
    ],
)
def test_texts_differ_after_normalisation(other):
    assert conflicts([*other, "other", "one more"], torch.tensor([0.0, 1.0, 0.0, 1.0])) == []


def test_multiple_choice_examples_are_shown_and_compared(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, tiny.WORDS, (3, 6), generator=g), "labels": i % 3} for i in range(16)]
    model = tiny.bert(cls=BertForMultipleChoice)
    for data in (rows, as_dataset([{**row, "input_ids": row["input_ids"].tolist()} for row in rows])):
        more = {"processing_class": NumberTokenizer()}
        trainer = tiny.trained(tmp_path, model, data, more=more, max_steps=4)
        assert "Hardest examples" in trainer.importance_report().read_text()
    duplicate = [rows[0], {**rows[0], "labels": 1}, *rows[2:]]
    (found,) = conflicts(duplicate, torch.tensor([float(row["labels"]) for row in duplicate]))
    assert found.index == [0, 1]


# ---- what is not compared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [list, as_dataset])
def test_columns_determined_by_the_label_are_ignored(make):
    rows = [{"text": t, "label_text": f"class {int(y)}", "split": "train"} for t, y in zip(TEXTS, LABELS, strict=True)]
    (found,) = conflicts(make(rows), LABELS)
    assert found.index == [0, 1, 3]
    assert found.text == TEXTS[0]
    constant = make([{"split": "train"} for _ in TEXTS])
    assert conflicts(constant, LABELS) == [], "constant columns are ignored, too"


def test_examples_with_images_are_not_compared():
    rows = {"image": [Image.new("L", (2, 2))] * 8, "caption": TEXTS}
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    assert conflicts(datasets.Dataset.from_dict(rows, features=features), LABELS) == []
    assert len(conflicts(as_dataset([{"caption": t} for t in TEXTS]), LABELS)) == 1, "control: captions alone"


def test_examples_computed_on_access_are_not_compared():
    transformed = as_dataset([{"text": t} for t in TEXTS])
    transformed.set_transform(lambda batch: pytest.fail("an example was computed"))
    assert conflicts(transformed, LABELS) == []
    assert conflicts(PartlyUnreadable(), LABELS[:4]) == []
    assert conflicts([{"pixel_values": torch.zeros(1), "text": "t"}] * 8, LABELS) == []


def test_errors_in_the_data_are_logged(caplog):
    class Unreadable(dict):
        def get(self, *_):
            raise RuntimeError("unreadable")

    assert conflicts([Unreadable(text=t) for t in TEXTS], LABELS) == []
    assert "The report does not list duplicate texts: RuntimeError: unreadable" in caplog.text


# ---- page and files --------------------------------------------------------------------------------------------------


def test_page_and_csv_file_list_duplicates(tmp_path):
    shown = [{"text": t} for t in ("Same, same", "same same!", "other", "=1")]
    page = page_of(write_report(tmp_path, findings(), shown, None, 3, "t"))
    assert "Duplicate texts with different labels" in page.text
    with (tmp_path / "conflicts.csv").open(encoding="utf-8", newline="") as file:
        assert next((row["index"], row["label"]) for row in csv.DictReader(file)) == ("0", "cat")
    other = page_of(write_report(tmp_path, findings(), [{"text": str(i)} for i in range(4)], None, 3, "t"))
    assert "Duplicate texts" not in other.text
    assert not (tmp_path / "conflicts.csv").exists(), "files of the earlier report are removed"


def test_page_shows_only_some_labels_of_a_large_group(tmp_path):
    n = 40
    c = {name: torch.zeros(n) for name in ("prediction", "probability", "loss", "mean_loss", "importance")}
    c |= {"label": torch.arange(n) + 0.0, "visits": torch.ones(n).int(), "pruned": torch.zeros(n) > 0}
    page = page_of(write_report(tmp_path, Findings(c), ["same", *["Same"] * (n - 2), "else"], None, 3, "t"))
    assert "and 29 more labels" in page.text
