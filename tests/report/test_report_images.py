"""How the report shows images and pixel values, and examples that cannot be read."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from report_data import HOSTILE, PartlyUnreadable, findings, page_of

from hf_importance.report.page import write_report
from hf_importance.report.pictures import picture_of

# ---- images ----------------------------------------------------------------------------------------------------------


def ramp(mode, high):
    """8 × 8 pixels from dark to bright."""
    values = np.linspace(0, high, 64).reshape(8, 8)
    kinds = {"1": bool, "L": np.uint8, "I;16": np.uint16, "I": np.int32, "F": np.float32}
    return Image.fromarray(values.astype(kinds[mode]))


@pytest.mark.parametrize(
    ("mode", "high"), [("1", 1), ("L", 255), ("I;16", 65535), ("I;16", 300), ("I", 100_000), ("F", 1.0), ("F", 255.0)]
)
def test_images_of_any_depth_range_from_black_to_white(mode, high):
    picture = picture_of({"image": ramp(mode, high)})
    assert picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBa", "LA", "La", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_images_of_any_mode_become_thumbnails(mode):
    picture = Image.new("RGBA", (300, 200), (200, 30, 30, 255))
    picture = picture.convert({"La": "LA", "RGBa": "RGBA", "PA": "P", "LAB": "RGB"}.get(mode, mode))
    picture = picture.convert(mode) if mode in ("La", "RGBa", "PA") else picture
    shown = picture_of({"image": picture})
    assert (shown.mode, shown.size) == ("RGB", (160, 107))
    red, green, _ = np.asarray(shown)[50, 50]
    assert red > green or mode in ("LA", "La")


def test_transparent_pixels_are_white():
    for picture in (Image.new("RGBA", (9, 9), (10, 10, 10, 0)), Image.new("LA", (9, 9), (10, 0))):
        assert np.asarray(picture_of(picture)).min() == 255
    palette = Image.new("P", (9, 9))
    palette.info["transparency"] = 0
    assert np.asarray(picture_of(palette)).min() == 255
    assert np.asarray(picture_of(Image.new("RGBA", (9, 9), (10, 10, 10, 255)))).max() == 10, "control: opaque"


# ---- pixel values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 4), (1, 6, 4), (6, 4, 3)])
def test_pixel_values_become_images(shape):
    values = torch.linspace(-2, 3, math.prod(shape)).view(shape)
    picture = picture_of({"pixel_values": values, "labels": 1})
    assert picture.size == (4, 6)
    pixels = np.asarray(picture)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert picture_of({"input_ids": [1, 2]}) is None


@pytest.mark.parametrize(
    "values",
    [
        torch.rand(3, 8, 8).bfloat16(),
        torch.rand(3, 8, 8, requires_grad=True),
        torch.rand(4, 8, 8),
        torch.rand(8, 8),
        torch.rand(5, 3, 8, 8),
        torch.rand(8, 8, 3).tolist(),
        np.random.default_rng(0).integers(0, 255, (3, 8, 8)),
    ],
    ids=["bf16", "requires grad", "four channels", "two dimensions", "video", "lists", "integers"],
)
def test_pixel_values_of_any_type_become_images(values):
    picture = picture_of({"pixel_values": values, "labels": 1})
    assert picture.size == (8, 8)
    assert np.asarray(picture).max() > 240


def test_non_finite_or_empty_pixel_values():
    values = torch.rand(3, 8, 8)
    values[0, 0], values[1, 1] = torch.nan, torch.inf
    assert picture_of({"pixel_values": values}).size == (8, 8)
    assert picture_of({"pixel_values": torch.full((3, 8, 8), torch.nan)}).size == (8, 8)
    assert picture_of({"pixel_values": torch.zeros(3, 0, 8)}) is None


# ---- page and files --------------------------------------------------------------------------------------------------


def test_images_are_saved_as_contact_sheets(tmp_path):
    shades = [{"image": Image.new("L", (300, 200), 60 * i)} for i in range(4)]
    page = page_of(write_report(tmp_path, findings(), shades, None, 9, "t"))
    assert "Training example 1, labelled " + HOSTILE + ", predicted cat" in [a.get("alt") for _, a in page.tags]
    with Image.open(tmp_path / "hardest.png") as sheet:
        assert sheet.width > 500
    assert not (tmp_path / "hardest.csv").exists()
    write_report(tmp_path, findings(), [{"text": "t"}] * 4, None, 9, "t")
    assert not (tmp_path / "hardest.png").exists(), "files of the earlier report are removed"


def test_unreadable_examples_are_shown_with_the_error(tmp_path):
    page = page_of(write_report(tmp_path, findings(), PartlyUnreadable(), None, 9, "t"))
    assert [a["alt"] for tag, a in page.tags if tag == "img" and a["alt"].startswith("Training")] == [
        "Training example 0, labelled cat, predicted cat"
    ]
    assert page.text.count("(cannot be shown: UnidentifiedImageError") == 2, "among suspects and hardest examples"
    assert page.text.count("(cannot be shown: OSError") == 1 or "(cannot be shown: SyntaxError" in page.text
    with Image.open(tmp_path / "hardest.png") as sheet:
        assert sheet.width > 500
    with (tmp_path / "hardest.csv").open(encoding="utf-8", newline="") as file:
        assert [row["index"] for row in csv.DictReader(file)] == ["1", "2"]


def test_page_with_many_images_is_small(tmp_path):
    """The images are noise, which compresses worst."""
    noise = np.random.default_rng(0).integers(0, 255, (4, 400, 400, 3), dtype=np.uint8)
    columns = {name: column.repeat(8) for name, column in findings().columns.items() if name != "suspect"}
    many = findings(**columns | {"mean_loss": torch.full((32,), 2.0), "importance": torch.rand(32)})
    shown = [{"image": Image.fromarray(noise[i % 4])} for i in range(32)]
    page = write_report(tmp_path, many, shown, None, 24, "t")
    assert page.read_text().count("data:image/jpeg") == 48
    assert page.stat().st_size < 5e6
