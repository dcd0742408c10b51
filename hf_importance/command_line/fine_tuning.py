"""What the fine-tuning scripts do: load the model, train, evaluate, predict, report, push."""

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


def pretrained(auto_class: Any, model: ModelArguments, name: str, name_of_flag: str, **settings: Any) -> Any:
    """What `auto_class` makes of a name on the Hub, or of a folder.

    Raises:
        ValueError: if it is not there.
    """
    try:
        return auto_class.from_pretrained(name, **settings, **model.hub())
    except OSError as error:
        raise ValueError(f"{name_of_flag}: {name!r} could not be loaded, from a folder or the Hub: {error}") from error


def make_model(auto_class: type, model: ModelArguments, config: PreTrainedConfig | None) -> PreTrainedModel:
    """The named model in float32, by default with the config it was saved with; or a new one."""
    if model.model_name_or_path is None:
        return auto_class.from_config(config)
    settings = {"ignore_mismatched_sizes": model.ignore_mismatched_sizes, "config": config, "dtype": "float32"}
    return pretrained(auto_class, model, model.model_name_or_path, "--model_name_or_path", **settings)


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
    to_show: datasets.Dataset | None,
    predict: Callable[[Trainer, datasets.Dataset], tuple[list[Any], Metrics]],
    evaluate: Callable[[Trainer], Metrics] = methodcaller("evaluate"),
    loss_is_scaled_for_ga: bool | None = None,
    **more: Any,
) -> Trainer:
    """Train, evaluate, predict, report and push as asked; print and save the metrics.

    Args:
        model_arguments: which trainer, and whether to report.
        training: what is to be done, and where it is saved.
        importance: the settings of `ImportanceTrainer`.
        chosen: the data, ready for the model, for `train`, `eval` and `predict`.
        to_show: the training data as people want to see them.
        predict: one prediction, as JSON can hold it, for each row of the data to predict; and metrics of them.
        evaluate: the metrics of an evaluation.
        loss_is_scaled_for_ga: of the plain `Trainer`, where it takes it for something else; ours knows by itself.
        **more: arguments of the trainer.
    """
    sampled, upload = model_arguments.trainer == "importance", model_arguments.report_examples_to_hub
    trainer = (ImportanceTrainer if sampled else Trainer)(
        args=training,
        train_dataset=chosen.get("train"),
        eval_dataset=chosen.get("eval"),
        **({"importance": importance, "report_examples_to_hub": upload} if sampled else {}),
        **more,
    )
    if not sampled:
        trainer.loss_is_scaled_for_ga = loss_is_scaled_for_ga
    if training.do_train:
        _train(trainer, model_arguments.trainer)
    if training.do_eval:
        _report(trainer, "eval", evaluate(trainer))
    if training.do_predict:
        predictions, metrics = predict(trainer, chosen["predict"])
        _report(trainer, "predict", metrics)
        _save_predictions(trainer, predictions)
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


def _save_predictions(trainer: Trainer, predictions: list[Any]) -> None:
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "predictions.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for index, prediction in enumerate(predictions):
                file.write(json.dumps({"index": index, "prediction": prediction}, ensure_ascii=False) + "\n")
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
