"""Text and label files as people have them: they train as expected, or stop with what came and how to mend it."""

import json

import datasets
import pytest
import run_image_classification
import run_language_modeling
import run_text_classification
from PIL import Image
from runs import flags, predictions

TEXTS = ["cold soup", "warm bread", "old fish", "good rice"] * 3
PLACES = ["here", "there", "away", "home"] * 3


def rows(labels, texts=TEXTS):
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]


def csv_of(*lines, header="text,label"):
    return "\n".join([header, *lines])


def jsonl(rows):
    return "\n".join(map(json.dumps, rows))


def train(tmp_path, content, suffix, *more, module=run_text_classification, **changes):
    """Train on a file with this content, and return the trainer."""
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return module.main([*flags(tmp_path, train_file=path, **changes), "--do_train", *more])


@pytest.fixture
def warnings(monkeypatch):
    """What the script for texts warns of, except for a missing model."""
    found = []
    monkeypatch.setattr("run_text_classification.logger.warning", found.append)
    yield found
    assert "--model_name_or_path is not set" in found[0], "control: the others would be found, too"
    del found[0]


# ---- read as people expect -------------------------------------------------------------------------------------------

NAMES = {
    "numbers as text": (jsonl(rows(["10", "9", "2"] * 4)), "jsonl", ["2", "9", "10"]),
    "numbers in csv": (csv_of(*[f"a,{n}" for n in (10, 9, 2)]), "csv", ["2", "9", "10"]),
    "numbers and names": (jsonl(rows([1, "none"] * 6)), "jsonl", ["1", "none"]),
    "true and false": (jsonl(rows([True, False] * 6)), "jsonl", ["False", "True"]),
    "blanks around": (jsonl(rows([" good", "good", "bad "] * 4)), "jsonl", ["bad", "good"]),
    "blank lines": (jsonl(rows("ab" * 6)).replace("\n", "\n\n") + "\n\n", "jsonl", ["a", "b"]),
    "BOM, suffix in capitals": ("\ufeff" + csv_of("a,x", "b,y"), "CSV", ["x", "y"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_labels(tmp_path, case, warnings):
    content, suffix, names = NAMES[case]
    trainer = train(tmp_path, content, suffix, max_steps=1)
    assert list(trainer.model.config.label2id) == names
    assert trainer.model.config.problem_type == "single_label_classification"
    assert warnings[1:] == []


def test_labels_that_differ_in_case_only_are_kept_with_a_warning(tmp_path, warnings):
    trainer = train(tmp_path, jsonl(rows(["Good", "good", "bad"] * 4)), "jsonl", max_steps=1)
    assert list(trainer.model.config.label2id) == ["Good", "bad", "good"]
    assert ["['Good', 'good'] in 'label' are learned as different labels" in text for text in warnings[1:]] == [True]


def decoded(trainer, index):
    ids = trainer.train_dataset[index]["input_ids"]
    return trainer.processing_class.decode(ids, skip_special_tokens=True).replace(" ##", "")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_missing_texts_are_read_as_empty(tmp_path, suffix, warnings):
    """Not as the word None. Other texts are read as they are written."""
    data = [{"text": TEXTS[i], "more": PLACES[i], "label": i % 2} for i in range(12)]
    data[1]["text"], data[2]["more"], data[3] = None, None, {**data[3], "text": "007", "more": "3.10"}
    if suffix == "csv":
        content = csv_of(*[f"{r['text'] or ''},{r['more'] or ''},{r['label']}" for r in data], header="text,more,label")
    else:
        content = jsonl(data)
    trainer = train(tmp_path, content, suffix, max_steps=1, text_column_names="text, more")
    assert [decoded(trainer, i) for i in range(3)] == ["cold soup here", "there", "old fish"]
    assert decoded(trainer, 3).replace(" ", "") == "0073.10"
    assert len(trainer.train_dataset) == 12
    for column in ("text", "more"):
        assert any(f"1 of 12 rows of the train data have no text in '{column}'" in text for text in warnings[1:])


def test_a_report_of_missing_texts(tmp_path):
    train(tmp_path, jsonl(rows("ab" * 6, [None, *TEXTS[1:]])), "jsonl", "--report")
    assert (tmp_path / "run" / "_importance_report" / "report.html").exists()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_one_column_per_label(tmp_path, suffix):
    data = [{"text": text, "rude": i % 2, "loud": int(i % 3 == 0)} for i, text in enumerate(TEXTS)]
    content = csv_of(*[",".join(map(str, row.values())) for row in data], header="text,rude,loud")
    test = tmp_path / "test.jsonl"  # without these columns
    test.write_text(jsonl([{"text": text} for text in TEXTS]))
    more = {"label_column_name": "rude,loud", "validation_file": tmp_path / f"train.{suffix}", "test_file": test}
    content = content if suffix == "csv" else jsonl(data)
    trainer = train(tmp_path, content, suffix, "--do_eval", "--do_predict", **more)
    assert trainer.model.config.problem_type == "multi_label_classification"
    assert trainer.model.config.label2id == {"rude": 0, "loud": 1}
    expected = [[float(row["rude"]), float(row["loud"])] for row in data]
    assert trainer.train_dataset["labels"][:] == trainer.eval_dataset["labels"][:] == expected
    assert len(predictions(tmp_path)) == 12


def test_whole_floats_are_asked_for(tmp_path):
    content = csv_of(*[f"{text},{i % 2}.0" for i, text in enumerate(TEXTS)])
    for suffix, data in (("csv", content), ("jsonl", jsonl(rows([0.0, 1.0] * 6)))):
        with pytest.raises(
            ValueError, match=r"whole numbers, written as floats, .*\[0.0, 1.0\].*--do_regression false"
        ):
            train(tmp_path, data, suffix)
    classes = train(tmp_path, content, "csv", do_regression="false", max_steps=1).model.config
    assert (classes.problem_type, list(classes.label2id)) == ("single_label_classification", ["0.0", "1.0"])
    assert train(tmp_path, content, "csv", "--do_regression", max_steps=1).train_dataset["labels"][:2] == [0.0, 1.0]
    halves = train(tmp_path, content.replace("1.0", "1.5"), "csv", max_steps=1)
    assert halves.model.config.problem_type == "regression", "control: other floats"


def test_files_of_different_formats(tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(jsonl(rows([1, 2])))
    content = csv_of(*[f"{text},{1 + i % 2}" for i, text in enumerate(TEXTS)])
    trainer = train(tmp_path, content, "csv", "--do_eval", validation_file=test)
    assert trainer.eval_dataset["labels"][:] == [0, 1]


def test_numbers_are_ids_only_of_models_without_numbers_as_names(tmp_path):
    """0 is no class of a model with the classes 1 and 2; for one with the names bad and good, it is bad."""
    test = tmp_path / "test.csv"
    test.write_text(csv_of("soup,0", "rice,1"))
    train(tmp_path, jsonl(rows(["bad", "good"] * 6)), "jsonl")
    saved = {"model_name_or_path": tmp_path / "run", "validation_file": test}
    evaluated = run_text_classification.main([*flags(tmp_path, **saved), "--do_eval"])
    assert evaluated.eval_dataset["labels"][:] == [0, 1]
    train(tmp_path, jsonl(rows([1, 2] * 6)), "jsonl")
    with pytest.raises(ValueError, match=r"by number of rows {'0': 1}; those of the model are \['1', '2'\]"):
        run_text_classification.main([*flags(tmp_path, **saved), "--do_eval"])


# ---- stopped with the fix --------------------------------------------------------------------------------------------

PLAIN = csv_of(*[f"{text},{'ab'[i % 2]}" for i, text in enumerate(TEXTS)])
STOPPED = {
    "latin-1": (PLAIN.replace("soup", "caf\xe9").encode("latin-1"), "csv", "decode byte 0xe9 .*: convert it to UTF-8"),
    "latin-1 in json": ('{"text": "caf\xe9"}'.encode("latin-1"), "json", "convert it to UTF-8"),
    "utf-16": (PLAIN.encode("utf-16"), "csv", "convert it to UTF-8"),
    "semicolons": (PLAIN.replace(",", ";"), "csv", "delimiter seems to be ';': separate the fields with commas"),
    "semicolons, commas": (PLAIN.replace(",", ";").replace(" ", ", "), "csv", "delimiter seems to be ';'"),
    "no header": (PLAIN.split("\n", 1)[1], "csv", r"has \['cold soup', 'a'\]: .* or write the names of the columns"),
    "header only": ("text,label\n", "csv", "no rows below the first line"),
    "blanks only": (" \n\n", "json", "must contain examples, but .* is empty"),
    "two columns of one name": (PLAIN.replace("text", "label", 1), "csv", "several columns are named 'label': rename"),
    "commas in texts": (PLAIN.replace(" ", ","), "csv", "more fields than the first line: put quotes around"),
    "a comma in a text": (
        PLAIN + "\na,b,c",
        "csv",
        "Expected 2 fields .*, saw 3: put quotes around fields with commas",
    ),
    "rows below a key": (json.dumps({"version": 1, "data": rows("ab")}), "json", "only the rows .* the list 'data'"),
    "lists of columns": (
        json.dumps({"text": TEXTS, "label": TEXTS}),
        "json",
        r"'text' .* has \['cold soup', .*per row",
    ),
    "texts in lists": (jsonl(rows("ab", [["a"], ["b"]])), "jsonl", r"must contain texts, but has \['a'\]: write one"),
    "mixed texts": (jsonl(rows("ab", ["a", {"b": 1}])), "jsonl", "must contain texts, but has {'b': 1}"),
    "no texts": (jsonl(rows("ab", [None, None])), "jsonl", "'text' of the train data has no texts: name other columns"),
    "labels missing": (PLAIN + "\na,\nb,NA", "csv", "2 of 14 rows .* no label in 'label': remove these rows. .* NA,"),
    "blank labels": (jsonl(rows(["a", "b", " "])), "jsonl", "1 of 3 rows of the train data have no label"),
    "numbers missing": (jsonl(rows([0.5, None, 1.5])), "jsonl", "1 of 3 rows of the train data have no label"),
    "not a number": ('{"text": "a", "label": NaN}\n{"text": "b", "label": 0.5}', "json", "1 of 2 rows .* no label"),
    "infinite": (csv_of("a,1.5", "b,inf"), "csv", "Labels must be finite numbers for a regression, but one is 'inf'"),
    "dicts": (
        jsonl(rows([{"name": "a"}, {"name": "b"}])),
        "jsonl",
        "has {'name': 'a'}: a label must be a name or a num",
    ),
    "lists and names": (jsonl(rows([["a"], "b"])), "jsonl", r"has \['a'\]: a label must be .* in every row a list"),
    "lists of dicts": (jsonl(rows([[{"a": 1}], []])), "jsonl", r"has \[{'a': 1}\]: a label must be"),
    "ones and zeros": (jsonl(rows([[0, 1, 0], [1, 0, 0]])), "jsonl", r"has \[0, 1, 0\]: .* columns of 0 and 1 as --la"),
    "one and zero": (jsonl(rows([[0, 1], [1, 0]])), "jsonl", r"All rows .* have the label \['0', '1'\]"),
    "lists as text": (
        csv_of("a,\"['x', 'y']\"", "b,\"['y']\""),
        "csv",
        "a list of the names that apply, in a json or p",
    ),
    "one class": (jsonl(rows(["a", "a "])), "jsonl", r"All rows of the train data \(2\) have the label \['a'\]"),
}


@pytest.mark.parametrize("case", STOPPED)
def test_what_cannot_be_read_is_an_error_with_the_fix(tmp_path, case):
    content, suffix, message = STOPPED[case]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, content, suffix)


def test_control_the_plain_file_trains(tmp_path):
    assert list(train(tmp_path, PLAIN, "csv", max_steps=1).model.config.label2id) == ["a", "b"]


INVALID_FLAGS = {
    "not 0 or 1": (
        {"label_column_name": "text,label"},
        "'text' of the train data must be 0 or 1, .* but is 'cold soup'",
    ),
    "unknown of several": ({"label_column_name": "label,kind"}, "must have a column 'kind'"),
    "numbers wanted": ({"do_regression": True}, "Labels must be finite numbers for a regression, but one is 'a'"),
    "no validation header": ({"validation_file": "headless"}, r"The eval data must have a column .*\['soup', 'a'\]"),
}


@pytest.mark.parametrize("case", INVALID_FLAGS)
def test_flags_that_do_not_fit_the_file(tmp_path, case):
    changes, message = INVALID_FLAGS[case]
    more = []
    if "validation_file" in changes:
        (tmp_path / "test.csv").write_text("soup,a\nrice,b\n")
        changes, more = {"validation_file": tmp_path / "test.csv"}, ["--do_eval"]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, PLAIN, "csv", *more, **changes)


def test_regression_of_lists_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--do_regression needs a number in 'label', which has lists"):
        train(tmp_path, jsonl(rows([["a"], ["b", "a"]])), "jsonl", "--do_regression")


# ---- images and language models --------------------------------------------------------------------------------------


def test_paths_and_labels_of_images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    good = [f"{tmp_path}/{'ab'[i % 2]}.png,{(10, 9, 2)[i % 3]}" for i in range(12)]
    image = {"module": run_image_classification, "image_size": 8, "patch_size": 4}
    trainer = train(tmp_path, csv_of(*good, header="image,label"), "csv", max_steps=1, **image)
    assert list(trainer.model.config.label2id) == ["2", "9", "10"]
    for row, message in {
        f"{tmp_path}/c.png,2": "'image' of the train data must contain images or paths of images, but has '.*c.png'",
        ",2": "must contain images or paths of images, but has None",
        f"{tmp_path}/a.png,": "1 of 13 rows of the train data have no label",
    }.items():
        with pytest.raises(ValueError, match=message):
            train(tmp_path, csv_of(*good, row, header="image,label"), "csv", **image)


def test_missing_images_and_lists_of_labels(tmp_path):
    picture, path = Image.new("L", (8, 8)), tmp_path / "train.parquet"
    image = {"train_file": path, "image_size": 8, "patch_size": 4}
    for images, labels, message in (
        ([picture, None], ["a", "b"], "must contain images or paths of images, but has None"),
        (
            [picture, picture],
            [["a"], ["b"]],
            r"'label' of the train data has \['a'\]: a label must be a name or a whole",
        ),
    ):
        kind = datasets.List(datasets.Value("string")) if isinstance(labels[0], list) else datasets.Value("string")
        features = datasets.Features(image=datasets.Image(), label=kind)
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)
        with pytest.raises(ValueError, match=message):
            run_image_classification.main([*flags(tmp_path, **image), "--do_train"])


def test_texts_of_language_models_are_as_they_are_written(tmp_path, tiny_config):
    content = csv_of("7 + 0 =, 007", "3 + .1 =, 3.10", header="prompt,completion")
    trainer = train(tmp_path, content, "csv", module=run_language_modeling, max_steps=1, **tiny_config)
    ids = trainer.train_dataset["input_ids"][:]
    assert trainer.processing_class.batch_decode(ids, skip_special_tokens=True) == ["7 + 0 = 007", "3 + .1 = 3.10"]
    content += "\na,\nb,None"
    with pytest.raises(
        ValueError, match=r"2 of 4 rows .* no text in the column 'completion', the first .* row 2: .* NA"
    ):
        train(tmp_path, content, "csv", module=run_language_modeling, **tiny_config)
