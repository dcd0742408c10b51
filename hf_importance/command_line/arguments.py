"""Flags shared by the fine-tuning scripts."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from hf_importance.config import ImportanceConfig

logger = logging.get_logger(__name__)


def flag(default: Any, text: str) -> Any:
    """Define a flag: a dataclass field with a default value and a help text."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class ModelArguments:
    """Flags of the model, the trainer and the report."""

    trainer: Literal["importance", "uniform"] = flag(
        "importance",
        "importance: ImportanceTrainer, with online importance sampling; uniform: Trainer of transformers.",
    )
    model_name_or_path: str | None = flag(
        None, "Model to fine-tune, on the Hub or in a folder. By default, a small untrained model is created."
    )
    config_name: str | None = flag(
        None, "Model config, on the Hub or in a folder. Defaults to the config of the model."
    )
    cache_dir: str | None = flag(None, "Cache folder for downloads from the Hub.")
    model_revision: str = flag("main", "Branch, tag or commit of the model.")
    token: str | None = flag(None, "Access token for the Hub. Defaults to the token of `hf auth login`.")
    trust_remote_code: bool = flag(False, "Allow code from the repository of the model to run on this machine.")
    ignore_mismatched_sizes: bool = flag(
        False, "Replace the head of the model if its number of labels differs from the data."
    )
    importance_config: str | None = flag(
        None,
        "Settings of importance sampling: an importance_config.json, a folder that contains it, or a model on the Hub. "
        "Flags for single settings take precedence.",
    )
    report: bool = flag(
        False,
        "After training, write a report of the training data: the hardest examples, suspected label errors, plots and "
        "a table of all examples.",
    )
    report_examples_to_hub: bool = flag(
        False, "Upload the full report, which contains training examples, if --push_to_hub is set."
    )

    def hub(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`."""
        names = {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}
        return {**names, "trust_remote_code": self.trust_remote_code}


@dataclass
class DataArguments:
    """Flags of the data."""

    dataset_name: str | None = flag(None, "Dataset on the Hub or in a folder.")
    dataset_config_name: str | None = flag(None, "Configuration (subset) of the dataset.")
    train_file: str | None = flag(None, "Training data: a csv, json, jsonl or parquet file.")
    validation_file: str | None = flag(None, "Evaluation data: a csv, json, jsonl or parquet file.")
    test_file: str | None = flag(None, "Test data for --do_predict: a csv, json, jsonl or parquet file.")
    train_split_name: str | None = flag(None, "Split of the dataset to train on. Defaults to train.")
    validation_split_name: str | None = flag(
        None, "Split of the dataset to evaluate on. Defaults to validation, or to test if there is none."
    )
    test_split_name: str | None = flag(None, "Split of the dataset to predict. Defaults to test.")
    max_train_samples: int | None = flag(None, "Maximum number of training examples.")
    max_eval_samples: int | None = flag(None, "Maximum number of evaluation examples.")
    max_predict_samples: int | None = flag(None, "Maximum number of examples to predict.")
    shuffle_train_dataset: bool = flag(False, "Shuffle the training data before --max_train_samples is applied.")
    shuffle_seed: int = flag(42, "Seed of --shuffle_train_dataset, and of a random split of the data.")

    def files(self) -> dict[str, str]:
        """Paths of the given data files, by split."""
        named = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in named.items() if path is not None}

    @property
    def embedded(self) -> bool:
        """Whether no data was given, so that the script uses its embedded data."""
        return self.dataset_name is None and not self.files()


@dataclass
class LabelArguments(DataArguments):
    """Flags of labelled data."""

    label_column_name: str | None = flag(None, "Column with the labels. Defaults to label or labels.")
    metric_name: str | None = flag(
        None,
        "Metric of `evaluate`, from the Hub or a local script. Defaults to accuracy and F1, or in regression to mean "
        "squared error and Pearson correlation.",
    )


def _importance_flags() -> type:
    """Dataclass of the fields of `ImportanceConfig` except the seed, which `--seed` or `--data_seed` sets."""
    types = get_type_hints(ImportanceConfig)
    settings = [f for f in dataclasses.fields(ImportanceConfig) if f.name != "seed"]
    copies = [(f.name, types[f.name], field(default=f.default, metadata=f.metadata)) for f in settings]
    return dataclasses.make_dataclass("ImportanceFlags", copies)


def parse(argv: list[str] | None, data_type: type[DataArguments], embedded: dict[str, Any]) -> tuple[Any, ...]:
    """Parse flags into settings of the model, the data, training and importance sampling.

    Args:
        argv: the flags; None for `sys.argv[1:]`.
        data_type: dataclass of the data flags.
        embedded: default values of flags if the embedded data are used, and `run_name`, the name of the output folder.

    Returns:
        A `ModelArguments`, a `data_type`, a `TrainingArguments` and an `ImportanceConfig`.

    Raises:
        ValueError: for unknown, missing or contradictory flags, or a value out of range.
    """
    first_parser = HfArgumentParser((ModelArguments, data_type), add_help=False, allow_abbrev=False)
    model, data, *_ = first_parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    base = ImportanceConfig()
    if model.importance_config is not None:
        hub = {"cache_dir": model.cache_dir, "token": model.token}
        base = ImportanceConfig.from_pretrained(model.importance_config, **hub)
    flags = " ".join(f"--{name} {value}" for name, value in embedded.items())
    parser = HfArgumentParser(
        (ModelArguments, data_type, TrainingArguments, _importance_flags()),
        allow_abbrev=False,
        epilog=f"Without data of your own, embedded data are used, with the defaults {flags}".replace("%", "%%"),
    )
    parser.set_defaults(report_to=["none"], dataloader_pin_memory=torch.accelerator.is_available())
    parser.set_defaults(**{name: value for name, value in dataclasses.asdict(base).items() if name != "seed"})
    asks_for_help = {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
    if data.embedded and not asks_for_help:
        parser.set_defaults(**embedded)
    model, data, training, importance = parser.parse_args_into_dataclasses(argv)
    if training.output_dir is None or training.output_dir == "trainer_output":
        training.output_dir = str(Path("outputs") / f"{embedded['run_name']}-{model.trainer}")
    if training.do_train and not (data.embedded or model.model_name_or_path or model.config_name):
        logger.warning("--model_name_or_path is not set: a small new model is trained from scratch.")
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("Nothing to do: pass --do_train, --do_eval or --do_predict.")
    if model.report and not (training.do_train and model.trainer == "importance" and importance.record):
        raise ValueError("--report needs --do_train, --trainer importance and --record: pass them, or remove --report.")
    return model, data, training, dataclasses.replace(base, **dataclasses.asdict(importance))
