"""What the fine-tuning scripts share: flags, the choice of the trainer, and what is done with it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_importance.command_line.arguments import DataArguments, ModelArguments
from hf_importance.command_line.metrics import decide, metric_for
from hf_importance.config import ImportanceConfig
from hf_importance.report.hub import PushError
from hf_importance.trainer import ImportanceTrainer


def load(data: DataArguments, model: ModelArguments) -> datasets.DatasetDict:
    """The named files or data set, its splits called train, validation and test.

    Raises:
        ValueError: if a file or split is missing, or of a kind that cannot be read.
    """
    if data.files():
        return datasets.load_dataset(_kind_of(data.files()), data_files=data.files(), cache_dir=model.cache_dir)
    found = datasets.load_dataset(
        data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir, token=model.token
    )
    names = {"train": data.train_split_name, "validation": data.validation_split_name, "test": data.test_split_name}
    for split, name in names.items():
        if name is not None and name not in found:
            raise ValueError(f"--{split}_split_name must be one of {list(found)}, but is {name!r}.")
    splits = {split: name or split for split, name in names.items()}
    return datasets.DatasetDict({split: found[name] for split, name in splits.items() if name in found})


def _kind_of(files: dict[str, str]) -> str:
    kinds = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
    for split, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"--{split}_file must be a file, but {path!r} does not exist.")
        if Path(path).suffix[1:] not in kinds:
            raise ValueError(f"--{split}_file must be csv, json, jsonl or parquet, but is {path!r}.")
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
    return chosen


def require_column(rows: datasets.Dataset, name: str | None, usual: tuple[str, ...], name_of_flag: str) -> str:
    """The named column, or the first of the usual ones that is there."""
    found = [name] if name in rows.column_names else [column for column in usual if column in rows.column_names]
    if (name is not None and found != [name]) or not found:
        wanted = repr(name) if name is not None else " or ".join(map(repr, usual))
        raise ValueError(f"{name_of_flag}: no column {wanted} in the data, which has {rows.column_names}.")
    return found[0]


def label_column(chosen: dict[str, datasets.Dataset], data: DataArguments) -> str | None:
    """The column with the labels. The data for --do_predict need not have one: None if there is no other data."""
    usual, name_of_flag = ("label", "labels"), "--label_column_name"
    found = [
        require_column(rows, data.label_column_name, usual, name_of_flag)
        for use, rows in chosen.items()
        if use != "predict" or data.label_column_name in rows.column_names or {*usual} & {*rows.column_names}
    ]
    return found[0] if found else None


def drop_missing_labels(chosen: dict[str, datasets.Dataset], label: str | None) -> dict[str, datasets.Dataset]:
    """Without the labels of the data to predict, if some are missing there (empty, or −1 as in many test sets).

    Raises:
        ValueError: if a label is missing elsewhere.
    """
    kept = {}
    for use, rows in chosen.items():
        if label in rows.column_names and any(value in (None, -1) for value in _labels_of(rows, label)):
            if use != "predict":
                raise ValueError(f"The {use} data has rows without a label in the column {label!r}: remove them.")
            rows = rows.remove_columns(label)
        kept[use] = rows
    return kept


def _labels_of(rows: datasets.Dataset, label: str) -> set[Any]:
    """All different ones. Class labels are numbers here; a number that is no class may be −1."""
    values, feature = rows.with_format(None)[label], rows.features[label]
    if isinstance(feature, datasets.List):
        return {value for row in values for value in (row if row is not None else [None])}
    missing = (None, -1) if isinstance(feature, datasets.ClassLabel) else (None,)
    return {None if value in missing else value for value in values}


def label_names(chosen: dict[str, datasets.Dataset], label: str) -> list[str]:
    """The labels, in the order of their numbers: those of the data set if it knows them, else of the training data."""
    feature = chosen["train"].features[label]
    feature = feature.feature if isinstance(feature, datasets.List) else feature
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    return [str(value) for value in sorted(_labels_of(chosen["train"], label))]


def label_reader(rows: datasets.Dataset, label: str, numbers: dict[str, int]) -> Callable[[Any], int]:
    """From a label as the data has it to its number in the model, whose `label2id` is `numbers`.

    Labels are known by their names. Whole numbers are also taken as they are, for models whose labels have no names of
    their own (LABEL_0, …).
    """
    feature = rows.features[label]
    feature = feature.feature if isinstance(feature, datasets.List) else feature
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def read(value: Any) -> int:
        name = str(value) if names is None else names[value]
        if name in numbers:
            return numbers[name]
        if isinstance(value, int) and 0 <= value < len(numbers):
            return value
        raise ValueError(f"The column {label!r} has the label {name!r}, but the model only knows {list(numbers)[:20]}.")

    return read


def head_settings(names: list[str], problem_type: str) -> dict[str, Any]:
    """What the config of a model says of its labels."""
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "num_labels": len(names),
        "label2id": numbers,
        "id2label": dict(enumerate(names)),
        "problem_type": problem_type,
    }


def make_model(auto_class: type, model: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The named model in float32, or a new one."""
    if model.model_name_or_path is None:
        return auto_class.from_config(config)
    settings = {"ignore_mismatched_sizes": model.ignore_mismatched_sizes, **model.hub()}
    return auto_class.from_pretrained(model.model_name_or_path, config=config, dtype="float32", **settings)


class _Clock(TrainerCallback):
    """Seconds of training without the evaluations in between."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self._since


def run(
    model_arguments: ModelArguments,
    training: TrainingArguments,
    importance: ImportanceConfig,
    chosen: dict[str, datasets.Dataset],
    problem_type: str,
    to_show: datasets.Dataset | None,
    **more: Any,
) -> Trainer:
    """Train, evaluate, predict, report and push as asked; print and save the metrics.

    `to_show`: the training data as people want to see them. `more`: arguments of the trainer.
    """
    sampled, upload = model_arguments.trainer == "importance", model_arguments.report_examples_to_hub
    trainer = (ImportanceTrainer if sampled else Trainer)(
        args=training,
        train_dataset=chosen.get("train"),
        eval_dataset=chosen.get("eval"),
        compute_metrics=metric_for(problem_type, model_arguments.metric_name),
        **({"importance": importance, "report_examples_to_hub": upload} if sampled else {}),
        **more,
    )
    if not sampled:
        trainer.loss_is_scaled_for_ga = False  # transformers issue 47688: else accumulation multiplies the step
    if training.do_train:
        _train(trainer, model_arguments.trainer)
    if training.do_eval:
        _report(trainer, "eval", trainer.evaluate())
    if training.do_predict:
        _predict(trainer, chosen["predict"], problem_type)
    if model_arguments.report:
        page = trainer.importance_report(examples=to_show)
        if page is not None:
            print(f"\nThe report was saved as {page}")
    if training.push_to_hub:
        trainer.push_to_hub()
    elif training.do_train:
        trainer.create_model_card()
    if training.do_train:
        print(f"\nThe model was saved in {training.output_dir}")
    return trainer


def _train(trainer: Trainer, name: str) -> None:
    clock = _Clock()
    trainer.add_callback(clock)
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    budget = trainer.importance_config.budget if name == "importance" else 1.0
    examples = len(trainer.train_dataset) * (1.0 if budget == "auto" else budget)
    metrics["trainer"] = name
    metrics["examples_per_epoch"] = round(examples)
    metrics["examples_processed"] = round(trainer.state.epoch * examples)
    metrics["seconds_of_training"] = round(clock.seconds, 3)
    trainer.save_model()
    trainer.save_state()
    _report(trainer, "train", metrics)


def _report(trainer: Trainer, split: str, metrics: dict[str, Any]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def _predict(trainer: Trainer, rows: datasets.Dataset, problem_type: str) -> None:
    output = trainer.predict(rows, metric_key_prefix="predict")
    _report(trainer, "predict", output.metrics)
    names = trainer.model.config.id2label
    path = Path(trainer.args.output_dir) / "predictions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index, decision in enumerate(decide(output.predictions, problem_type).tolist()):
            if problem_type == "single_label_classification":
                decision = names[decision]
            elif problem_type == "multi_label_classification":
                decision = [names[k] for k, present in enumerate(decision) if present]
            file.write(json.dumps({"index": index, "prediction": decision}, ensure_ascii=False) + "\n")
    print(f"\nThe predictions were saved in {path}")


def start(training: TrainingArguments) -> None:
    """Seed, and logging at the level that was asked for."""
    transformers.logging.set_verbosity(training.get_process_log_level())
    set_seed(training.seed)


def script(main: Callable[[], Any]) -> None:
    """Run `main`; of a mistake in the flags or the data show what it says, not where in our code it was found."""
    try:
        main()
    except (ValueError, PushError) as error:
        sys.exit(f"error: {error}")
