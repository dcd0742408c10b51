"""The report as files: page, tables, plots."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from jinja2 import Environment
from matplotlib.figure import Figure

from hf_importance.report.duplicates import Conflict, conflicts
from hf_importance.report.examples import ShownExample, Token, png_url, show
from hf_importance.report.findings import ClassFindings, Findings
from hf_importance.report.plots import THEMES, plots
from hf_importance.report.texts import cut, readable

_PER_ROW = 6  # images per row of a contact sheet
_CLASSES, _PAIRS = 30, 10
"""Maximum numbers shown on the page."""
_LABELS = 10
"""Labels shown per group of duplicates."""
_FORMULA = ("=", "+", "-", "@")
"""Prefixes that spreadsheets interpret as a formula."""


def write_table(findings: Findings, path: Path) -> None:
    """Write a parquet file with one row per training example, in order; null where unknown."""
    columns = findings.columns
    number = _whole if findings.is_classification else _or_null
    rows: dict[str, Any] = {"label": number(columns["label"]), "prediction": number(columns["prediction"])}
    if findings.label_names and findings.is_classification:
        for name in ("label", "prediction"):
            names, which = findings.names_of(columns[name])
            rows[f"{name}_name"] = pa.array(names, pa.string()).take(pa.array(which.numpy(), mask=(which < 0).numpy()))
    rows |= {name: _or_null(columns[name]) for name in ("probability", "loss", "mean_loss")}
    rows["suspect"] = columns["suspect"].numpy() if findings.is_classification else pa.nulls(len(findings), pa.bool_())
    pq.write_table(_importances(findings, rows), path)


def write_importances(findings: Findings, path: Path) -> None:
    """Write a csv file with one row per training example, without their contents."""
    pa_csv.write_csv(_importances(findings, {}), path)


def _importances(findings: Findings, more: Mapping[str, Any]) -> pa.Table:
    columns = findings.columns
    rows = {"index": range(len(findings)), **more, "importance": _or_null(columns["importance"])}
    rows |= {"visits": columns["visits"].numpy(), "pruned": columns["pruned"].numpy()}
    return pa.table({name: pa.array(values) for name, values in rows.items()})


def _or_null(values: torch.Tensor) -> pa.Array:
    return pa.array(values.numpy(), from_pandas=True)  # NaN becomes null


def _whole(values: torch.Tensor) -> pa.Array:
    return pa.array(values.nan_to_num(nan=0.0).long().numpy(), mask=values.isnan().numpy())


def write_plots(findings: Findings, folder: Path) -> dict[str, str]:
    """Write the plots with the light theme into a folder; return file names and descriptions."""
    written = {}
    for plot in plots(findings):
        (folder / f"{plot.name}.png").write_bytes(plot.png("light"))
        written[f"{plot.name}.png"] = plot.text
    return written


def write_report(
    folder: Path,
    findings: Findings,
    examples: Any,
    tokenizer: Any,
    number: int,
    title: str,
    tokens: Mapping[int, Sequence[Token]] | None = None,
    quiet: bool = True,
) -> Path:
    """Write the report: `report.html`, `examples.parquet`, plots, hardest examples, suspects, classes and conflicts.

    Args:
        folder: created if needed.
        findings: figures of the training.
        examples: `[examples]`, images, texts, or dicts with images, texts, `pixel_values` or `input_ids`.
        tokenizer: decodes `input_ids`; may be None.
        number: number of examples per list.
        title: title of the page.
        tokens: tokens of the hardest examples with their losses.
        quiet: whether to hide progress bars.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_table(findings, folder / "examples.parquet")
    drawn = _draw_plots(findings, folder)
    raw = examples.with_format(None) if hasattr(examples, "with_format") else examples
    lists = {
        "suspects": [show(findings, raw, tokenizer, i, {}) for i in findings.most_suspect(number)],
        "hardest": [show(findings, raw, tokenizer, i, tokens or {}) for i in findings.hardest(number)],
    }
    for name, shown in lists.items():
        _write_list(folder, name, shown)
    classes = findings.by_class()
    _write_csv(folder / "classes.csv", [field.name for field in fields(ClassFindings)], map(astuple, classes))
    found = conflicts(raw, findings.columns["label"], quiet) if findings.is_classification else []
    rows = ((k, i, findings.name_of(y)) for k, c in enumerate(found) for i, y in zip(c.index, c.labels, strict=True))
    _write_csv(folder / "conflicts.csv", ("group", "index", "label"), rows)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        resources.files("hf_importance.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    page = folder / "report.html"
    more = {
        "classes": classes[:_CLASSES],
        "more_classes": len(classes[_CLASSES:]),
        "pairs": findings.confused_pairs(_PAIRS),
    }
    more |= {"conflicts": [_conflict_row(findings, c) for c in found[:number]], "number_of_conflicts": len(found)}
    more["number_of_suspects"] = int(findings.columns["suspect"].sum())
    text = template.render(title=title, findings=findings, plots=drawn, lists=lists, settings=findings.settings, **more)
    page.write_text(text, encoding="utf-8", errors="replace")
    return page


def _draw_plots(findings: Findings, folder: Path) -> list[dict[str, str]]:
    """Write the plots like [`write_plots`]; return title, description and images of both themes, each rendered once."""
    drawn = []
    for plot in plots(findings):
        images = {theme: plot.png(theme) for theme in THEMES}
        (folder / f"{plot.name}.png").write_bytes(images["light"])
        drawn.append({"title": plot.title, "text": plot.text} | {theme: png_url(png) for theme, png in images.items()})
    return drawn


def _conflict_row(findings: Findings, conflict: Conflict) -> dict[str, Any]:
    """Text of a conflict, and the examples with each label."""
    found: dict[float, list[int]] = {}
    for i, label in zip(conflict.index, conflict.labels, strict=True):
        found.setdefault(label, []).append(i)
    first = {findings.name_of(label): index for label, index in list(found.items())[:_LABELS]}
    return {"text": cut(readable(conflict.text), 200), "labels": first, "more": max(0, len(found) - _LABELS)}


def _write_list(folder: Path, name: str, shown: Sequence[ShownExample]) -> None:
    """Write a contact sheet of the examples with images, and a table of the others."""
    pictured = [example for example in shown if example.picture is not None]
    (folder / f"{name}.png").unlink(missing_ok=True)
    if pictured:
        (folder / f"{name}.png").write_bytes(_contact_sheet(pictured))
    columns = ("index", "label", "prediction", "probability", "importance", "mean_loss", "visits", "text")
    rows = ([getattr(example, column) for column in columns] for example in shown if example.picture is None)
    _write_csv(folder / f"{name}.csv", columns, rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a csv file with escaped formulas; without rows, remove the file of an earlier report."""
    rows = [[_escape_formula(cell) for cell in row] for row in rows]
    path.unlink(missing_ok=True)
    if rows:
        with path.open("w", encoding="utf-8", newline="", errors="replace") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([columns, *rows])


def _escape_formula(cell: Any) -> Any:
    """Prepend an apostrophe to cells that a spreadsheet would evaluate, except numbers.

    >>> _escape_formula("=1+1"), _escape_formula("-1.5")
    ("'=1+1", '-1.5')
    """
    if not isinstance(cell, str) or not cell.strip().startswith(_FORMULA):
        return cell
    with contextlib.suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"


def _contact_sheet(shown: Sequence[ShownExample]) -> bytes:
    rows = -(-len(shown) // _PER_ROW)
    figure = Figure(figsize=(1.7 * _PER_ROW, 2.0 * rows), layout="constrained")
    for place, example in enumerate(shown, 1):
        axes = figure.add_subplot(rows, _PER_ROW, place)
        axes.imshow(np.asarray(example.picture), interpolation="nearest")
        caption = f"{example.index}: {cut(example.label, 18)}\n→ {cut(example.prediction, 18)} {example.probability}"
        axes.set_title(caption, fontsize=8, parse_math=False)
        axes.set_axis_off()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
