"""How a report shows examples of any kind: images, texts, tokens, duplicates; and examples that cannot be shown."""

import csv
import io
import logging

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from pages import findings, page_of
from PIL import Image
from transformers import BertForMultipleChoice, PrinterCallback, ProgressCallback, T5Config, T5ForConditionalGeneration

from hf_importance.report.duplicates import conflicts
from hf_importance.report.examples import picture_of, text_of
from hf_importance.report.findings import Findings
from hf_importance.report.logs import CONSOLE
from hf_importance.report.page import write_report, write_table
from hf_importance.report.texts import readable
from hf_importance.report.tokens import token_losses


class Numbers:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids, skip_special_tokens=False):
        return "+".join(map(str, ids))


# ---- pictures --------------------------------------------------------------------------------------------------------


def ramp(mode, high):
    """8 × 8 pixels from dark to bright."""
    values = np.linspace(0, high, 64).reshape(8, 8)
    kinds = {"1": bool, "L": np.uint8, "I;16": np.uint16, "I": np.int32, "F": np.float32}
    return Image.fromarray(values.astype(kinds[mode]))


@pytest.mark.parametrize(
    ("mode", "high"), [("1", 1), ("L", 255), ("I;16", 65535), ("I;16", 300), ("I", 100_000), ("F", 1.0), ("F", 255.0)]
)
def test_pictures_of_any_depth_go_from_black_to_white(mode, high):
    picture = picture_of({"image": ramp(mode, high)})
    assert picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBa", "LA", "La", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_pictures_of_any_mode_are_shown(mode):
    picture = Image.new("RGBA", (300, 200), (200, 30, 30, 255))
    picture = picture.convert({"La": "LA", "RGBa": "RGBA", "PA": "P", "LAB": "RGB"}.get(mode, mode))
    picture = picture.convert(mode) if mode in ("La", "RGBa", "PA") else picture
    shown = picture_of({"image": picture})
    assert (shown.mode, shown.size) == ("RGB", (160, 107))
    red, green, _ = np.asarray(shown)[50, 50]
    assert red > green or mode in ("LA", "La")


def test_what_is_transparent_is_white():
    for picture in (Image.new("RGBA", (9, 9), (10, 10, 10, 0)), Image.new("LA", (9, 9), (10, 0))):
        assert np.asarray(picture_of(picture)).min() == 255
    palette = Image.new("P", (9, 9))
    palette.info["transparency"] = 0
    assert np.asarray(picture_of(palette)).min() == 255
    assert np.asarray(picture_of(Image.new("RGBA", (9, 9), (10, 10, 10, 255)))).max() == 10, "control"


@pytest.mark.parametrize(
    "values",
    [
        torch.rand(3, 8, 8).bfloat16(),
        torch.rand(3, 8, 8, requires_grad=True),
        torch.rand(4, 8, 8),
        torch.rand(8, 8),
        torch.rand(5, 3, 8, 8),
        torch.rand(8, 8, 3).tolist(),
        np.random.default_rng(0).integers(0, 255, (3, 8, 8)),
    ],
    ids=["bf16", "wants gradients", "four channels", "two dimensions", "film", "lists", "integers"],
)
def test_pixel_values_of_any_kind(values):
    picture = picture_of({"pixel_values": values, "labels": 1})
    assert picture.size == (8, 8)
    assert np.asarray(picture).max() > 240


def test_pixel_values_that_are_no_numbers():
    values = torch.rand(3, 8, 8)
    values[0, 0], values[1, 1] = torch.nan, torch.inf
    assert picture_of({"pixel_values": values}).size == (8, 8)
    assert picture_of({"pixel_values": torch.full((3, 8, 8), torch.nan)}).size == (8, 8)
    assert picture_of({"pixel_values": torch.zeros(3, 0, 8)}) is None


class Broken:
    """A dataset with some unreadable examples."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            return {"image": Image.open(io.BytesIO(b"no picture at all"))}
        if index == 2:
            whole = io.BytesIO()
            Image.new("RGB", (50, 50), "red").save(whole, "PNG")
            return {"image": Image.open(io.BytesIO(whole.getvalue()[:80]))}
        return {"image": None, "text": "seen"} if index else {"image": Image.new("RGB", (9, 9))}


def test_some_have_pictures_some_have_texts_and_some_cannot_be_shown(tmp_path):
    page = page_of(write_report(tmp_path, findings(), Broken(), None, 9, "t"))
    assert [a["alt"] for tag, a in page.tags if tag == "img" and a["alt"].startswith("Training")] == [
        "Training example 0, labelled cat, predicted cat"
    ]
    assert page.text.count("(cannot be shown: UnidentifiedImageError") == 2, "suspect and hard"
    assert page.text.count("(cannot be shown: OSError") == 1 or "(cannot be shown: SyntaxError" in page.text
    with Image.open(tmp_path / "hardest.png") as sheet:
        assert sheet.width > 500
    with (tmp_path / "hardest.csv").open(encoding="utf-8", newline="") as file:
        assert [row["index"] for row in csv.DictReader(file)] == ["1", "2"]


def test_the_page_stays_small(tmp_path):
    """Noise compresses worst."""
    noise = np.random.default_rng(0).integers(0, 255, (4, 400, 400, 3), dtype=np.uint8)
    columns = {name: column.repeat(8) for name, column in findings().columns.items() if name != "suspect"}
    many = findings(**columns | {"mean_loss": torch.full((32,), 2.0), "importance": torch.rand(32)})
    shown = [{"image": Image.fromarray(noise[i % 4])} for i in range(32)]
    page = write_report(tmp_path, many, shown, None, 24, "t")
    assert page.read_text().count("data:image/jpeg") == 48
    assert page.stat().st_size < 5e6


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_tokens_are_decoded_though_there_are_names_beside_them():
    example = {"id": "train-17", "input_ids": torch.tensor([5, 6]), "labels": 1}
    assert text_of(example, Numbers()) == "5+6"
    assert text_of(example, None) == "train-17", "without a tokenizer it is all that there is"


def test_long_and_odd_texts():
    assert len(text_of("x" * 10**7, None)) == 500
    long = {"input_ids": list(range(10**6))}
    assert len(text_of(long, Numbers())) == 500
    assert readable("a\ud83db") == "a�b"
    assert readable("\ud83d\ude00") == "😀", "the two halves of one sign"
    assert readable("tab\tline\n\x00") == "tab\tline\n�"


def test_tokens_of_several_texts_are_decoded_one_by_one():
    assert text_of({"input_ids": [[5, 6], [7]]}, Numbers()) == "5+6\n7"
    assert text_of({"input_ids": torch.tensor([[5, 6], [7, 8]])}, Numbers()) == "5+6\n7+8"


@pytest.mark.parametrize(
    "names",
    [["a", "b"], {"0": "a", "1": "b"}, {0: "a", 1: "b"}, {0: "a", 1: "lone \ud83d"}, {0: "a", 1: "b", "neg": 0}],
)
def test_names_of_classes(tmp_path, names):
    found = Findings({n: c for n, c in findings().columns.items() if n != "suspect"}, label_names=names)
    assert found.name_of(0.0) == "a"
    page = write_report(tmp_path, found, [{"text": "lone surrogate \ud83d"}] * 4, None, 3, "t")
    assert "lone surrogate �" in page.read_text(encoding="utf-8")
    table = pq.read_table(tmp_path / "examples.parquet").to_pydict()
    assert table["label_name"][:2] == ["a", found.name_of(1.0)]


def test_no_cell_is_a_formula(tmp_path):
    texts = ['=HYPERLINK("http://example.invalid")', "+1+1", "-2+3", "@sum", "\t=1", "\n =1", "a=1", "-0.5"]
    c = {name: torch.zeros(8) for name in ("label", "prediction", "probability", "loss", "mean_loss")}
    c |= {"importance": torch.arange(8, 0, -1.0), "visits": torch.ones(8).int(), "pruned": torch.zeros(8) > 0}
    write_report(tmp_path, Findings(c, label_names=["-x"]), [{"text": t} for t in texts], None, 8, "t")
    with (tmp_path / "hardest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows[-2:]] == ["a=1", "-0.5"], "what is harmless stays"
    for row, text in zip(rows[:-2], texts, strict=False):
        assert row["text"].startswith("'"), text
    assert rows[0]["label"] == "'-x"


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_by_class_by_hand():
    (other, cat) = findings().by_class()
    assert (cat.name, cat.examples, cat.suspects, cat.share_of_visits) == ("cat", 1, 0, 1 / 20)
    assert (other.examples, other.suspects) == (2, 1)
    assert other.importance == pytest.approx((1.2 + 0.5) / 2)
    assert other.mean_loss == pytest.approx((1.2 + 0.4) / 2)
    assert other.share_of_visits == pytest.approx(19 / 20)
    assert findings().confused_pairs(5) == [(other.name, "cat", 1)]
    nothing = findings(probability=torch.full((4,), torch.nan))
    assert nothing.by_class() == []


def test_by_class_is_what_a_loop_finds():
    g = torch.Generator().manual_seed(0)
    n = 500
    c = {name: torch.rand(n, generator=g) for name in ("loss", "probability", "importance")}
    c |= {name: torch.randint(0, 5, (n,), generator=g).float() for name in ("label", "prediction")}
    c |= {"mean_loss": 3 * torch.rand(n, generator=g), "visits": torch.randint(0, 9, (n,), generator=g).int()}
    c["importance"][::7] = torch.nan
    found = Findings({**c, "pruned": torch.zeros(n) > 0})
    rows = {row.name: row for row in found.by_class()}
    assert [row.suspects for row in found.by_class()] == sorted((row.suspects for row in rows.values()), reverse=True)
    for k in range(5):
        of = c["label"] == k
        row, suspect = rows[str(k)], found.columns["suspect"] & of
        assert (row.examples, row.suspects) == (int(of.sum()), int(suspect.sum()))
        assert row.importance == pytest.approx(c["importance"][of].nanmean().item())
        assert row.share_of_visits == pytest.approx(c["visits"][of].sum().item() / c["visits"].sum().item())
    pairs = {}
    for label, prediction, suspect in zip(c["label"], c["prediction"], found.columns["suspect"], strict=True):
        if suspect and label != prediction:
            pair = str(int(label)), str(int(prediction))
            pairs[pair] = pairs.get(pair, 0) + 1
    assert {(a, b): count for a, b, count in found.confused_pairs(99)} == pairs
    assert found.confused_pairs(1)[0][2] == max(pairs.values())


def test_names_are_looked_up_once_per_class(tmp_path, monkeypatch):
    """So that a table of any length takes little time."""
    looked = []
    monkeypatch.setattr(Findings, "name_of", lambda self, number: looked.append(number) or f"class {number:g}")
    n = 3000
    c = {name: torch.rand(n) for name in ("loss", "probability", "mean_loss", "importance")}
    c |= {"label": torch.arange(n) % 7 + 0.0, "prediction": torch.arange(n) % 5 + 0.0}
    c |= {"visits": torch.ones(n).int(), "pruned": torch.zeros(n) > 0}
    write_table(Findings(c, label_names={0: "x"}), tmp_path / "t.parquet")
    assert len(looked) == 7 + 5
    assert pq.read_table(tmp_path / "t.parquet").to_pydict()["label_name"][:8] == [f"class {i % 7}" for i in range(8)]


# ---- equal texts -----------------------------------------------------------------------------------------------------

TEXTS = ["Lost my card!", "lost  MY card", "How are you?", "lost my card.", "how are you", "only once", "", ""]
LABELS = torch.tensor([0.0, 1.0, 2.0, 0.0, 2.0, 1.0, 0.0, 1.0])


def as_dataset(rows):
    return datasets.Dataset.from_list(rows)


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
def test_equal_texts_with_different_labels(examples):
    (found,) = conflicts(examples, LABELS)
    assert (found.index, found.labels) == ([0, 1, 3], [0.0, 1.0, 0.0])
    same = torch.where(torch.arange(8) == 1, 0.0, LABELS)
    assert conflicts(examples, same) == [], "control: no labels differ"
    unknown = torch.where(torch.arange(8) == 1, torch.nan, LABELS)
    assert conflicts(examples, unknown) == []


def test_equal_tokens_with_different_labels():
    rows = [{"input_ids": ids} for ids in ([5, 6], [5, 7], [5, 6], [5])]
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for examples in (rows, as_dataset(rows), [{"input_ids": torch.tensor(row["input_ids"])} for row in rows]):
        (found,) = conflicts(examples, labels)
        assert found.index == [0, 2]


@pytest.mark.parametrize(
    "same", [("Hello, you!", "hello  YOU"), ("don't", "don t"), ("ﬁne", "FINE"), ("C#", "c#"), ("दिन।", "दिन")]
)
def test_texts_that_are_equal(same):
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
def test_texts_that_are_not_equal(other):
    assert conflicts([*other, "other", "one more"], torch.tensor([0.0, 1.0, 0.0, 1.0])) == []


@pytest.mark.parametrize("make", [list, as_dataset])
def test_columns_that_the_label_decides_say_nothing(make):
    rows = [{"text": t, "label_text": f"class {int(y)}", "split": "train"} for t, y in zip(TEXTS, LABELS, strict=True)]
    (found,) = conflicts(make(rows), LABELS)
    assert found.index == [0, 1, 3]
    assert found.text == TEXTS[0]
    nothing = make([{"split": "train"} for _ in TEXTS])
    assert conflicts(nothing, LABELS) == [], "a column that is the same for all is no text"


def test_pictures_with_captions_are_not_compared():
    rows = {"image": [Image.new("L", (2, 2))] * 8, "caption": TEXTS}
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    assert conflicts(datasets.Dataset.from_dict(rows, features=features), LABELS) == []
    assert len(conflicts(as_dataset([{"caption": t} for t in TEXTS]), LABELS)) == 1, "control"


def test_what_goes_wrong_costs_the_list_and_not_the_report(tmp_path, caplog):
    class Odd(dict):
        def get(self, *_):
            raise RuntimeError("no such thing")

    assert conflicts([Odd(text=t) for t in TEXTS], LABELS) == []
    assert "The report does not list duplicate texts: RuntimeError: no such thing" in caplog.text


def test_report_of_a_multiple_choice(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, tiny.WORDS, (3, 6), generator=g), "labels": i % 3} for i in range(16)]
    model = tiny.bert(cls=BertForMultipleChoice)
    for data in (rows, as_dataset([{**row, "input_ids": row["input_ids"].tolist()} for row in rows])):
        more = {"processing_class": Numbers()}
        run = tiny.trained(tmp_path, model, data, more=more, max_steps=4)
        assert "Hardest examples" in run.importance_report().read_text()
    twice = [rows[0], {**rows[0], "labels": 1}, *rows[2:]]
    (found,) = conflicts(twice, torch.tensor([float(row["labels"]) for row in twice]))
    assert found.index == [0, 1]


def test_the_page_shows_some_labels_of_a_group(tmp_path):
    n = 40
    c = {name: torch.zeros(n) for name in ("prediction", "probability", "loss", "mean_loss", "importance")}
    c |= {"label": torch.arange(n) + 0.0, "visits": torch.ones(n).int(), "pruned": torch.zeros(n) > 0}
    page = page_of(write_report(tmp_path, Findings(c), ["same", *["Same"] * (n - 2), "else"], None, 3, "t"))
    assert "and 29 more labels" in page.text


def test_what_is_not_stored_is_not_compared():
    transformed = as_dataset([{"text": t} for t in TEXTS])
    transformed.set_transform(lambda batch: pytest.fail("it was asked for"))
    assert conflicts(transformed, LABELS) == []
    assert conflicts(Broken(), LABELS[:4]) == []
    assert conflicts([{"pixel_values": torch.zeros(1), "text": "t"}] * 8, LABELS) == []


def test_they_are_on_the_page_and_in_a_file(tmp_path):
    shown = [{"text": t} for t in ("Same, same", "same same!", "other", "=1")]
    page = page_of(write_report(tmp_path, findings(), shown, None, 3, "t"))
    assert "Duplicate texts with different labels" in page.text
    with (tmp_path / "conflicts.csv").open(encoding="utf-8", newline="") as file:
        assert next((row["index"], row["label"]) for row in csv.DictReader(file)) == ("0", "cat")
    other = page_of(write_report(tmp_path, findings(), [{"text": str(i)} for i in range(4)], None, 3, "t"))
    assert "Duplicate texts" not in other.text
    assert not (tmp_path / "conflicts.csv").exists(), "an earlier report leaves nothing behind"


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifts", [False, True])
def test_losses_of_tokens(shifts):
    model, rows = tiny.token_bert(), tiny.token_rows(6)
    model.train()
    found = token_losses(model, rows, tiny.pad, lambda batch: batch, Numbers(), shifts, [4, 2])
    assert model.training
    assert list(found) == [4, 2]
    for i, tokens in found.items():
        ids, labels = rows[i]["input_ids"], rows[i]["labels"]
        logits = model.eval()(input_ids=ids[None]).logits[0].detach()
        wanted = []
        for t, y in enumerate(labels):
            has = y != -100 and t >= shifts
            wanted.append(torch.nn.functional.cross_entropy(logits[t - shifts], y).item() if has else -1.0)
        assert [-1.0 if token.loss is None else token.loss for token in tokens] == pytest.approx(wanted, rel=1e-4)
        assert max(token.share for token in tokens) == 1.0
        assert "".join(token.text for token in tokens) == Numbers().decode(ids.tolist())
        model.train()


def test_what_an_encoder_decoder_writes_has_other_tokens():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([8, 9, 1])}]
    pad = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 9, 1]])}
    pad["decoder_input_ids"] = torch.tensor([[0, 8, 9]])  # as the collator makes them
    assert token_losses(model, rows, lambda _: dict(pad), lambda batch: batch, Numbers(), False, [0]) == {}


def test_they_are_on_the_page_of_a_training(tmp_path, caplog):
    more = {"data_collator": tiny.pad, "processing_class": Numbers()}
    run = tiny.trained(tmp_path, tiny.token_bert(), tiny.token_rows(16), more=more, max_steps=4)
    page = page_of(run.importance_report())
    heats = [a["style"] for tag, a in page.tags if tag == "span" and a.get("class") == "token"]
    assert "--heat:100%" in heats
    assert "The redder a token" in page.text
    hidden = run.importance_report(examples=["(hidden)"] * 16).read_text()
    assert 'class="token"' not in hidden, "what is shown is what was given"
    run.model.forward = lambda **_: 1 / 0
    assert 'class="token"' not in run.importance_report().read_text()
    assert "The report does not show token losses: ZeroDivisionError" in caplog.text
    texts = tiny.trained(tmp_path, tiny.bert(), tiny.texts(16), more={"processing_class": Numbers()}, max_steps=4)
    assert 'class="token"' not in texts.importance_report().read_text(), "control: one label per text"


# ---- what the console shows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", [True, False])
def test_the_console_shows_two_of_our_figures(tmp_path, capsys, bar):
    class Mine(PrinterCallback):
        pass

    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(), disable_tqdm=not bar)
    kinds = [type(callback) for callback in run.callback_handler.callbacks]
    assert any(issubclass(kind, ProgressCallback) for kind in kinds) == bar
    run.train()
    printed = capsys.readouterr().out
    logged = {name for log in run.state.log_history for name in log if name.startswith("importance/")}
    assert len(logged) == 7
    assert {name for name in logged if f"'{name}'" in printed} == set(CONSOLE)
    run = tiny.trainer(tmp_path, tiny.opinionated_bert(), tiny.texts(), more={"callbacks": [Mine()]})
    run.train()
    assert "'importance/seen'" in capsys.readouterr().out, "what users wrote themselves gets all of it"


def test_what_is_said_is_seen_and_can_be_silenced(tmp_path, capsys, caplog):
    told, root = logging.getLogger("hf_importance.told"), logging.getLogger()
    handlers, root.handlers = root.handlers, []  # as in a program that sets up no logging
    try:
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
        assert "Importance sampling: 8 visits of 40 examples" in capsys.readouterr().out
        told.setLevel(logging.WARNING)
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
        assert "Importance sampling" not in capsys.readouterr().out
    finally:
        root.handlers = handlers
        told.setLevel(logging.INFO)
    tiny.trained(tmp_path, tiny.bert(), tiny.texts(), max_steps=1)
    assert "Importance sampling: 8 visits" in caplog.text, "where logging is set up it goes there"
    assert "Importance sampling: 8 visits" not in capsys.readouterr().out
