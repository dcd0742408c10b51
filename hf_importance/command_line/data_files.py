"""Loading of data files or a dataset, and choice of splits and columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from pyarrow import ArrowInvalid
from transformers import TrainingArguments

from hf_importance.command_line.arguments import DataArguments, ModelArguments


def load(data: DataArguments, model: ModelArguments) -> datasets.DatasetDict:
    """Load the given files or dataset, with splits named train, validation and test.

    Raises:
        ValueError: if a file, dataset or split does not exist or cannot be read.
    """
    if data.files():
        return _load_files(data.files(), model)
    try:
        loaded = datasets.load_dataset(
            data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token
        )
    except OSError as error:
        raise ValueError(
            f"--dataset_name must be a dataset on the Hub or a folder, but {data.dataset_name!r} could not be loaded: "
            f"{error}"
        ) from error
    names = {"train": data.train_split_name, "validation": data.validation_split_name, "test": data.test_split_name}
    for split, name in names.items():
        if name is not None and name not in loaded:
            raise ValueError(f"--{split}_split_name must be one of the splits {list(loaded)}, but is {name!r}.")
    splits = {split: name or split for split, name in names.items()}
    return datasets.DatasetDict({split: loaded[name] for split, name in splits.items() if name in loaded})


def _load_files(files: dict[str, str], model: ModelArguments) -> datasets.DatasetDict:
    file_format = _format_of(files)
    try:
        return datasets.load_dataset(file_format, data_files=files, cache_dir=model.cache_dir)
    except (DatasetsError, ArrowInvalid) as error:
        flags = ", ".join(f"--{split}_file {path}" for split, path in files.items())
        raise ValueError(
            f"{flags} must be valid {file_format}, but could not be read: {error.__cause__ or error}"
        ) from error


def _format_of(files: dict[str, str]) -> str:
    """The loader of `datasets` for all files."""
    formats = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
    for split, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"--{split}_file must be a file, but {path!r} does not exist: check the path.")
        if Path(path).suffix[1:] not in formats:
            raise ValueError(
                f"--{split}_file must be a csv, json, jsonl or parquet file, but is {path!r}: convert it to one."
            )
        if Path(path).stat().st_size == 0:
            raise ValueError(f"--{split}_file must contain examples, but {path!r} is empty.")
    found = {formats[Path(path).suffix[1:]] for path in files.values()}
    if len(found) > 1:
        raise ValueError(
            f"All data files must have the same format, but have {sorted(found)}: convert them to one format."
        )
    return found.pop()


def choose_splits(splits: datasets.DatasetDict, data: DataArguments, training: TrainingArguments) -> dict[str, Any]:
    """The datasets for `--do_train`, `--do_eval` and `--do_predict`, truncated to the maximum numbers of examples.

    Args:
        splits: the splits train, validation and test, as far as there are any. Without validation, test is used.
        data: flags of the data.
        training: which datasets are needed.

    Returns:
        The datasets by use, `train`, `eval` and `predict`.

    Raises:
        ValueError: if a split does not exist or is empty.
    """
    held_out = "test" if "test" in splits and "validation" not in splits else "validation"
    wanted = {
        "train": (training.do_train, "train", data.max_train_samples, "--do_train"),
        "eval": (training.do_eval, held_out, data.max_eval_samples, "--do_eval"),
        "predict": (training.do_predict, "test", data.max_predict_samples, "--do_predict"),
    }
    chosen = {}
    for use, (needed, split, limit, flag) in wanted.items():
        if not needed:
            continue
        if split not in splits:
            raise ValueError(
                f"{flag} needs the split {split!r}, but the data only has {list(splits)}: pass --{split}_file, or the "
                f"name of a split of the dataset as --{split}_split_name."
            )
        rows = splits[split]
        if use == "train" and data.shuffle_train_dataset:
            rows = rows.shuffle(seed=data.shuffle_seed)
        chosen[use] = rows if limit is None else rows.select(range(min(limit, len(rows))))
        if len(chosen[use]) == 0:
            raise ValueError(
                f"{flag} needs at least one example, but the split {split!r} has {len(rows)} and --max_{use}_samples "
                f"is {limit}: use other data, or raise the limit."
            )
    return chosen


def require_column(rows: datasets.Dataset, name: str | None, defaults: tuple[str, ...], flag: str) -> str:
    """The column `name`, or if that is None the first existing column of `defaults`.

    Raises:
        ValueError: if there is no such column; the message names the `flag`.
    """
    columns = rows.column_names
    if name is not None:
        if name not in columns:
            raise ValueError(f"{flag} must be one of the columns {columns}, but is {name!r}.")
        return name
    found = [column for column in defaults if column in columns]
    if not found:
        wanted = " or ".join(map(repr, defaults))
        raise ValueError(f"The data must have a column {wanted}, but has {columns}: pass {flag}.")
    return found[0]
