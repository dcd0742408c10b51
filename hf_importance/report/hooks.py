"""The hooks into `Trainer` for what people look at: logs, report, model card, Hub."""

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

_REPORT_NEEDS = "jinja2, matplotlib, pillow and pyarrow: pip install 'hf_importance[report]'"


class ReportMixin(ABC):
    """The part of [`ImportanceTrainerMixin`] that shows what was learnt. It changes nothing in training."""

    report_examples_to_hub: bool
    _examples_to_show: Any = None

    @abstractmethod
    def _training(self) -> Training | None:
        """What there is to be told; None before anything was trained."""

    # ---- logs --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; beside a training loss it puts what was measured since the last one."""
        training = self._training()
        if training is not None and "loss" in logs:
            logs.update(training.measured())
        if training is not None and "train_runtime" in logs and training.progress is not None:
            progress = training.progress
            logs["train_samples_per_second"] *= self.state.max_steps / progress.steps  # not all of them were made
            logs["train_effective_epochs"] = min(progress.value, progress.steps) / progress.steps_per_epoch
            logs["train_share_of_steps"] = self.state.global_step / progress.steps
            if (tokens := training.share_of_tokens(self.state.global_step)) is not None:
                logs["train_share_of_tokens"] = tokens
        super().log(logs, *args, **kwargs)

    def _summarise(self) -> None:
        """Say what was won."""
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
        """Write what was learnt about the data: a page, a table of all examples, plots.

        `report.html` shows it all, with no network. `examples.parquet` has a row per training example: `index`,
        `label`, `prediction` and its `probability` (as seen at the last visit, in training mode), `loss` (then),
        `mean_loss` (over the visits after the first), `suspect`, `importance`, `visits`, `pruned`; null where unknown.

        With several processes the first one writes, and what it writes is as `importances`.

        Args:
            output_dir: by default `_importance_report` in `args.output_dir`, which pushing to the Hub leaves out.
            examples: what to show of each training example, in their order, if not `train_dataset` itself: anything
                with a length and positions whose items have an image, texts, `pixel_values` or `input_ids`.
            number: of examples to show in each list, at least 1.

        Returns:
            The path of the page; None in other processes than the first.

        Raises:
            ValueError: before training, with `record=False`, for an argument that does not fit, or for a folder whose
                examples a push to the Hub would upload, unless `report_examples_to_hub` allows it.
            ImportError: where what draws the report is not installed.
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
        """Of the examples of all processes, in the first of them."""
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
        """As `Trainer.save_model`, with `importance_config.json` beside the model.

        Where that writes a model card, as sentence-transformers does, it gets what ours has.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.importance_config.save_pretrained(folder)
        before = _read(folder / CARD)
        super().save_model(output_dir, _internal_call)
        if not _internal_call and _read(folder / CARD) not in (None, before):
            self._extend_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, with tags and a section of ours, its plots, and the importances as a table.

        Training examples are among the files only if `report_examples_to_hub`.
        """
        super().create_model_card(*args, **kwargs)
        self._extend_card(Path(self.args.output_dir))

    def _extend_card(self, folder: Path) -> None:
        training = self._training()
        if training is not None and training.has_record and self.is_world_process_zero():
            findings = self._findings()
            extend_card(folder / CARD, findings, self._write_for_hub(folder / FOLDER, findings))

    def _write_for_hub(self, folder: Path, findings: Findings) -> dict[str, str]:
        """Returns the names of the plots, and what they show."""
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
        """As `Trainer.push_to_hub`: model, card with plots, `importance_config.json`; no training examples.

        Raises:
            PushError: if it fails. Everything is still in `args.output_dir`, and the message says how to try again.
        """
        with pushing(self._repository(), self.args.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.init_hf_repo`, which `--push_to_hub` has called before anything is trained."""
        with pushing(self._repository(), None if self._training() is None else self.args.output_dir):
            super().init_hf_repo(*args, **kwargs)

    def _finish_current_push(self) -> None:
        """As in `Trainer`, which says nothing if a push during training failed."""
        super()._finish_current_push()
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", ()):
            if not job.cancelled() and job.exception() is not None:
                logger.warning(f"A push to the Hub failed during training, which continued: {job.exception()}")

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
