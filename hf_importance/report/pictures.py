"""Thumbnails of images and pixel values, and sheets of them."""

import base64
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

_LARGEST = 160  # maximum pixels per side
_SHARP = 64  # larger images are stored as JPEG, to keep the page small
_PER_ROW = 6  # images per row of a contact sheet


def picture_of(example: Any) -> Image.Image | None:
    """Thumbnail of an image, or of `pixel_values` scaled from their minimum (black) to their maximum (white).

    None if the example has neither.
    """
    values = list(example.values()) if isinstance(example, Mapping) else [example]
    for value in values:
        if isinstance(value, Image.Image):
            return _thumbnail(value)
    pixels = example.get("pixel_values") if isinstance(example, Mapping) else None
    return None if pixels is None else _of_pixels(pixels)


def _thumbnail(image: Image.Image) -> Image.Image:
    """RGB thumbnail of at most `_LARGEST` pixels per side, on white."""
    image.load()  # raises an error if the file is damaged
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # 16 or 32 bits
        image = Image.fromarray(_to_uint8(np.asarray(image, dtype=np.float32)))
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((_LARGEST, _LARGEST))
    return image


def _of_pixels(pixels: Any) -> Image.Image | None:
    """Image from `[channels, height, width]`, `[height, width, channels]`, `[height, width]`, or of a video."""
    pixels = torch.as_tensor(pixels).detach().float().cpu().numpy()
    while pixels.ndim > 3:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        return None
    if pixels.shape[0] in (1, 3, 4) or pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    pixels = _to_uint8(pixels)
    return _thumbnail(Image.fromarray(pixels[..., 0] if pixels.shape[2] in (1, 2) else pixels[..., :3]))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale to uint8, from the smallest finite value (0) to the largest (255)."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return ((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)


def picture_url(picture: Image.Image) -> str:
    """A thumbnail as a data URL."""
    buffer, kind = BytesIO(), "png" if max(picture.size) <= _SHARP else "jpeg"
    picture.save(buffer, format=kind, quality=85)
    return data_url(buffer.getvalue(), kind)


def data_url(content: bytes, kind: str = "png") -> str:
    """An encoded image as a data URL."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def contact_sheet(pictures: Mapping[str, Image.Image]) -> bytes:
    """Pictures side by side, by their captions, as PNG."""
    rows = -(-len(pictures) // _PER_ROW)
    figure = Figure(figsize=(1.7 * _PER_ROW, 2.0 * rows), layout="constrained")
    for place, (caption, picture) in enumerate(pictures.items(), 1):
        axes = figure.add_subplot(rows, _PER_ROW, place)
        axes.imshow(np.asarray(picture), interpolation="nearest")
        axes.set_title(caption, fontsize=8, parse_math=False)
        axes.set_axis_off()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
