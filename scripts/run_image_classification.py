"""Fine-tune an image classifier.

    python scripts/run_image_classification.py
    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --do_train --do_eval --train_dir flowers/train --validation_dir flowers/test

Without arguments, it trains a small vision transformer from scratch on scanned digits; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import reprlib
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_type_hints

import datasets
import evaluate
import pandas
import torch
import transformers
from datasets.exceptions import DatasetsError
from pandas.errors import ParserError
from PIL import Image
from pyarrow import ArrowInvalid
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg, HfArgumentParser

from hf_importance import ImportanceConfig, ImportanceTrainer, PushError

Datasets = dict[str, datasets.Dataset]
logger = transformers.utils.logging.get_logger(__name__)

EMBEDDED = (
    "--run_name digits --do_train --do_eval --eval_strategy epoch --save_strategy no --logging_steps 20 "
    "--num_train_epochs 16 --per_device_train_batch_size 32 --per_device_eval_batch_size 128 "
    "--image_size 8 --patch_size 2 --learning_rate 0.002 --weight_decay 0.01 --warmup_steps 0.05"
)
"""Flags without data of your own, which other flags override."""

# ---- flags -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ScriptArguments:
    """Flags of the model, the data and the report."""

    trainer: Literal["importance", "uniform"] = HfArg(default="importance", help="ImportanceTrainer, or plain Trainer.")
    model_name_or_path: str | None = HfArg(default=None, help="Model, on the Hub or a folder. Default: a new one.")
    config_name: str | None = HfArg(default=None, help="Config, on the Hub or a folder. Default: that of the model.")
    image_processor_name: str | None = HfArg(default=None, help="Hub or folder. Default: that of the model.")
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
    train_dir: str | None = HfArg(default=None, help="Folder of training images, with a subfolder per class.")
    validation_dir: str | None = HfArg(default=None, help="Folder of evaluation images, with a subfolder per class.")
    train_val_split: float = HfArg(default=0.15, help="Share of the data to evaluate on, if there is no other split.")
    train_file: str | None = HfArg(default=None, help="Training data: a csv, json, jsonl or parquet file.")
    validation_file: str | None = HfArg(default=None, help="Evaluation data, as --train_file.")
    test_file: str | None = HfArg(default=None, help="Data for --do_predict, as --train_file.")
    max_train_samples: int | None = HfArg(default=None, help="Maximum number of training examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Maximum number of evaluation examples.")
    max_predict_samples: int | None = HfArg(default=None, help="Maximum number of examples to predict.")
    shuffle_train_dataset: bool = HfArg(default=False, help="Shuffle the data before --max_train_samples is applied.")
    shuffle_seed: int = HfArg(default=42, help="Seed of --shuffle_train_dataset and --train_val_split.")

    image_column_name: str | None = HfArg(default=None, help="Column of the images. Default: image or img.")
    label_column_name: str | None = HfArg(default=None, help="Column of the labels. Default: label or labels.")
    metric_name: str | None = HfArg(default=None, help="Metric of `evaluate`. Default: accuracy and F1.")
    random_crop: bool = HfArg(default=False, help="Crop training images at random, to at least 0.6 of their area.")
    random_flip: bool = HfArg(default=False, help="Mirror half of the training images, at random.")
    image_size: int = HfArg(default=64, help="Height and width of images in pixels, for a new model.")
    patch_size: int = HfArg(default=8, help="Height and width of patches in pixels, for a new model.")


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
    folders = (arguments.dataset_name, arguments.train_dir, arguments.validation_dir)
    return not any((*files, *folders))


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
        training.output_dir = f"outputs/digits-{arguments.trainer}"
    return arguments, training, importance


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> Trainer:
    """Run with these flags, by default those of the command line, and return the trainer."""
    arguments, training, importance = parse(argv)
    transformers.logging.set_verbosity(training.get_process_log_level())
    transformers.set_seed(training.seed)

    splits = digits() if uses_embedded_data(arguments) else load(arguments)
    if training.do_train and training.do_eval and not {"validation", "test"} & set(splits):
        held_out = splits["train"].train_test_split(test_size=arguments.train_val_split, seed=arguments.shuffle_seed)
        splits = {"train": held_out["train"], "validation": held_out["test"]}
    data = choose_splits(splits, arguments, training)
    for use, rows in data.items():
        image_column = find_column(rows, use, arguments.image_column_name, ("image", "img"), "--image_column_name")
        validate_images(rows, use, image_column)
    label_column = find_label_column(data, arguments)
    data = drop_missing_labels(data, label_column)

    head = {}  # without training, the labels are those of the saved model
    if training.do_train:
        head = head_settings(data["train"], label_column)
    config = load_config(arguments, head)
    validate_known_labels(data, label_column, config.label2id)
    model = load_model(arguments, config)
    processor = load_image_processor(arguments)

    def transform(batch: dict[str, list[Any]], feature: Any, augments: bool) -> dict[str, list[Any]]:
        images = [image.convert("RGB") for image in batch[image_column]]
        if augments:
            images = [augment(image, arguments) for image in images]
        inputs = {"pixel_values": list(processor(images, return_tensors="pt")["pixel_values"])}
        if feature is not None:
            inputs["labels"] = [label_id(label, feature, config.label2id) for label in batch[label_column]]
        return inputs

    inputs = {}
    for use, rows in data.items():
        columns = [column for column in (image_column, label_column) if column in rows.column_names]
        data[use] = rows.select_columns(columns).cast_column(image_column, datasets.Image())
        options = {"feature": rows.features.get(label_column), "augments": use == "train"}
        inputs[use] = data[use].with_transform(functools.partial(transform, **options))
    training.remove_unused_columns = False  # the transform reads them

    metric = None if arguments.metric_name is None else evaluate.load(arguments.metric_name)
    settings = {
        "model": model,
        "args": training,
        "train_dataset": inputs.get("train"),
        "eval_dataset": inputs.get("eval"),
        "processing_class": processor,
        "compute_metrics": functools.partial(compute_metrics, metric=metric),
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
        save_predictions(trainer, [config.id2label[number] for number in class_ids(output.predictions)])
    publish(trainer, arguments, data["train"].select_columns(image_column) if training.do_train else None)
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
    folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
    folders = {split: folder for split, folder in folders.items() if folder is not None}
    if folders:
        return load_folders(folders, arguments.cache_dir)
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


def load_folders(folders: dict[str, str], cache_dir: str | None) -> Datasets:
    for split, folder in folders.items():
        if not Path(folder).is_dir():
            raise ValueError(f"--{split}_dir must be a folder with one subfolder per class, but {folder!r} is none.")
    files = {split: str(Path(folder) / "**") for split, folder in folders.items()}
    return datasets.load_dataset("imagefolder", data_files=files, drop_labels=False, cache_dir=cache_dir)


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


def validate_images(rows: datasets.Dataset, use: str, column: str) -> None:
    """Raise a ValueError if images are missing; files are looked for, but not read."""
    images = []
    if rows.data.column(column).null_count or isinstance(rows.features[column], datasets.Value):
        images = rows.cast_column(column, datasets.Image(decode=False))[column]
    for image in images:
        path = (image or {}).get("path")
        exists = path is not None and ("://" in path or Path(path).is_file())
        if image is None or (image["bytes"] is None and not exists):
            raise ValueError(
                f"{column!r} of the {use} data must contain images or paths of images, but has {path!r}: correct the "
                "path, which starts at the current folder if it is relative, or remove the row."
            )


def augment(image: Image.Image, arguments: ScriptArguments) -> Image.Image:
    """Crop and flip at random, with the generator of torch, so that `--seed` makes it reproducible."""
    if arguments.random_crop:
        width, height = image.size
        share = (0.6 + 0.4 * torch.rand(1).item()) ** 0.5
        left, top = (torch.rand(1).item() * (1 - share) * size for size in (width, height))
        image = image.crop((round(left), round(top), round(left + share * width), round(top + share * height)))
    if arguments.random_flip and torch.rand(1).item() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


# ---- labels ----------------------------------------------------------------------------------------------------------


def find_label_column(data: Datasets, arguments: ScriptArguments) -> str | None:
    """The column with the labels; None if there are none, as data for `--do_predict` do not need them."""
    name, defaults = arguments.label_column_name, ("label", "labels")
    for use, rows in data.items():
        if use != "predict" or not {name, *defaults}.isdisjoint(rows.column_names):
            return find_column(rows, use, name, defaults, "--label_column_name")
    return None


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


LABELS = "a label must be a name or a whole number"


def is_label(label: Any, feature: Any) -> bool:
    return isinstance(label, (str, int)) or (isinstance(label, float) and label.is_integer())


def flat_labels(rows: datasets.Dataset, label_column: str) -> tuple[list[Any], Any]:
    """The labels of all rows, and their type."""
    return rows.with_format(None)[label_column][:], rows.features[label_column]


def head_settings(rows: datasets.Dataset, label_column: str) -> dict[str, Any]:
    """Settings of the labels in the config of the model."""
    names = label_names(rows, label_column)
    ids = {"label2id": {name: number for number, name in enumerate(names)}, "id2label": dict(enumerate(names))}
    return {"num_labels": len(names), **ids, "problem_type": "single_label_classification"}


def all_same(labels: Iterable[Any]) -> bool:
    return len({str(label).strip() for label in labels}) == 1


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


# ---- model and image processor --------------------------------------------------------------------------------------


def load_pretrained(auto_class: Any, name: str, flag: str, arguments: ScriptArguments, **settings: Any) -> Any:
    """Load a model, or a part of one, from the Hub or a folder; the error message names the flag."""
    hub = {"cache_dir": arguments.cache_dir, "revision": arguments.model_revision, "token": arguments.token}
    try:
        return auto_class.from_pretrained(name, trust_remote_code=arguments.trust_remote_code, **hub, **settings)
    except OSError as error:
        raise ValueError(f"{flag} must be on the Hub or a folder, but {name!r} could not be loaded: {error}") from error


def load_image_processor(arguments: ScriptArguments) -> Any:
    name = arguments.image_processor_name or arguments.model_name_or_path
    if name is not None:
        return load_pretrained(AutoImageProcessor, name, "--image_processor_name or --model_name_or_path", arguments)
    return transformers.ViTImageProcessor(size={"height": arguments.image_size, "width": arguments.image_size})


def load_config(arguments: ScriptArguments, head: dict[str, Any]) -> transformers.PreTrainedConfig:
    name = arguments.config_name or arguments.model_name_or_path
    if name is not None:
        return load_pretrained(AutoConfig, name, "--config_name or --model_name_or_path", arguments, **head)
    return transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        **head,
    )


def load_model(arguments: ScriptArguments, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Load the model in float32, or create an untrained one."""
    name, auto_class = arguments.model_name_or_path, AutoModelForImageClassification
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


def class_ids(logits: Any) -> list[int]:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(-1).tolist()


def compute_metrics(output: transformers.EvalPrediction, metric: Any) -> dict[str, float]:
    """The metric of `evaluate`, or accuracy and macro F1, by scikit-learn: nothing is downloaded for them."""
    predictions, labels = class_ids(output.predictions), output.label_ids
    if metric is not None:
        return metric.compute(predictions=predictions, references=labels)
    f1 = f1_score(labels, predictions, average="macro", zero_division=0)
    return {"accuracy": accuracy_score(labels, predictions), "f1": f1}


# ---- embedded data ---------------------------------------------------------------------------------------------------


def digits() -> datasets.DatasetDict:
    """1,797 scanned digits of 8 × 8 pixels in 10 classes (UCI, from scikit-learn); a fifth is the test split."""
    scans = load_digits()
    images = [Image.fromarray(pixels) for pixels in (scans.images * 15.9).astype("uint8")]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    data = datasets.Dataset.from_dict({"image": images, "label": scans.target.tolist()}, features=features)
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, PushError) as error:
        sys.exit(f"error: {error}")
