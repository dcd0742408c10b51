"""The data of the fine-tuning scripts: files or a data set, splits, columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from pyarrow import ArrowInvalid
from transformers import TrainingArguments

from hf_importance.command_line.arguments import DataArguments, ModelArguments


def load(data: DataArguments, model: ModelArguments) -> datasets.DatasetDict:
    """The named files or data set, its splits called train, validation and test.

    Raises:
        ValueError: if a file or split is missing, or cannot be read.
    """
    if data.files():
        return _load_files(data.files(), model)
    try:
        found = datasets.load_dataset(
            data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token
        )
    except OSError as error:
        message = f"--dataset_name: {data.dataset_name!r} could not be loaded, from a folder or the Hub: {error}"
        raise ValueError(message) from error
    names = {"train": data.train_split_name, "validation": data.validation_split_name, "test": data.test_split_name}
    for split, name in names.items():
        if name is not None and name not in found:
            raise ValueError(f"--{split}_split_name must be one of {list(found)}, but is {name!r}.")
    splits = {split: name or split for split, name in names.items()}
    return datasets.DatasetDict({split: found[name] for split, name in splits.items() if name in found})


def _load_files(files: dict[str, str], model: ModelArguments) -> datasets.DatasetDict:
    kind = _kind_of(files)
    try:
        return datasets.load_dataset(kind, data_files=files, cache_dir=model.cache_dir)
    except (DatasetsError, ArrowInvalid) as error:
        named = ", ".join(f"--{split}_file {path}" for split, path in files.items())
        raise ValueError(f"{named}: could not be read as {kind}: {error.__cause__ or error}") from error


def _kind_of(files: dict[str, str]) -> str:
    kinds = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
    for split, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"--{split}_file must be a file, but {path!r} does not exist.")
        if Path(path).suffix[1:] not in kinds:
            raise ValueError(f"--{split}_file must be csv, json, jsonl or parquet, but is {path!r}.")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"--{split}_file must have rows, but {path!r} is empty.")
    found = {kinds[Path(path).suffix[1:]] for path in files.values()}
    if len(found) > 1:
        raise ValueError(f"All data files must be of one kind, but are {sorted(found)}: convert them to one.")
    return found.pop()


def choose_splits(splits: datasets.DatasetDict, data: DataArguments, training: TrainingArguments) -> dict[str, Any]:
    """The data for --do_train, --do_eval and --do_predict, cut to the numbers of examples that were asked for."""
    held_out = "validation" if "validation" in splits else "test"
    wanted = {
        "train": (training.do_train, "train", data.max_train_samples, "--do_train"),
        "eval": (training.do_eval, held_out, data.max_eval_samples, "--do_eval"),
        "predict": (training.do_predict, "test", data.max_predict_samples, "--do_predict"),
    }
    chosen = {}
    for use, (asked, split, most, name) in wanted.items():
        if not asked:
            continue
        if split not in splits:
            raise ValueError(f"{name} needs the split {split!r}, but the data has {list(splits)}: name a file for it.")
        rows = splits[split]
        if use == "train" and data.shuffle_train_dataset:
            rows = rows.shuffle(seed=data.shuffle_seed)
        chosen[use] = rows if most is None else rows.select(range(min(most, len(rows))))
        if len(chosen[use]) == 0:
            raise ValueError(f"{name} needs rows, but of the {len(rows)} of the split {split!r} none is taken.")
    return chosen


def require_column(rows: datasets.Dataset, name: str | None, usual: tuple[str, ...], name_of_flag: str) -> str:
    """The named column, or the first of the usual ones that is there."""
    found = [name] if name in rows.column_names else [column for column in usual if column in rows.column_names]
    if (name is not None and found != [name]) or not found:
        wanted = repr(name) if name is not None else " or ".join(map(repr, usual))
        raise ValueError(f"{name_of_flag}: no column {wanted} in the data, which has {rows.column_names}.")
    return found[0]
