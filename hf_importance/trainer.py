"""`ImportanceTrainer`: the hooks of `Trainer` that importance sampling needs; what they do is in `run` and `report`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_importance.adapters.known import adapted_class, adapter_of, has_own_loss
from hf_importance.config import ImportanceConfig
from hf_importance.data.dataset import DRAW_KEY, LABEL_COLUMNS
from hf_importance.data.rows import ROWS_KEY
from hf_importance.errors import UnweightedError
from hf_importance.losses.custom import PerExampleLoss
from hf_importance.losses.objective import Objective
from hf_importance.randomness import isolated_randomness
from hf_importance.report.findings import Findings
from hf_importance.report.hub import (
    CARD,
    FOLDER,
    extend_card,
    extend_card_without_weights,
    pushing,
    warn_of_failed_pushes,
)
from hf_importance.report.logs import limit_console_logs
from hf_importance.report.page import validate_report, write_for_hub, write_report
from hf_importance.report.training import Training
from hf_importance.run.callbacks import RunCallbackHandler
from hf_importance.run.checkpoints import newest_complete
from hf_importance.run.run import ImportanceRun
from hf_importance.run.step import pop_labels
from hf_importance.run.unweighted import UnweightedRun, refuse_unweighted
from hf_importance.run.validation import validate_arguments, validate_training
from hf_importance.sampling.memory import unimportant
from hf_importance.sampling.rates import per_cost
from hf_importance.sampling.suspects import suspects
from hf_importance.upstream import validate_upstream

logger = logging.get_logger(__name__)
validate_upstream()


class ImportanceTrainerMixin:
    """Online importance sampling for a subclass of `Trainer`. It must come first in the bases.

    Args:
        importance: the settings, available as `importance_config`; by default `ImportanceConfig()`.
        per_example_loss_func: `f(outputs, labels) -> Tensor[batch]`, for a loss other than the usual cross-entropy,
            binary cross-entropy or squared error of a classification or regression head. It must be computed from the
            outputs of the model, such as `outputs["logits"]`, independently for each example. `labels` are the collated
            labels, a dict if the model has several label names, or the inputs of the model if there are none. If the
            function has a third argument without a default, or an argument `inputs`, it also gets the inputs of the
            model, without the labels. It is also used in evaluation. Its mean is over all examples of a batch,
            including those with loss 0.
        report_examples_to_hub: whether `push_to_hub` may upload the full report, which shows training examples with
            their labels and predictions; by default, only importances and plots are uploaded.
        *args, **kwargs: as for `Trainer`.

    Raises:
        ValueError: for unsupported arguments, at construction or, if necessary, at the first step. The message names
            the cause and the fix.
    """

    def __init__(
        self,
        *args: Any,
        importance: ImportanceConfig | None = None,
        per_example_loss_func: PerExampleLoss | None = None,
        report_examples_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        self._run: ImportanceRun | UnweightedRun | None = None  # the training in progress, or the last one
        super().__init__(*args, **kwargs)
        validate_upstream(self)
        self.importance_config = ImportanceConfig() if importance is None else importance
        self.per_example_loss_func = per_example_loss_func
        self.report_examples_to_hub = report_examples_to_hub
        self.current_gradient_accumulation_steps = 1  # outside of `train()`; `Trainer` sets it in its loop only
        validate_arguments(self)
        self._unweighted_run(self.lr_scheduler)
        if per_example_loss_func is not None and not self.label_names:
            self._find_label_names()
        limit_console_logs(self.callback_handler.callbacks)
        self._watch_events()

    def _watch_events(self) -> None:
        """Let the run see the events of training, also if the user has replaced the handler of the callbacks."""
        if not isinstance(self.callback_handler, RunCallbackHandler):
            self.callback_handler = RunCallbackHandler(self.callback_handler, self)

    def _unweighted_run(self, schedule: LRScheduler | None = None) -> UnweightedRun | None:
        """Validate the settings; the run if draws cannot be weighted, None if they can."""
        validate_arguments(self)
        if self.train_dataset is None:
            return None
        try:
            adapted = adapted_class(type(self))
            if adapted is not None:
                adapter_of(self, adapted)  # before general checks: its messages are more specific
            validate_training(self, ImportanceTrainerMixin, schedule)
        except UnweightedError as error:
            refuse_unweighted(self.importance_config, error)
            if self.per_example_loss_func is not None and has_own_loss(type(self)):
                raise
            return UnweightedRun(self, str(error))
        return None

    def _find_label_names(self) -> None:
        """Set `label_names` for a model whose `forward` has no labels, if the data has labels for the loss function."""
        data = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        with isolated_randomness():
            example = data[0] if hasattr(data, "__getitem__") and not isinstance(data, dict) and len(data) else {}
        if isinstance(example, Mapping) and set(LABEL_COLUMNS) & set(example):
            self.label_names = ["labels"]
        else:
            self.can_return_loss = True  # otherwise `Trainer` does not evaluate the loss

    @property
    def _active_run(self) -> ImportanceRun | None:
        return self._run if self._run is not None and self._run.active else None

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train like `Trainer.train`. Every call starts with an empty memory, or with that of the checkpoint.

        With `ImportanceConfig(start_from=…)` it starts with the importances of another training.

        `resume_from_checkpoint=True` selects the newest complete checkpoint. `ignore_data_skip` has no effect, because
        skipping batches does not load any data.
        """
        self._watch_events()
        self._run = self._unweighted_run() or ImportanceRun(self, ImportanceTrainerMixin)
        ignored = self.args.ignore_data_skip
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        if isinstance(self._run, ImportanceRun):
            self.args.ignore_data_skip = False
            self._run.resumes = bool(resume_from_checkpoint)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = ignored
            self._run.end()
        self._run.gather_columns()
        for line in self._run.summary():
            self._run.say(line)
        return output

    def _newest_checkpoint(self) -> str | bool:
        newest = newest_complete(self.args.output_dir)
        if newest is not None:
            return str(newest)
        if get_last_checkpoint(self.args.output_dir) is None:
            return True  # no checkpoint at all: `Trainer` raises an error
        logger.warning(f"{self.args.output_dir} has no complete checkpoint: training starts from scratch.")
        return False

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """Number of steps and epochs like `Trainer`, with the dataloader of importance sampling."""
        if self._active_run is None:
            return super().set_initial_training_values(args, dataloader)
        try:
            loader = self._run.begin(dataloader)
        except UnweightedError as error:
            refuse_unweighted(self.importance_config, error)
            self.args.ignore_data_skip = self._run.ignores_data_skip
            self._run = UnweightedRun(self, str(error))
            loader = self._run.begin(dataloader)
        values = super().set_initial_training_values(args, loader)
        self._run.plan(max_steps=values[-1])
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the schedule like `Trainer`; with `effective_epochs` it follows the effective steps."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._active_run is not None:
            self._run.follow(scheduler)
        return scheduler

    def _run_epoch(self, *args: Any, train_dataloader: DataLoader, **kwargs: Any) -> None:
        return super()._run_epoch(*args, train_dataloader=self._run.epoch_loader(train_dataloader), **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Get the batches of a step like `Trainer`."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._active_run is not None:
            self._run.step.begin(batches)
        return batches, items

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Prepare a batch like `Trainer`, without what a collator says of its rows."""
        if isinstance(inputs, MutableMapping):
            inputs.pop(ROWS_KEY, None)
        return super()._prepare_inputs(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a training step like `Trainer`, in `train()` for the batch of a draw."""
        if self._active_run is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with self._run.step.of(model, inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """In a training step, the mean of weight · loss over the batch.

        Elsewhere, and where draws cannot be weighted, the mean of `per_example_loss_func`, or `Trainer.compute_loss` if
        there is none.
        """
        run = self._active_run
        if run is not None and not run.unweighted and (run.step.draw is not None or DRAW_KEY in inputs):
            compute_loss = partial(super().compute_loss, return_outputs=return_outputs)
            try:
                loss, outputs = run.step.loss(compute_loss, model, dict(inputs))
                return (loss, outputs) if return_outputs else loss
            except UnweightedError as error:
                compute_loss = partial(self.compute_loss, num_items_in_batch=num_items_in_batch)
                return run.fall_back(error, partial(compute_loss, model, inputs, return_outputs))
        if run is not None:
            inputs = {name: value for name, value in inputs.items() if name != DRAW_KEY}
        if self.per_example_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}  # Liger: keep logits
        labels = pop_labels(inputs, [name for name in self.label_names or ["labels"] if name in inputs])
        objective = Objective(self.model, per_example_loss_func=self.per_example_loss_func)
        loss, outputs = objective.evaluate(model, inputs, labels)
        return (loss, outputs) if return_outputs else loss

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """Also save the state of importance sampling, before `Trainer` marks the checkpoint as complete."""
        super()._save_rng_state(output_dir)
        if self._active_run is not None:
            self._run.save(output_dir)
            self._save_importances(Path(output_dir))  # now with those of all processes

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, *args: Any
    ) -> tuple[int, int]:
        """Also restore the run, and return epoch and batches of the loop, whose epochs may have been shorter."""
        position = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, *args)
        return position if checkpoint is None else self._run.restore(checkpoint, position, epochs)

    # ---- results -----------------------------------------------------------------------------------------------------

    @property
    def importances(self) -> Tensor:
        """Importances of the training data, float32 `[examples]`, NaN where unknown; suspects times `suspect_weight`.

        After a training they are those of the data that it was on, even if `train_dataset` was exchanged since.

        With several processes, those of other processes are as of the last checkpoint or the end of training, so that
        reading them requires no communication. During training on a GPU they lag one step behind.

        Raises:
            ValueError: if there is no training data.
        """
        if self._training is not None:
            return self._run.columns.importances
        if self.train_dataset is None:
            raise ValueError("importances requires train_dataset, but it is None: pass it to ImportanceTrainer.")
        return torch.full((len(self.train_dataset),), torch.nan, dtype=torch.float32)

    @property
    def kept_indices(self) -> Tensor:
        """Indices into `train_dataset` for `dataset.select`, without the least important examples; int64, ascending.

        It excludes the examples that together hold less than `prune_mass` of the `importances`; per token, if losses
        are sums over tokens.
        """
        importance = self.importances
        if self._training is not None:
            tokens = self._run.lengths.tokens
            importance = per_cost(importance, None if tokens is None else tokens.float())
            down_weighted = self._training.columns().get("down_weighted")
            if down_weighted is not None:  # their importance was scaled
                importance[down_weighted] = torch.nan
        return (~unimportant(importance, self.importance_config.prune_mass)).nonzero().flatten()

    @property
    def suspects(self) -> Tensor:
        """Indices of the examples of `train_dataset` whose label is probably wrong, int64 `[suspects]`, ascending.

        With several processes, the main process has those of all, as of the last checkpoint or the end of training.

        Raises:
            ValueError: before training, with `record=False`, and if draws were not weighted.
        """
        self._validate_weighted("suspects")
        if self._training is None or not self._training.has_record:
            raise ValueError(
                "suspects requires train() with ImportanceConfig(record=True), but no visits were recorded."
            )
        return suspects(self._training.columns()).nonzero().flatten()

    @property
    def _training(self) -> Training | None:
        """Figures of the training; None before it, and if its draws are not weighted."""
        return None if self._run is None or self._run.unweighted else self._run.figures

    def _validate_weighted(self, name: str) -> None:
        if self._run is not None and self._run.unweighted:
            raise ValueError(f"{name} needs measured importances, but draws were not weighted: {self._run.unweighted}")

    def _findings(self) -> Findings:
        """Figures of the examples of all processes, complete in the main process."""
        label_names = getattr(getattr(self.model, "config", None), "id2label", None) or {}
        return self._training.findings(self.state.log_history, label_names, self.importance_config.to_dict())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log like `Trainer.log`, with our measurements next to each training loss."""
        if self._run is not None and "loss" in logs:
            logs.update(self._run.measured())
        if self._run is not None and "train_samples_per_second" in logs:
            logs.update(self._run.at_end())
            logs["train_samples_per_second"] *= self._run.share_of_visits
        super().log(logs, *args, **kwargs)

    # ---- report, model card and Hub ----------------------------------------------------------------------------------

    def importance_report(
        self, output_dir: str | Path | None = None, examples: Any = None, number: int = 24
    ) -> Path | None:
        """Write a report on the training data: a page, a table of all examples, and plots.

        `report.html` is self-contained. `examples.parquet` has one row per training example: `index`, `label`,
        `prediction` and its `probability` (at the last visit, in training mode), `loss` (at the last visit),
        `mean_loss` (over the visits after the first), `suspect`, `importance`, `visits`, `pruned`; null where unknown.

        With several processes, the main process writes the report; see `importances` on how current it is.

        Args:
            output_dir: by default `_importance_report` in `args.output_dir`, which is not pushed to the Hub.
            examples: what to show for each training example, in order, instead of the training data: a sequence whose
                items have an image, texts, `pixel_values` or `input_ids`.
            number: number of examples in each list, at least 1.

        Returns:
            The path of the page; None in other than the main process.

        Raises:
            ValueError: before training, with `record=False`, if draws were not weighted, for an invalid argument, or
                for a folder that a push to the Hub would upload with examples, unless `report_examples_to_hub` is set.
            ImportError: if a dependency of the report is not installed.
        """
        self._validate_weighted("importance_report")
        model_folder = Path(self.args.output_dir)
        folder = model_folder / f"_{FOLDER}" if output_dir is None else Path(output_dir)
        if examples is None and self._training is not None:
            examples = self._run.dataset
        validate_report(self._training, folder, examples, number, model_folder, self.report_examples_to_hub)
        self._run.shown_examples = examples
        return self._write_report(folder, number) if self.is_world_process_zero() else None

    def _write_report(self, folder: Path, number: int) -> Path:
        title, findings = f"Importance report: {Path(self.args.output_dir).resolve().name}", self._findings()
        examples = self._run.dataset if self._run.shown_examples is None else self._run.shown_examples
        is_trained_on = examples is self._run.dataset
        tokens = self._training.token_losses(findings.hardest(number)) if is_trained_on else {}
        return write_report(folder, findings, examples, self.processing_class, number, title, tokens)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model like `Trainer.save_model`, with `importance_config.json`, and `importances.safetensors`.

        The latter, written after or during `train()`, is what `ImportanceConfig(start_from=…)` takes: one number per
        training example and a fingerprint of the data, no training examples. With several processes, the importances of
        other processes are as of the last checkpoint or the end of training.

        If this writes a model card, as in sentence-transformers, the card is extended.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.importance_config.save_pretrained(folder)
        self._save_importances(folder)
        before = _read(folder / CARD)
        super().save_model(output_dir, _internal_call)
        if not _internal_call and _read(folder / CARD) not in (None, before):
            self._extend_card(folder)

    def _save_importances(self, folder: Path) -> None:
        if self._training is not None and self.is_world_process_zero():
            self._run.save_importances(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create a model card like `Trainer`, with tags, a section with plots, and the importances as a csv file.

        Files contain training examples only if `report_examples_to_hub` is set.
        """
        super().create_model_card(*args, **kwargs)
        self._extend_card(Path(self.args.output_dir))

    def _extend_card(self, folder: Path) -> None:
        if not self.is_world_process_zero():
            return
        if self._run is not None and self._run.unweighted:
            extend_card_without_weights(folder / CARD, self._run.unweighted, self._run.summary())
        if self._training is None or not self._training.has_record:
            return
        findings = self._findings()
        plots = write_for_hub(folder / FOLDER, findings)
        if self.report_examples_to_hub:
            self._write_report(folder / FOLDER, number=24)
        extend_card(folder / CARD, findings, plots)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push model, card with plots and `importance_config.json` like `Trainer.push_to_hub`; no training examples.

        Raises:
            PushError: if it fails. Everything is still in `args.output_dir`, and the message says how to retry.
        """
        with pushing(self._repository(), self.args.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository like `Trainer`, which calls this before training if `push_to_hub` is set."""
        with pushing(self._repository(), None if self._training is None else self.args.output_dir):
            super().init_hf_repo(*args, **kwargs)

    def _finish_current_push(self) -> None:
        """Also warn if a push during training failed, which `Trainer` does not report."""
        super()._finish_current_push()
        warn_of_failed_pushes(getattr(self, "push_in_progress", None))

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name


class ImportanceTrainer(ImportanceTrainerMixin, Trainer):
    """`Trainer` with online importance sampling. It takes the arguments of both, see [`ImportanceTrainerMixin`]."""


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
