"""The flags that the fine-tuning scripts share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_importance.config import ImportanceConfig


def flag(default: Any, text: str) -> Any:
    """A field of a dataclass of flags."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class ModelArguments:
    """Arguments of the model and the trainer."""

    trainer: Literal["importance", "uniform"] = flag(
        "importance", "importance: online importance sampling; uniform: transformers' own Trainer."
    )
    model_name_or_path: str | None = flag(
        None, "Model to fine-tune, on the Hub or in a folder; by default a small untrained one."
    )
    config_name: str | None = flag(None, "Config, if different from that of the model.")
    cache_dir: str | None = flag(None, "Cache folder for downloads from the Hub.")
    model_revision: str = flag("main", "Branch, tag or commit of the model.")
    token: str | None = flag(None, "Access token for the Hub; by default that of `hf auth login`.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model or dataset.")
    ignore_mismatched_sizes: bool = flag(False, "Replace a head whose number of labels does not match.")
    importance_config: str | None = flag(
        None, "importance_config.json to start from: the file, a folder that contains it, or a model on the Hub."
    )
    report: bool = flag(
        False, "Write a report of the training data: the hardest examples, suspected label errors, plots, a table."
    )
    report_examples_to_hub: bool = flag(
        False, "Let --push_to_hub upload the full report, which shows training examples."
    )

    def hub(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`."""
        names = {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}
        return {**names, "trust_remote_code": self.trust_remote_code}


@dataclass
class DataArguments:
    """Arguments of the data."""

    dataset_name: str | None = flag(None, "Dataset on the Hub or in a folder.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    train_file: str | None = flag(None, "Training data as csv, json, jsonl or parquet.")
    validation_file: str | None = flag(None, "Evaluation data as csv, json, jsonl or parquet.")
    test_file: str | None = flag(None, "Test data as csv, json, jsonl or parquet.")
    train_split_name: str | None = flag(None, "Split to train on (default: train).")
    validation_split_name: str | None = flag(None, "Split to evaluate on (default: validation, else test).")
    test_split_name: str | None = flag(None, "Split to predict (default: test).")
    max_train_samples: int | None = flag(None, "Maximum number of training examples.")
    max_eval_samples: int | None = flag(None, "Maximum number of evaluation examples.")
    max_predict_samples: int | None = flag(None, "Maximum number of examples to predict.")
    shuffle_train_dataset: bool = flag(False, "Shuffle the training data before --max_train_samples truncates it.")
    shuffle_seed: int = flag(42, "Seed of --shuffle_train_dataset.")

    def files(self) -> dict[str, str]:
        """The given data files, by split."""
        named = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in named.items() if path is not None}

    @property
    def embedded(self) -> bool:
        """Whether no data was given, so the script uses its embedded data."""
        return self.dataset_name is None and not self.files()


@dataclass
class LabelArguments(DataArguments):
    """Arguments of labelled data."""

    label_column_name: str | None = flag(None, "Column with the labels (default: label or labels).")
    metric_name: str | None = flag(None, "Metric of `evaluate` (from the Hub, or a local script).")


def _importance_flags() -> type:
    """`ImportanceConfig` without its seed, which is set by --seed or --data_seed of `TrainingArguments`."""
    types = get_type_hints(ImportanceConfig)
    settings = [f for f in dataclasses.fields(ImportanceConfig) if f.name != "seed"]
    copies = [(f.name, types[f.name], field(default=f.default, metadata=f.metadata)) for f in settings]
    return dataclasses.make_dataclass("ImportanceFlags", copies)


def parse(argv: list[str] | None, data_type: type[DataArguments], embedded: dict[str, Any]) -> tuple[Any, ...]:
    """Parse flags into model, data, training and importance settings. `embedded`: defaults for embedded data."""
    first_look = HfArgumentParser((ModelArguments, data_type), add_help=False, allow_abbrev=False)
    model, data, *_ = first_look.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    start = ImportanceConfig()
    if model.importance_config is not None:
        hub = {"cache_dir": model.cache_dir, "token": model.token}
        start = ImportanceConfig.from_pretrained(model.importance_config, **hub)
    parser = HfArgumentParser((ModelArguments, data_type, TrainingArguments, _importance_flags()), allow_abbrev=False)
    parser.set_defaults(report_to=["none"], dataloader_pin_memory=torch.accelerator.is_available())
    parser.set_defaults(**{name: value for name, value in dataclasses.asdict(start).items() if name != "seed"})
    if data.embedded:
        parser.set_defaults(**embedded)
    model, data, training, importance = parser.parse_args_into_dataclasses(argv)
    if training.output_dir is None or training.output_dir == "trainer_output":
        training.output_dir = str(Path("outputs") / f"{embedded['run_name']}-{model.trainer}")
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("Nothing to do: pass --do_train, --do_eval or --do_predict.")
    if model.report and not (training.do_train and model.trainer == "importance" and importance.record):
        raise ValueError("--report needs --do_train, --trainer importance and --record: pass them, or remove --report.")
    return model, data, training, dataclasses.replace(start, **dataclasses.asdict(importance))
