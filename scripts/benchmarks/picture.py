"""The picture of a report in the README: the head of the page, of the digits with their defaults.

Needs Chromium, which draws the page.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import run_image_classification
from PIL import Image, PngImagePlugin

import hf_importance.report
from benchmarks.results import FOLDER

PICTURE = FOLDER / "report.png"
_SOURCES = ("page.html.jinja", "findings.py", "plots.py")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_WIDTH, _HEIGHT = 1200, 1000


def digest() -> str:
    """Of what the page is made of: another one than in the picture says that it is stale."""
    folder = Path(hf_importance.report.__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _SOURCES)).hexdigest()


def draw(path: Path = PICTURE) -> None:
    """Train, write the report, draw the head of its page.

    Raises:
        SystemExit: where there is no browser.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"error: the picture needs a browser, one of {', '.join(_BROWSERS)}.")
    with tempfile.TemporaryDirectory() as folder:
        run_image_classification.main(
            ["--do_train", "--report", "--output_dir", f"{folder}/digits", "--report_to", "none"]
        )
        page = Path(folder) / "digits" / "_importance_report" / "report.html"
        shot = Path(folder) / "shot.png"
        size = f"--window-size={_WIDTH},{_HEIGHT}"
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={shot}"]
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True)
        told = PngImagePlugin.PngInfo()
        told.add_text("Source", digest())
        Image.open(shot).convert("P", palette=Image.Palette.ADAPTIVE).save(path, pnginfo=told, optimize=True)
