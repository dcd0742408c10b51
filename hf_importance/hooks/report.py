"""The hooks into `Trainer` for logs, report, model card and Hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_importance.report.findings import Findings
from hf_importance.report.hub import CARD, FOLDER, extend_card, pushing
from hf_importance.report.logs import say
from hf_importance.report.training import Training

logger = logging.get_logger(__name__)

_REPORT_NEEDS = "jinja2, matplotlib, pillow and pyarrow: pip install jinja2 matplotlib pillow pyarrow"


class ReportMixin(ABC):
    """The part of [`trainer.ImportanceTrainerMixin`] for logs and reports. It does not affect training."""

    report_examples_to_hub: bool
    _examples_to_show: Any = None

    @abstractmethod
    def _training(self) -> Training | None:
        """Figures of the training run; None before training."""

    # ---- logs --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log like `Trainer.log`, with our measurements next to each training loss."""
        training = self._training()
        if training is not None and "loss" in logs:
            logs.update(training.measured())
        if training is not None and "train_runtime" in logs and training.progress is not None:
            progress = training.progress
            logs["train_samples_per_second"] *= self.state.max_steps / progress.steps  # relative to the steps made
            logs["train_effective_epochs"] = min(progress.value, progress.steps) / progress.steps_per_epoch
            logs["train_share_of_steps"] = self.state.global_step / progress.steps
            if (tokens := training.share_of_tokens(self.state.global_step)) is not None:
                logs["train_share_of_tokens"] = tokens
        elif "train_runtime" in logs and self.args.max_steps <= 0 and self.importance_config.budget != "auto":
            logs["train_samples_per_second"] *= self.importance_config.budget
        super().log(logs, *args, **kwargs)

    def _summarise(self) -> None:
        """Print a summary of the training."""
        training = self._training()
        if training.progress is not None and training.progress.finished:
            steps, planned = self.state.global_step, training.progress.steps
            tokens = training.share_of_tokens(steps)
            self._say(
                f"Importance sampling: ended after {steps:,} of {planned:,} steps ({steps / planned:.0%})"
                f"{'' if tokens is None else f', with {tokens:.0%} of the tokens'}."
            )
        if training.has_record and self.is_world_process_zero():
            self._say(self._findings().summary())

    def _say(self, line: str) -> None:
        if self.is_world_process_zero():
            say(line)

    # ---- report ------------------------------------------------------------------------------------------------------

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
            examples: what to show for each training example, in order, instead of `train_dataset`: a sequence whose
                items have an image, texts, `pixel_values` or `input_ids`.
            number: number of examples in each list, at least 1.

        Returns:
            The path of the page; None in other than the main process.

        Raises:
            ValueError: before training, with `record=False`, for an invalid argument, or for a folder that a push to
                the Hub would upload with examples, unless `report_examples_to_hub` is set.
            ImportError: if a dependency of the report is not installed.
        """
        folder = Path(self.args.output_dir) / f"_{FOLDER}" if output_dir is None else Path(output_dir)
        examples = self.train_dataset if examples is None else examples
        self._refuse_report(folder, examples, number)
        self._examples_to_show = examples
        if not self.is_world_process_zero():
            return None
        return self._write_report(folder, self._findings(), examples, number)

    def _write_report(self, folder: Path, findings: Findings, examples: Any, number: int) -> Path:
        try:
            from hf_importance.report.page import write_report
        except ImportError as error:
            raise ImportError(f"importance_report requires {_REPORT_NEEDS} ({error})") from error
        title = f"Importance report: {Path(self.args.output_dir).resolve().name}"
        tokens = {} if examples is not self.train_dataset else self._training().token_losses(findings.hardest(number))
        quiet = self.args.disable_tqdm
        return write_report(folder, findings, examples, self.processing_class, number, title, tokens, quiet)

    def _refuse_report(self, folder: Path, examples: Any, number: int) -> None:
        training = self._training()
        if training is None:
            raise ValueError("importance_report must be called after train().")
        if not training.has_record:
            raise ValueError("importance_report requires ImportanceConfig(record=True), but no visits were recorded.")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"number must be an int of at least 1, but is {number!r}.")
        if not hasattr(examples, "__len__") or len(examples) != training.examples:
            found = f"has {len(examples)}" if hasattr(examples, "__len__") else f"is a {type(examples).__name__}"
            raise ValueError(f"examples must have the {training.examples} items of train_dataset, but {found}.")
        model, folder = Path(self.args.output_dir).resolve(), folder.resolve()
        inside = folder == model or model in folder.parents
        excluded = inside and folder != model and folder.relative_to(model).parts[0].startswith(("_", "checkpoint-"))
        if inside and not excluded and not self.report_examples_to_hub:
            raise ValueError(
                f"output_dir must not be {folder}: pushing to the Hub would upload it with training examples. "
                f"Omit it (the default is {model / f'_{FOLDER}'}), choose a folder outside of {model}, or allow it "
                "with ImportanceTrainer(..., report_examples_to_hub=True)."
            )

    def _findings(self) -> Findings:
        """Figures of the examples of all processes, complete in the main process."""
        config, training = getattr(self.model, "config", None), self._training()
        return Findings(
            columns=training.columns(),
            distributions=training.distributions,
            history=self.state.log_history,
            label_names=getattr(config, "id2label", None) or {},
            settings=asdict(self.importance_config),
        )

    # ---- model card and Hub ------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model like `Trainer.save_model`, together with `importance_config.json`.

        If this writes a model card, as in sentence-transformers, the card is extended.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.importance_config.save_pretrained(folder)
        before = _read(folder / CARD)
        super().save_model(output_dir, _internal_call)
        if not _internal_call and _read(folder / CARD) not in (None, before):
            self._extend_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create a model card like `Trainer`, with tags, a section with plots, and the importances as a csv file.

        Files contain training examples only if `report_examples_to_hub` is set.
        """
        super().create_model_card(*args, **kwargs)
        self._extend_card(Path(self.args.output_dir))

    def _extend_card(self, folder: Path) -> None:
        training = self._training()
        if training is not None and training.has_record and self.is_world_process_zero():
            findings = self._findings()
            extend_card(folder / CARD, findings, self._write_for_hub(folder / FOLDER, findings))

    def _write_for_hub(self, folder: Path, findings: Findings) -> dict[str, str]:
        """Write the files for the Hub; return the names and descriptions of the plots."""
        try:
            from hf_importance.report.page import write_importances, write_plots
        except ImportError as error:
            logger.warning(f"The model card has no plots: they require {_REPORT_NEEDS} ({error})")
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        write_importances(findings, folder / "importances.csv")
        if self.report_examples_to_hub:
            examples = self.train_dataset if self._examples_to_show is None else self._examples_to_show
            self._write_report(folder, findings, examples, number=24)
        return write_plots(findings, folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push model, card with plots and `importance_config.json` like `Trainer.push_to_hub`; no training examples.

        Raises:
            PushError: if it fails. Everything is still in `args.output_dir`, and the message says how to retry.
        """
        with pushing(self._repository(), self.args.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository like `Trainer`, which calls this before training if `push_to_hub` is set."""
        with pushing(self._repository(), None if self._training() is None else self.args.output_dir):
            super().init_hf_repo(*args, **kwargs)

    def _finish_current_push(self) -> None:
        """Also warn if a push during training failed, which `Trainer` does not report."""
        super()._finish_current_push()
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", ()):
            if not job.cancelled() and job.exception() is not None:
                logger.warning(f"A push to the Hub failed during training, which continued: {job.exception()}")

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
