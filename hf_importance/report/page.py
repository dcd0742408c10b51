"""The report as files: page, tables, plots. What only the extra `report` installs is imported when it is written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_importance.report.findings import Findings
from hf_importance.report.hub import FOLDER
from hf_importance.report.tokens import Token
from hf_importance.report.training import Training

logger = logging.get_logger(__name__)

_CLASSES, _PAIRS = 30, 10  # maximum numbers shown on the page


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        packages = ("jinja2", "matplotlib", "pandas", "pillow", "pyarrow")
        raise ImportError(f"The report requires {', '.join(packages)}: pip install {' '.join(packages)}") from error


def validate_report(
    training: Training | None, folder: Path, examples: Any, number: int, model_folder: Path, examples_to_hub: bool
) -> None:
    """Check the arguments of a report, before anything is written; a push to the Hub must not upload examples."""
    if training is None:
        raise ValueError("importance_report must be called after train().")
    if not training.has_record:
        raise ValueError("importance_report requires ImportanceConfig(record=True), but no visits were recorded.")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"number must be an int of at least 1, but is {number!r}.")
    if len(examples) != training.examples:
        raise ValueError(f"examples must have the {training.examples} items of train_dataset, but has {len(examples)}.")
    folder, model_folder = folder.resolve(), model_folder.resolve()
    if not examples_to_hub and _is_uploaded(folder, model_folder):
        raise ValueError(
            f"output_dir must not be {folder}: pushing to the Hub would upload it with training examples. "
            f"Omit it (the default is {model_folder / f'_{FOLDER}'}), choose a folder outside of {model_folder}, or "
            "allow it with ImportanceTrainer(..., report_examples_to_hub=True)."
        )


def _is_uploaded(folder: Path, model_folder: Path) -> bool:
    if not folder.is_relative_to(model_folder):
        return False
    return folder == model_folder or not folder.relative_to(model_folder).parts[0].startswith(("_", "checkpoint-"))


def write_report(
    folder: Path,
    findings: Findings,
    examples: Any,
    tokenizer: Any,
    number: int,
    title: str,
    tokens: Mapping[int, Sequence[Token]] | None = None,
) -> Path:
    """Write the report: `report.html`, `examples.parquet`, plots, hardest examples, suspects, classes and conflicts.

    The examples, `[examples]`, are images, texts, or dicts with images, texts, `pixel_values` or `input_ids`, for which
    a tokenizer is needed. A list shows `number` of them, `tokens` those of the hardest with their losses.
    """
    with _extra():
        from jinja2 import Environment

        from hf_importance.report import tables
        from hf_importance.report.duplicates import conflicts
        from hf_importance.report.examples import show, write_list
        from hf_importance.report.pictures import picture_url
        from hf_importance.report.plots import write_plots

    folder.mkdir(parents=True, exist_ok=True)
    tables.examples_table(findings).to_parquet(folder / "examples.parquet", index=False)
    raw = examples.with_format(None) if hasattr(examples, "with_format") else examples
    lists = {
        "suspects": [show(findings, raw, tokenizer, i, {}) for i in findings.most_suspect(number)],
        "hardest": [show(findings, raw, tokenizer, i, tokens or {}) for i in findings.hardest(number)],
    }
    for name, shown in lists.items():
        write_list(shown, folder, name)
    classes = tables.classes_table(findings)
    tables.write_csv(classes, folder / "classes.csv")
    duplicates = conflicts(raw, findings.columns["label"]) if findings.is_classification else []
    tables.write_csv(tables.conflicts_table(findings, duplicates), folder / "conflicts.csv")

    template = resources.files("hf_importance.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    text = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            title=title,
            findings=findings,
            settings=findings.settings,
            plots=write_plots(findings, folder),
            lists=lists,
            picture_url=picture_url,
            number_of_suspects=int(findings.columns["suspect"].sum()),
            classes=list(classes.head(_CLASSES).itertuples()),
            more_classes=max(0, len(classes) - _CLASSES),
            pairs=tables.confusions(findings, _PAIRS),
            conflicts=[tables.shown_conflict(findings, conflict) for conflict in duplicates[:number]],
            number_of_conflicts=len(duplicates),
        )
    )
    page = folder / "report.html"
    page.write_text(text, encoding="utf-8", errors="replace")
    return page


def write_for_hub(folder: Path, findings: Findings) -> dict[str, str]:
    """Write plots and importances for the model card, without examples; return names and descriptions of the plots.

    They are empty, with a warning, if a dependency of the report is not installed.
    """
    try:
        with _extra():
            import pandas as pd

            from hf_importance.report.plots import write_plots

    except ImportError as error:
        logger.warning(f"The model card has no plots. {error}")
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: findings.columns[name].numpy() for name in ("importance", "visits", "pruned")}
    pd.DataFrame(columns).to_csv(folder / "importances.csv", index_label="index")
    return {f"{plot['name']}.png": plot["text"] for plot in write_plots(findings, folder)}
