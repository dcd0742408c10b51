"""The examples that a report shows, and the report as files: a page, a table, pictures."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from PIL import Image

from hf_importance.report.findings import Findings
from hf_importance.report.plots import plots

_LONGEST_TEXT = 500
_LARGEST_PICTURE = 160  # pixels per side
_PER_ROW = 6  # of a contact sheet


@dataclass(frozen=True)
class Shown:
    """One example as it is shown: a picture, or a text, or neither."""

    index: int
    label: str
    prediction: str
    probability: str
    importance: str
    mean_loss: str
    visits: int
    suspect: bool
    text: str | None = None
    picture: Image.Image | None = None

    @property
    def picture_url(self) -> str:
        """The picture itself, as a URL."""
        buffer = BytesIO()
        self.picture.save(buffer, format="PNG")
        return _url(buffer.getvalue())

    @property
    def alternative(self) -> str:
        """What to read where the picture is not seen."""
        return f"Training example {self.index}, labelled {self.label}, predicted {self.prediction}"


def write_table(findings: Findings, path: Path) -> None:
    """Write a parquet file with a row per training example, in their order; null is what is not known."""
    columns = findings.columns
    number = _whole if findings.decides else _or_null
    rows: dict[str, Any] = {"label": number(columns["label"]), "prediction": number(columns["prediction"])}
    if findings.label_names and findings.decides:
        for name in ("label", "prediction"):
            named = [None if value != value else findings.name_of(value) for value in columns[name].tolist()]
            rows[f"{name}_name"] = pa.array(named, pa.string())
    rows |= {name: _or_null(columns[name]) for name in ("probability", "loss", "mean_loss")}
    rows["suspect"] = columns["suspect"].numpy() if findings.decides else pa.nulls(len(findings), pa.bool_())
    pq.write_table(_importances(findings, rows), path)


def write_importances(findings: Findings, path: Path) -> None:
    """Write a csv file with a row per training example: what tells nothing of the examples themselves."""
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
    """Write the plots into the folder, for a light page; returns the names of the files, and what they show."""
    written = {}
    for plot in plots(findings):
        (folder / f"{plot.name}.png").write_bytes(plot.png("light"))
        written[f"{plot.name}.png"] = plot.text
    return written


def write_report(folder: Path, findings: Findings, examples: Any, tokenizer: Any, number: int, title: str) -> Path:
    """Write all of it: `report.html`, `examples.parquet`, plots, and what is hardest and most suspect.

    Args:
        folder: is made if it is not there.
        findings: what there is to say.
        examples: `[examples]`, what to show of each: dicts with an image, texts, `pixel_values` or `input_ids`.
        tokenizer: decodes `input_ids`; may be None.
        number: of examples in each list.
        title: of the page.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_table(findings, folder / "examples.parquet")
    write_plots(findings, folder)
    raw = examples.with_format(None) if hasattr(examples, "with_format") else examples
    lists = {
        "suspects": [_shown(findings, raw, tokenizer, i) for i in findings.most_suspect(number)],
        "hardest": [_shown(findings, raw, tokenizer, i) for i in findings.hardest(number)],
    }
    for name, shown in lists.items():
        _write_list(folder, name, shown)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        resources.files("hf_importance.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    page = folder / "report.html"
    drawn = [
        {"title": plot.title, "text": plot.text, "light": _url(plot.png("light")), "dark": _url(plot.png("dark"))}
        for plot in plots(findings)
    ]
    page.write_text(
        template.render(title=title, findings=findings, plots=drawn, lists=lists, settings=findings.settings),
        encoding="utf-8",
    )
    return page


def _write_list(folder: Path, name: str, shown: Sequence[Shown]) -> None:
    """A contact sheet of pictures, else a table; what an earlier report left is removed."""
    for ending in ("png", "csv"):
        (folder / f"{name}.{ending}").unlink(missing_ok=True)
    if any(example.picture is not None for example in shown):
        (folder / f"{name}.png").write_bytes(_contact_sheet([e for e in shown if e.picture is not None]))
    elif shown:
        columns = ("index", "label", "prediction", "probability", "importance", "mean_loss", "visits", "text")
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([getattr(example, column) for column in columns] for example in shown)


def _contact_sheet(shown: Sequence[Shown]) -> bytes:
    rows = -(-len(shown) // _PER_ROW)
    figure = Figure(figsize=(1.7 * _PER_ROW, 2.0 * rows), layout="constrained")
    for place, example in enumerate(shown, 1):
        axes = figure.add_subplot(rows, _PER_ROW, place)
        axes.imshow(np.asarray(example.picture), interpolation="nearest")
        caption = f"{example.index}: {_cut(example.label, 18)}\n→ {_cut(example.prediction, 18)} {example.probability}"
        axes.set_title(caption, fontsize=8, parse_math=False)
        axes.set_axis_off()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


# ---- one example -----------------------------------------------------------------------------------------------------


def _shown(findings: Findings, examples: Any, tokenizer: Any, index: int) -> Shown:
    values = {name: column[index].item() for name, column in findings.columns.items()}
    example = examples[index]
    picture = _picture(example)
    return Shown(
        index=index,
        label=findings.name_of(values["label"]),
        prediction=findings.name_of(values["prediction"]),
        probability="" if values["probability"] != values["probability"] else f"{values['probability']:.0%}",
        importance=f"{values['importance']:.3g}",
        mean_loss=f"{values['mean_loss']:.3g}",
        visits=values["visits"],
        suspect=values["suspect"],
        text=None if picture is not None else _text(example, tokenizer),
        picture=picture,
    )


def _picture(example: Any) -> Image.Image | None:
    """An image as it is, or `pixel_values`, whose smallest and largest value become black and white."""
    if not isinstance(example, Mapping):
        return None
    for value in example.values():
        if isinstance(value, Image.Image):
            picture = value.convert("RGB")
            picture.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
            return picture
    if "pixel_values" not in example:
        return None
    pixels = np.asarray(example["pixel_values"], dtype=np.float32)
    if pixels.ndim != 3:
        return None
    if pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-12) * 255
    pixels = pixels.astype(np.uint8)
    return _picture({"image": Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])})


def _text(example: Any, tokenizer: Any) -> str | None:
    """The strings of an example, or its decoded tokens."""
    if isinstance(example, str):
        return _cut(example, _LONGEST_TEXT)
    if not isinstance(example, Mapping):
        return None
    strings = {name: value for name, value in example.items() if isinstance(value, str)}
    if len(strings) == 1:
        return _cut(*strings.values(), _LONGEST_TEXT)
    if strings:
        return "\n".join(f"{name}: {_cut(value, _LONGEST_TEXT)}" for name, value in strings.items())
    if "input_ids" in example and hasattr(tokenizer, "decode"):
        return _cut(tokenizer.decode(example["input_ids"], skip_special_tokens=True), _LONGEST_TEXT)
    return None


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
