"""Fine-tune a text model for classification, with one or several labels, or for regression.

    python scripts/run_text_classification.py
    python scripts/run_text_classification.py --model_name_or_path bert-base-uncased --do_train --do_eval \
        --train_file train.csv --validation_file test.csv --text_column_names text --label_column_name category

Without arguments, it trains a small BERT from scratch to classify docstrings by package; nothing is downloaded.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import re
import reprlib
import sys
import sysconfig
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_type_hints

import datasets
import evaluate
import numpy as np
import pandas
import torch
import transformers
from datasets.exceptions import DatasetsError
from pandas.errors import ParserError
from pyarrow import ArrowInvalid
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg, HfArgumentParser

from hf_importance import ImportanceConfig, ImportanceTrainer, PushError

Datasets = dict[str, datasets.Dataset]
logger = transformers.utils.logging.get_logger(__name__)

EMBEDDED = (
    "--run_name docstrings --do_train --do_eval --eval_strategy epoch --save_strategy no --logging_steps 50 "
    "--num_train_epochs 5 --per_device_train_batch_size 32 --per_device_eval_batch_size 128 --max_seq_length 32 "
    "--learning_rate 0.001 --weight_decay 0.01 --warmup_steps 0.05"
)
"""Flags without data of your own, which other flags override."""

# ---- flags -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ScriptArguments:
    """Flags of the model, the data and the report."""

    trainer: Literal["importance", "uniform"] = HfArg(default="importance", help="ImportanceTrainer, or plain Trainer.")
    model_name_or_path: str | None = HfArg(default=None, help="Model, on the Hub or a folder. Default: a new one.")
    config_name: str | None = HfArg(default=None, help="Config, on the Hub or a folder. Default: that of the model.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, on the Hub or a folder. Default: of the model.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model.")
    ignore_mismatched_sizes: bool = HfArg(default=False, help="Replace a head that has other labels than the data.")
    trust_remote_code: bool = HfArg(default=False, help="Run code from the repository of the model.")
    token: str | None = HfArg(default=None, help="Access token of the Hub. Default: that of `hf auth login`.")
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads from the Hub.")

    importance_config: str | None = HfArg(default=None, help="An importance_config.json, on the Hub or a folder.")
    report: bool = HfArg(default=False, help="Write a report of the training data: hard examples, wrong labels, plots.")
    report_examples_to_hub: bool = HfArg(default=False, help="Upload it, with training examples, by --push_to_hub.")

    dataset_name: str | None = HfArg(default=None, help="Dataset, on the Hub or a folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration (subset) of the dataset.")
    train_split_name: str | None = HfArg(default=None, help="Split to train on. Default: train.")
    validation_split_name: str | None = HfArg(default=None, help="Split to evaluate on. Default: validation, or test.")
    test_split_name: str | None = HfArg(default=None, help="Split to predict. Default: test.")
    train_file: str | None = HfArg(default=None, help="Training data: a csv, json, jsonl or parquet file.")
    validation_file: str | None = HfArg(default=None, help="Evaluation data, as --train_file.")
    test_file: str | None = HfArg(default=None, help="Data for --do_predict, as --train_file.")
    max_train_samples: int | None = HfArg(default=None, help="Maximum number of training examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Maximum number of evaluation examples.")
    max_predict_samples: int | None = HfArg(default=None, help="Maximum number of examples to predict.")
    shuffle_train_dataset: bool = HfArg(default=False, help="Shuffle the data before --max_train_samples is applied.")
    shuffle_seed: int = HfArg(default=42, help="Seed of --shuffle_train_dataset.")

    text_column_names: str | None = HfArg(default=None, help="Columns, by commas. Default: text or sentence.")
    text_column_delimiter: str = HfArg(default=" ", help="Separator to join the texts of several columns with.")
    label_column_name: str | None = HfArg(default=None, help="Column of the labels, or several of 0 and 1, by commas.")
    do_regression: bool = HfArg(default=None, help="Predict numbers (regression). Default: if the labels are floats.")
    metric_name: str | None = HfArg(default=None, help="Metric of `evaluate`. Default: accuracy, F1; of numbers, MSE.")
    max_seq_length: int = HfArg(default=128, help="Maximum length of a text in tokens; longer texts are truncated.")
    pad_to_max_length: bool = HfArg(default=False, help="Pad to --max_seq_length, not to the longest text of a batch.")


ImportanceFlags = dataclasses.make_dataclass(
    "ImportanceFlags",
    [
        (field.name, get_type_hints(ImportanceConfig)[field.name], HfArg(default=field.default, **field.metadata))
        for field in dataclasses.fields(ImportanceConfig)
        if field.name != "seed"  # it is --data_seed or --seed
    ],
)


def uses_embedded_data(arguments: ScriptArguments) -> bool:
    files = (arguments.train_file, arguments.validation_file, arguments.test_file)
    return arguments.dataset_name is None and not any(files)


def parse(argv: list[str] | None = None) -> tuple[ScriptArguments, TrainingArguments, ImportanceConfig]:
    """Parse flags, by default those of the command line. Raises a ValueError if they are invalid or contradictory."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        (ScriptArguments, TrainingArguments, ImportanceFlags),
        allow_abbrev=False,
        epilog=f"Without data of your own, embedded data are used, with the defaults {EMBEDDED}",
    )
    parser.set_defaults(report_to=["none"], dataloader_pin_memory=torch.accelerator.is_available())
    sources, _ = parser.parse_known_args(argv)  # where the defaults of the other flags come from
    if uses_embedded_data(sources):
        argv = [*EMBEDDED.split(), *argv]
    config = ImportanceConfig()
    if sources.importance_config is not None:
        hub = {"cache_dir": sources.cache_dir, "token": sources.token}
        config = ImportanceConfig.from_pretrained(sources.importance_config, **hub)
        parser.set_defaults(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ImportanceFlags)})
    arguments, training, importance_flags = parser.parse_args_into_dataclasses(argv)
    importance = dataclasses.replace(config, **dataclasses.asdict(importance_flags))

    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("Nothing to do: pass --do_train, --do_eval or --do_predict.")
    if arguments.report and not (training.do_train and arguments.trainer == "importance" and importance.record):
        raise ValueError("--report needs --do_train, --trainer importance and --record: pass them, or remove --report.")
    if training.do_train and not (
        arguments.model_name_or_path or arguments.config_name or uses_embedded_data(arguments)
    ):
        logger.warning("--model_name_or_path is not set: a small new model is trained from scratch.")
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = f"outputs/docstrings-{arguments.trainer}"
    return arguments, training, importance


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> Trainer:
    """Run with these flags, by default those of the command line, and return the trainer."""
    arguments, training, importance = parse(argv)
    transformers.logging.set_verbosity(training.get_process_log_level())
    transformers.set_seed(training.seed)

    splits = docstrings() if uses_embedded_data(arguments) else load(arguments)
    data = choose_splits(splits, arguments, training)
    names = [None] if arguments.text_column_names is None else re.split(r" *, *", arguments.text_column_names)
    for use, rows in data.items():
        text_columns = [find_column(rows, use, name, ("text", "sentence"), "--text_column_names") for name in names]
        validate_texts(rows, use, text_columns)
    data = join_label_columns(data, arguments)
    label_column = find_label_column(data, arguments)
    data = drop_missing_labels(data, label_column)
    problem_type = find_problem_type(data, label_column, arguments)

    def texts_of(batch: Any) -> list[str]:
        rows = zip(*(batch[column] for column in text_columns), strict=True)
        join = arguments.text_column_delimiter.join
        return [join(str(text) for text in row if not is_missing(text)) for row in rows]

    tokenizer = load_tokenizer(arguments, texts_of(data["train"]) if training.do_train else None)
    head = {}  # without training, the labels are those of the saved model
    if training.do_train:
        head = head_settings(data["train"], label_column, problem_type)
    config = load_config(arguments, tokenizer, head)
    model = load_model(arguments, config)
    problem_type = config.problem_type or problem_type
    if problem_type != "regression":
        validate_known_labels(data, label_column, config.label2id)

    def tokenize(batch: Any, feature: Any) -> dict[str, list[Any]]:
        padding = "max_length" if arguments.pad_to_max_length else False
        inputs = tokenizer(texts_of(batch), truncation=True, max_length=arguments.max_seq_length, padding=padding)
        if feature is not None:
            inputs["labels"] = [target(label, feature, problem_type, config.label2id) for label in batch[label_column]]
        return dict(inputs)

    inputs = {}
    for use, rows in data.items():
        feature = {"feature": rows.features.get(label_column)}
        columns = {"remove_columns": rows.column_names, "desc": f"Tokenizing ({use})"}
        inputs[use] = rows.map(tokenize, batched=True, fn_kwargs=feature, **columns)

    metric = None if arguments.metric_name is None else evaluate.load(arguments.metric_name)
    settings = {
        "model": model,
        "args": training,
        "train_dataset": inputs.get("train"),
        "eval_dataset": inputs.get("eval"),
        "processing_class": tokenizer,
        "data_collator": transformers.DataCollatorWithPadding(tokenizer),
        "compute_metrics": functools.partial(compute_metrics, problem_type=problem_type, metric=metric),
    }
    if arguments.trainer == "importance":
        upload = arguments.report_examples_to_hub
        trainer = ImportanceTrainer(importance=importance, report_examples_to_hub=upload, **settings)
    else:
        trainer = Trainer(**settings)
        trainer.loss_is_scaled_for_ga = False  # else accumulation multiplies the gradient (transformers issue 47688)

    if training.do_train:
        train(trainer, arguments)
    if training.do_eval:
        save_metrics(trainer, "eval", trainer.evaluate())
    if training.do_predict:
        output = trainer.predict(inputs["predict"], metric_key_prefix="predict")
        save_metrics(trainer, "predict", output.metrics)
        save_predictions(trainer, predictions_of(output.predictions, problem_type, config.id2label))
    publish(trainer, arguments, data["train"].select_columns(text_columns) if training.do_train else None)
    return trainer


# ---- data ------------------------------------------------------------------------------------------------------------

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load(arguments: ScriptArguments) -> Datasets:
    """Load the data files or the dataset, with splits named train, validation and test."""
    splits = ("train", "validation", "test")
    files = {split: getattr(arguments, f"{split}_file") for split in splits}
    files = {split: path for split, path in files.items() if path is not None}
    if files:
        return load_files(files, arguments.cache_dir)
    name, hub = arguments.dataset_name, {"cache_dir": arguments.cache_dir, "token": arguments.token}
    try:
        dataset = datasets.load_dataset(name, arguments.dataset_config_name, **hub)
    except OSError as error:
        raise ValueError(
            f"--dataset_name must be on the Hub or a folder, but {name!r} could not be loaded: {error}"
        ) from error
    names = {split: getattr(arguments, f"{split}_split_name") or split for split in splits}
    return {split: dataset[name] for split, name in names.items() if name in dataset}


def load_files(files: dict[str, str], cache_dir: str | None) -> Datasets:
    """Load a file for each split, which may differ in their formats and further columns."""
    for split, path in files.items():
        if Path(path).suffix.lower() not in FORMATS:
            raise ValueError(f"--{split}_file must be a csv, json, jsonl or parquet file, but is {path!r}: convert it.")
        if not Path(path).is_file():
            raise ValueError(f"--{split}_file must be a file, but {path!r} does not exist: check the path.")
        with Path(path).open("rb") as file:
            if not any(line.strip() for line in file):
                raise ValueError(f"--{split}_file must contain examples, but {path!r} is empty.")
    return {split: load_file(split, path, cache_dir) for split, path in files.items()}


def load_file(split: str, path: str, cache_dir: str | None) -> datasets.Dataset:
    file_format = FORMATS[Path(path).suffix.lower()]
    try:
        if file_format != "parquet":
            with Path(path).open(encoding="utf-8") as file:
                for _ in file:  # raises a UnicodeDecodeError, which pyarrow does not
                    pass
        features = csv_features(path) if file_format == "csv" else None
        settings = {"data_files": {split: path}, "split": split, "cache_dir": cache_dir, "features": features}
        return datasets.load_dataset(file_format, **settings)
    except (DatasetsError, ArrowInvalid, ValueError) as error:
        cause = error.__cause__ or error
        fixes = {UnicodeDecodeError: ": convert it to UTF-8", ParserError: ": put quotes around fields with commas"}
        reason = f"could not be read: {str(cause).strip()}{fixes.get(type(cause), '')}."
        raise ValueError(f"--{split}_file {path} must be valid {file_format}, but {reason}") from error


def csv_features(path: str) -> datasets.Features:
    """Types of the columns of a csv file: text, so that 007 stays 007. Raises a ValueError if they are not clear."""
    names = pandas.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].dropna()
    if len(names) == 1 and (found := re.search(r"[;\t|]", names.iloc[0])):
        raise ValueError(f"the delimiter seems to be {found[0]!r}: separate the fields with commas")
    if names.duplicated().any():
        raise ValueError(f"several columns are named {names[names.duplicated()].iloc[0]!r}: rename them")
    first = pandas.read_csv(path, nrows=1, dtype=str)
    if first.empty:
        raise ValueError("there are no rows below the first line, which names the columns")
    if not isinstance(first.index, pandas.RangeIndex):
        raise ValueError("rows have more fields than the first line: put quotes around fields with commas")
    return datasets.Features({column: datasets.Value("string") for column in first.columns})


def choose_splits(splits: Datasets, arguments: ScriptArguments, training: TrainingArguments) -> Datasets:
    """Choose and truncate the data for `--do_train`, `--do_eval` and `--do_predict`: `train`, `eval` and `predict`."""
    held_out = "test" if "test" in splits and "validation" not in splits else "validation"
    data = {}
    for use, split in {"train": "train", "eval": held_out, "predict": "test"}.items():
        if not getattr(training, f"do_{use}"):
            continue
        if split not in splits:
            raise ValueError(
                f"--do_{use} needs the split {split!r}, but there are {list(splits)}: pass --{split}_file."
            )
        rows, limit = splits[split], getattr(arguments, f"max_{use}_samples")
        if use == "train" and arguments.shuffle_train_dataset:
            rows = rows.shuffle(seed=arguments.shuffle_seed)
        data[use] = rows if limit is None else rows.select(range(min(limit, len(rows))))
        if len(data[use]) == 0:
            raise ValueError(
                f"--do_{use} needs at least one example, but has {len(rows)} and --max_{use}_samples is {limit}."
            )
    return data


def find_column(rows: datasets.Dataset, use: str, name: str | None, defaults: tuple[str, ...], flag: str) -> str:
    """The column `name`, the value of `flag`; if that is None, the first of `defaults` that exists."""
    columns = rows.column_names
    for column in defaults if name is None else (name,):
        if column in columns:
            return column
    names = " or ".join(map(repr, defaults if name is None else (name,)))
    raise ValueError(f"The {use} data must have a column {names}, but has {columns}: {column_fix(rows, flag)}.")


def column_fix(rows: datasets.Dataset, flags: str) -> str:
    """What to do if the data have other columns, which may be named by flags."""
    for column, feature in rows.features.items():
        if len(rows) == 1 and isinstance(getattr(feature, "feature", None), dict):
            return f"write only the rows into the file, which seem to be the list {column!r}"
    return f"pass {flags}, or write the names of the columns into the first line of a csv file that has none"


def validate_texts(rows: datasets.Dataset, use: str, columns: list[str]) -> None:
    """Warn of missing texts, which are read as empty ones; raise a ValueError if all are, or if one is no text."""
    for column in columns:
        texts = rows.with_format(None)[column][:]
        missing = sum(is_missing(text) or not str(text).strip() for text in texts)
        if missing == len(texts):
            raise ValueError(f"{column!r} of the {use} data has no texts: name other columns with --text_column_names.")
        if missing:
            logger.warning(
                f"{missing:,} of {len(texts):,} rows of the {use} data have no text in {column!r} (in csv files, NA, "
                "None, null and nan are none either), which is read as an empty text."
            )
        for text in texts:
            if not (is_missing(text) or isinstance(text, (str, int, float))):
                raise ValueError(
                    f"{column!r} of the {use} data must contain texts, but has {reprlib.repr(text)}: write one text "
                    "per row, or name other columns with --text_column_names."
                )


def is_missing(value: Any) -> bool:
    return value is None or value != value  # not a number


# ---- labels ----------------------------------------------------------------------------------------------------------


def find_label_column(data: Datasets, arguments: ScriptArguments) -> str | None:
    """The column with the labels; None if there are none, as data for `--do_predict` do not need them."""
    name, defaults = arguments.label_column_name, ("label", "labels")
    for use, rows in data.items():
        if use != "predict" or not {name, *defaults}.isdisjoint(rows.column_names):
            return find_column(rows, use, name, defaults, "--label_column_name")
    return None


def join_label_columns(data: Datasets, arguments: ScriptArguments) -> Datasets:
    """Join the columns a and b of 0 and 1 in `--label_column_name a,b` to one column "a,b" of lists of labels."""
    name = arguments.label_column_name or ""
    labels = [label.strip() for label in name.split(",")]
    feature = datasets.List(datasets.ClassLabel(names=labels))
    for use, rows in data.items() if len(labels) > 1 else ():
        if name in rows.column_names or (use == "predict" and not set(labels) <= set(rows.column_names)):
            continue
        columns = [find_column(rows, use, label, (), "--label_column_name") for label in labels]
        present = [[is_present(value, label, use) for value in rows.with_format(None)[label]] for label in columns]
        lists = [None if None in row else list(np.flatnonzero(row)) for row in zip(*present, strict=True)]
        data = {**data, use: rows.add_column(name, lists, feature=feature)}
    return data


def is_present(value: Any, label: str, use: str) -> bool | None:
    """Whether the column of a label has 1, and not 0; None if it has nothing."""
    if is_missing(value):
        return None
    present = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    if str(value).strip().lower() not in present:
        raise ValueError(
            f"{label!r} of the {use} data must be 0 or 1, as one of the columns of several labels, but is {value!r}: "
            "correct or remove the row."
        )
    return present[str(value).strip().lower()]


def find_problem_type(data: Datasets, label_column: str | None, arguments: ScriptArguments) -> str:
    """`problem_type` of the model's config, from `--do_regression` or the labels, which may be numbers as text."""
    use, rows = next(iter(data.items()))
    feature = rows.features.get(label_column)
    if isinstance(feature, LISTS):
        if arguments.do_regression:
            raise ValueError(f"--do_regression needs a number in {label_column!r}, which has lists: remove the flag.")
        return "multi_label_classification"
    if arguments.do_regression is not None:
        return "regression" if arguments.do_regression else "single_label_classification"
    if feature is None or isinstance(feature, datasets.ClassLabel):
        return "single_label_classification"
    numbers = {as_number(label) for label in rows.with_format(None)[label_column]}
    if None in numbers or not any(isinstance(number, float) for number in numbers):
        return "single_label_classification"
    if use == "train" and all(float(number).is_integer() for number in numbers):
        raise ValueError(
            f"{label_column!r} has whole numbers, written as floats, such as {reprlib.repr(sorted(numbers))}: pass "
            "--do_regression true to predict numbers, or --do_regression false if they stand for classes."
        )
    return "regression"


LISTS = (datasets.List, datasets.LargeList)
LABELS = (
    "a label must be a name or a number, or in every row a list of the names that apply, in a json or parquet file; or "
    "pass columns of 0 and 1 as --label_column_name a,b"
)


def is_label(label: Any, feature: Any) -> bool:
    if isinstance(label, list):
        named = isinstance(feature, LISTS) and all(isinstance(one, (str, int)) for one in label)
        return named and not (set(label) <= {0, 1} and len(label) > 2)
    number = isinstance(label, (int, float)) and math.isfinite(label)
    return number or (isinstance(label, str) and not re.match(r"\s*\[['\"\d]", label))


def flat_labels(rows: datasets.Dataset, label_column: str) -> tuple[list[Any], Any]:
    """The labels of all rows, one after the other, and their type."""
    labels, feature = rows.with_format(None)[label_column][:], rows.features[label_column]
    if isinstance(feature, LISTS):
        return [label for row in labels for label in row], feature.feature
    return labels, feature


def drop_missing_labels(data: Datasets, label_column: str | None) -> Datasets:
    """Drop the labels for `--do_predict` if any is missing; missing or other labels in other data are an error."""
    for use, rows in data.items():
        if label_column not in rows.column_names:
            continue
        labels, feature = rows.with_format(None)[label_column][:], rows.features[label_column]
        missing = sum(lacks_label(label, feature) for label in labels)
        if missing and use == "predict":
            data = {**data, use: rows.remove_columns(label_column)}
        elif missing:
            raise ValueError(
                f"{missing:,} of {len(rows):,} rows of the {use} data have no label in {label_column!r}: remove these "
                "rows. In csv files NA, None, null and nan are none either: use another word for such a label."
            )
        for label in labels:
            if not (lacks_label(label, feature) or is_label(label, feature)):
                raise ValueError(f"{label_column!r} of the {use} data has {reprlib.repr(label)}: {LABELS}.")
    return data


def lacks_label(label: Any, feature: Any) -> bool:
    """Whether a label, or one in a list, is missing: None, not a number, blank, or −1 among the ids of classes."""
    if isinstance(label, list):
        return any(lacks_label(one, getattr(feature, "feature", None)) for one in label)
    if isinstance(feature, datasets.ClassLabel):
        return label in (None, -1)
    return label is None or label != label or not str(label).strip()


def head_settings(rows: datasets.Dataset, label_column: str, problem_type: str) -> dict[str, Any]:
    """Settings of the labels in the config of the model."""
    names = ["value"] if problem_type == "regression" else label_names(rows, label_column)
    if problem_type == "multi_label_classification" and all(len(labels) == 1 for labels in rows[label_column]):
        logger.warning(
            f"All lists in {label_column!r} have one label, and are learned as lists of any length: write the label "
            "without a list if there is always one."
        )
    ids = {"label2id": {name: number for number, name in enumerate(names)}, "id2label": dict(enumerate(names))}
    return {"num_labels": len(names), **ids, "problem_type": problem_type}


def target(label: Any, feature: Any, problem_type: str, label2id: dict[str, int]) -> float | int | list[float]:
    """What the model learns for a label in the data: a number, the id of a class, or 0.0 or 1.0 for each class."""
    if problem_type == "regression":
        number = as_number(label)
        if number is None or not math.isfinite(number):
            raise ValueError(f"Labels must be finite numbers for a regression, but one is {label!r}: correct it.")
        return float(number)
    if problem_type == "single_label_classification":
        return label_id(label, feature, label2id)
    ids = {label_id(one, feature.feature, label2id) for one in label}
    return [float(number in ids) for number in range(len(label2id))]


def all_same(labels: Iterable[Any]) -> bool:
    rows = (map(str, label) if isinstance(label, list) else [str(label)] for label in labels)
    return len({frozenset(map(str.strip, row)) for row in rows}) == 1


def label_names(rows: datasets.Dataset, label_column: str) -> list[str]:
    """Names of the labels, in the order of their ids: that of the dataset, or by number, or by alphabet."""
    labels, feature = flat_labels(rows, label_column)
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    names = {label_name(label, feature) for label in labels}
    if all_same(rows[label_column]):
        raise ValueError(
            f"All rows of the train data ({len(rows):,}) have the label {sorted(names)} in {label_column!r}: "
            "name another column, or pass --shuffle_train_dataset if --max_train_samples takes only the first rows."
        )
    for lower, count in Counter(map(str.lower, names)).items():
        if count > 1:
            same = sorted(name for name in names if name.lower() == lower)
            logger.warning(f"{same} in {label_column!r} are learned as different labels: if they are one, rename them.")
    numbers = {name: as_number(name) for name in names}
    return sorted(names, key=(lambda name: name) if None in numbers.values() else (lambda name: (numbers[name], name)))


def as_number(label: Any) -> int | float | None:
    """A label as a number, also if it is a number written as text; else None."""
    if isinstance(label, (int, float)):
        return None if isinstance(label, bool) else label
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(label)
    return None


def label_name(label: Any, feature: Any) -> str:
    return feature.names[label] if isinstance(feature, datasets.ClassLabel) else str(label).strip()


def label_id(label: Any, feature: Any, label2id: dict[str, int]) -> int | None:
    """Id of a label in the model: that of its name, or, as for LABEL_0, a number that is no name; or else None."""
    name = label_name(label, feature)
    if name in label2id:
        return label2id[name]
    number = int(name) if name.isdecimal() else label
    known = isinstance(number, int) and 0 <= number < len(label2id) and not any(map(str.isdecimal, label2id))
    return number if known else None


def validate_known_labels(data: Datasets, label_column: str | None, label2id: dict[str, int]) -> None:
    for use, rows in data.items():
        if label_column in rows.column_names:
            labels, feature = flat_labels(rows, label_column)
            unknown = {
                label_name(label, feature): count
                for label, count in Counter(labels).items()
                if label_id(label, feature, label2id) is None
            }
            if unknown:
                raise ValueError(
                    f"The {use} data has labels in {label_column!r} that the model does not have, by number of rows "
                    f"{reprlib.repr(unknown)}; those of the model are {list(label2id)[:20]}: remove these rows, or "
                    "train on such rows, too."
                )


# ---- tokenizer and model ---------------------------------------------------------------------------------------------


def load_pretrained(auto_class: Any, name: str, flag: str, arguments: ScriptArguments, **settings: Any) -> Any:
    """Load a model, or a part of one, from the Hub or a folder; the error message names the flag."""
    hub = {"cache_dir": arguments.cache_dir, "revision": arguments.model_revision, "token": arguments.token}
    try:
        return auto_class.from_pretrained(name, trust_remote_code=arguments.trust_remote_code, **hub, **settings)
    except OSError as error:
        raise ValueError(f"{flag} must be on the Hub or a folder, but {name!r} could not be loaded: {error}") from error


def load_tokenizer(arguments: ScriptArguments, texts: list[str] | None) -> transformers.PreTrainedTokenizerBase:
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is not None:
        return load_pretrained(AutoTokenizer, name, "--tokenizer_name or --model_name_or_path", arguments)
    if texts is None:
        raise ValueError(
            "--model_name_or_path is required without --do_train: a tokenizer is trained on training data."
        )
    return learn_words(texts, arguments.max_seq_length)


def learn_words(texts: list[str], max_length: int) -> transformers.PreTrainedTokenizerBase:
    """Train a tokenizer with at most 4,000 tokens on these texts, the same in every process.

    Byte-pair encoding, because the order of the tokens that WordPiece learns is random; a resumed run would differ.
    """
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **special)


def load_config(arguments: ScriptArguments, tokenizer: Any, head: dict[str, Any]) -> transformers.PreTrainedConfig:
    name = arguments.config_name or arguments.model_name_or_path
    if name is not None:
        return load_pretrained(AutoConfig, name, "--config_name or --model_name_or_path", arguments, **head)
    return transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=arguments.max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
        **head,
    )


def load_model(arguments: ScriptArguments, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Load the model in float32, or create an untrained one."""
    name, auto_class = arguments.model_name_or_path, AutoModelForSequenceClassification
    if name is None:
        return auto_class.from_config(config)
    settings = {"config": config, "dtype": "float32", "ignore_mismatched_sizes": arguments.ignore_mismatched_sizes}
    return load_pretrained(auto_class, name, "--model_name_or_path", arguments, **settings)


# ---- training and results --------------------------------------------------------------------------------------------


class Clock(transformers.TrainerCallback):
    """Measures the seconds of training, without evaluations."""

    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.start


def train(trainer: Trainer, arguments: ScriptArguments) -> None:
    clock = Clock()
    trainer.add_callback(clock)
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    examples = len(trainer.train_dataset)
    if arguments.trainer == "importance":
        examples *= trainer.importance_config.visits_per_epoch
    metrics["trainer"] = arguments.trainer
    metrics["examples_per_epoch"] = round(examples)
    metrics["examples_processed"] = round(trainer.state.epoch * examples)
    metrics["seconds_of_training"] = round(clock.seconds, 3)
    trainer.save_model()
    trainer.save_state()
    save_metrics(trainer, "train", metrics)


def save_metrics(trainer: Trainer, split: str, metrics: dict[str, Any]) -> None:
    """Print metrics, and save them in the output folder."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def save_predictions(trainer: Trainer, predictions: list[Any]) -> None:
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predictions.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for index, prediction in enumerate(predictions):
                file.write(json.dumps({"index": index, "prediction": prediction}, ensure_ascii=False) + "\n")
        print(f"\nThe predictions were saved in {path}")


def publish(trainer: Trainer, arguments: ScriptArguments, examples: datasets.Dataset | None) -> None:
    """Write the report of the training examples, if asked for, and the model card; push to the Hub, if asked for."""
    page = trainer.importance_report(examples=examples) if arguments.report else None
    if page is not None:
        print(f"\nThe report was saved as {page}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    elif trainer.args.do_train:
        trainer.create_model_card()
    if trainer.args.do_train:
        print(f"\nThe model was saved in {trainer.args.output_dir}")


def decide(logits: np.ndarray | tuple[np.ndarray, ...], problem_type: str) -> np.ndarray:
    """Convert logits to ids of classes, to 0 or 1 for each class, or to numbers."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    if problem_type == "single_label_classification":
        return logits.argmax(-1)
    return (logits > 0).astype(int) if problem_type == "multi_label_classification" else logits.squeeze(-1)


def predictions_of(logits: Any, problem_type: str, id2label: dict[int, str]) -> list[str | list[str] | float]:
    """The class, the list of classes, or the number of each example."""
    decisions = decide(logits, problem_type).tolist()
    if problem_type == "single_label_classification":
        return [id2label[number] for number in decisions]
    if problem_type == "multi_label_classification":
        return [[id2label[number] for number, present in enumerate(row) if present] for row in decisions]
    return decisions


def compute_metrics(output: transformers.EvalPrediction, problem_type: str, metric: Any) -> dict[str, float]:
    """The metric of `evaluate`, or those of the problem type, by scikit-learn: nothing is downloaded for them.

    With several labels per example, the accuracy is the share of examples with all labels correct.
    """
    predictions, labels = decide(output.predictions, problem_type), output.label_ids
    if metric is not None:
        return metric.compute(predictions=predictions, references=labels)
    if problem_type == "regression":
        constant = np.ptp(predictions) == 0 or np.ptp(labels) == 0
        pearson = 0.0 if constant else float(np.corrcoef(predictions, labels)[0, 1])
        return {"mse": mean_squared_error(labels, predictions), "pearson": pearson}
    average = "micro" if problem_type == "multi_label_classification" else "macro"
    f1 = f1_score(labels, predictions, average=average, zero_division=0)
    return {"accuracy": accuracy_score(labels, predictions), "f1": f1}


# ---- embedded data ---------------------------------------------------------------------------------------------------

PACKAGES = (
    *("torch", "transformers", "numpy", "scipy", "sklearn", "pandas", "matplotlib"),
    *("datasets", "accelerate", "huggingface_hub"),
)
MIN_WORDS = 6


def docstrings(per_package: int = 1000, whole: bool = False) -> datasets.DatasetDict:
    """Docstrings in installed packages, labelled with the package; a fifth is the test split.

    If several texts start or end with the same six words, only one is kept, so that the splits share no near
    duplicates. The first call reads source files, which takes some seconds; `datasets` caches the result for the
    installed versions of the packages.

    Args:
        per_package: maximum number of texts per package.
        whole: whether to use whole docstrings instead of their first paragraphs.
    """
    versions = {name: version(name.replace("sklearn", "scikit-learn")) for name in PACKAGES}
    label = datasets.ClassLabel(names=[*versions, "python"])
    data = datasets.Dataset.from_generator(
        generate_docstrings,
        features=datasets.Features(text=datasets.Value("string"), label=label),
        gen_kwargs={"versions": versions, "per_package": per_package, "whole": whole},
    )
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def generate_docstrings(versions: dict[str, str], per_package: int, whole: bool) -> Iterator[dict[str, Any]]:
    folders = [Path(importlib.util.find_spec(name).origin).parent for name in versions]
    seen: set[str] = set()
    for label, folder in enumerate([*folders, Path(sysconfig.get_path("stdlib"))]):
        count = 0
        for node in definitions(folder):
            text = ast.get_docstring(node) or ""
            text = " ".join((text if whole else text.split("\n\n")[0]).split())
            words = re.findall(r"[a-z]+", text.lower())
            if len(words) < MIN_WORDS:
                continue
            ends = {"^" + " ".join(words[:MIN_WORDS]), "$" + " ".join(words[-MIN_WORDS:])}
            if seen.isdisjoint(ends):
                yield {"text": text, "label": label}
                count += 1
            seen |= ends
            if count == per_package:
                break


def definitions(folder: Path) -> Iterator[ast.AST]:
    """Modules, classes and functions in a folder. The order of files is fixed, and mixes subpackages."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from walk(child)

    files = [path.relative_to(folder) for path in folder.rglob("*.py")]
    files = [path for path in files if {"site-packages", "tests", "test"}.isdisjoint(path.parts)]
    for path in sorted(files, key=lambda path: zlib.crc32(path.as_posix().encode())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse((folder / path).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates, or files in other encodings
            continue
        yield from walk(tree)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, PushError) as error:
        sys.exit(f"error: {error}")
