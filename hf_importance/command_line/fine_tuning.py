"""Steps of the fine-tuning scripts: load the model, train, evaluate, predict, report, push to the Hub."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_importance.command_line.arguments import ModelArguments
from hf_importance.config import ImportanceConfig
from hf_importance.report.hub import PushError
from hf_importance.trainer import ImportanceTrainer

Metrics = dict[str, float]


def pretrained(auto_class: Any, model: ModelArguments, name: str, flag: str, **settings: Any) -> Any:
    """Load a model, config, tokenizer or image processor from the Hub or a folder.

    Args:
        auto_class: class whose `from_pretrained` loads it.
        model: settings of the Hub.
        name: name on the Hub, or path of a folder.
        flag: flag that sets the name, for the error message.
        **settings: further arguments of `from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(name, **settings, **model.hub())
    except OSError as error:
        raise ValueError(f"{flag} must be on the Hub or a folder, but {name!r} could not be loaded: {error}") from error


def make_model(auto_class: type, model: ModelArguments, config: PreTrainedConfig | None) -> PreTrainedModel:
    """Load `--model_name_or_path` in float32, or create an untrained model without it.

    Args:
        auto_class: class of the model, such as `AutoModelForCausalLM`.
        model: flags of the model.
        config: config of the model; None for the one that the model was saved with.
    """
    if model.model_name_or_path is None:
        return auto_class.from_config(config)
    settings = {"ignore_mismatched_sizes": model.ignore_mismatched_sizes, "config": config, "dtype": "float32"}
    return pretrained(auto_class, model, model.model_name_or_path, "--model_name_or_path", **settings)


class _Clock(TrainerCallback):
    """Measures the seconds of training, without evaluations."""

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
    prepared: dict[str, datasets.Dataset],
    report_examples: datasets.Dataset | None,
    predict: Callable[[Trainer, datasets.Dataset], tuple[list[Any], Metrics]],
    evaluate: Callable[[Trainer], Metrics] = methodcaller("evaluate"),
    loss_is_scaled_for_ga: bool | None = None,
    **more: Any,
) -> Trainer:
    """Train, evaluate, predict, report and push to the Hub, as the flags say; print and save the metrics.

    Args:
        model_arguments: which trainer to use, and whether to write a report.
        training: which steps to run, and where to save the results.
        importance: settings of `ImportanceTrainer`.
        prepared: inputs of the model for `train`, `eval` and `predict`.
        report_examples: the training examples as the report shows them.
        predict: returns the predictions for a dataset, one JSON value per example, and their metrics.
        evaluate: evaluates and returns the metrics.
        loss_is_scaled_for_ga: attribute of the plain `Trainer`, None for automatic detection. `ImportanceTrainer`
            does not need it.
        **more: further arguments of the trainer.
    """
    is_importance, upload = model_arguments.trainer == "importance", model_arguments.report_examples_to_hub
    trainer = (ImportanceTrainer if is_importance else Trainer)(
        args=training,
        train_dataset=prepared.get("train"),
        eval_dataset=prepared.get("eval"),
        **({"importance": importance, "report_examples_to_hub": upload} if is_importance else {}),
        **more,
    )
    if not is_importance:
        trainer.loss_is_scaled_for_ga = loss_is_scaled_for_ga
    if training.do_train:
        _train(trainer, model_arguments.trainer)
    if training.do_eval:
        _log_and_save(trainer, "eval", evaluate(trainer))
    if training.do_predict:
        predictions, metrics = predict(trainer, prepared["predict"])
        _log_and_save(trainer, "predict", metrics)
        _save_predictions(trainer, predictions)
    if model_arguments.report:
        page = trainer.importance_report(examples=report_examples)
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
    _log_and_save(trainer, "train", metrics)


def _log_and_save(trainer: Trainer, split: str, metrics: dict[str, Any]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def _save_predictions(trainer: Trainer, predictions: list[Any]) -> None:
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predictions.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for index, prediction in enumerate(predictions):
                file.write(json.dumps({"index": index, "prediction": prediction}, ensure_ascii=False) + "\n")
        print(f"\nThe predictions were saved in {path}")


def set_seed_and_logging(training: TrainingArguments) -> None:
    """Set the seed and the log level."""
    transformers.logging.set_verbosity(training.get_process_log_level())
    set_seed(training.seed)


def script(main: Callable[[], Any]) -> None:
    """Run `main`; errors in the flags, the data or an upload are printed without a traceback."""
    try:
        main()
    except (ValueError, PushError) as error:
        sys.exit(f"error: {error}")
