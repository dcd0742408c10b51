"""The picture of a report in the README: the top of the page for digits, 5 % of which have a wrong label.

Requires Chromium to render the page.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import run_image_classification
from PIL import Image, PngImagePlugin

import hf_importance.report
from benchmarks.results import FOLDER

PICTURE = FOLDER / "report.png"
_SOURCES = ("page.html.jinja", "findings.py", "plots.py")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_WIDTH, _HEIGHT = 1200, 1000
_WRONG = 0.05


def digest() -> str:
    """Digest of the sources of the page; a different one in the picture means that it is outdated."""
    folder = Path(hf_importance.report.__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _SOURCES)).hexdigest()


def draw(path: Path = PICTURE) -> None:
    """Train, write the report, and render the top of its page.

    Raises:
        SystemExit: if there is no browser.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"error: the picture requires a browser, one of {', '.join(_BROWSERS)}.")
    with tempfile.TemporaryDirectory() as folder:
        data = run_image_classification.digits()["train"]
        wrong = data.map(_with_another_label, with_indices=True, load_from_cache_file=False)
        wrong.to_parquet(f"{folder}/digits.parquet")
        data_flags = ["--train_file", f"{folder}/digits.parquet", "--output_dir", f"{folder}/digits", "--report"]
        without_evaluation = ["--do_eval", "false", "--eval_strategy", "no"]
        run_image_classification.main([*run_image_classification.EMBEDDED.split(), *without_evaluation, *data_flags])
        page = Path(folder) / "digits" / "_importance_report" / "report.html"
        shot = Path(folder) / "shot.png"
        size = f"--window-size={_WIDTH},{_HEIGHT}"
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={shot}"]
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True)
        told = PngImagePlugin.PngInfo()
        told.add_text("Source", digest())
        Image.open(shot).convert("P", palette=Image.Palette.ADAPTIVE).save(path, pnginfo=told, optimize=True)


def _with_another_label(row: dict[str, Any], index: int) -> dict[str, Any]:
    """Replace the label of every twentieth digit."""
    return {"label": (row["label"] + 1) % 10 if index % round(1 / _WRONG) == 0 else row["label"]}
