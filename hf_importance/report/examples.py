"""How the report shows an example: an image, a text, or a line that says why there is neither."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_importance.report.findings import Findings
from hf_importance.report.texts import LONGEST_TEXT, cut, readable
from hf_importance.report.tokens import Token

_MAX_TOKENS = 4 * LONGEST_TEXT
"""Tokens that are decoded for a text."""
_LARGEST_PICTURE = 160
"""Maximum pixels per side."""
_SHARP = 64
"""Larger images are stored as JPEG, to keep the page small."""
_WHOLE = 255


@dataclass(frozen=True)
class ShownExample:
    """An example as shown in the report.

    Args:
        index: position in the training data.
        label: name of the label.
        prediction: name of the prediction.
        probability: probability of the prediction, formatted.
        importance: importance, formatted.
        mean_loss: mean loss, formatted.
        visits: number of visits.
        suspect: whether the label is probably wrong.
        text: text of the example, or why it cannot be shown, if there is no image.
        picture: thumbnail.
        tokens: tokens with their losses, shown instead of the text.
    """

    index: int
    label: str
    prediction: str
    probability: str
    importance: str
    mean_loss: str
    visits: int
    suspect: bool
    text: str = ""
    picture: Image.Image | None = None
    tokens: Sequence[Token] = ()

    @property
    def picture_url(self) -> str:
        """The thumbnail as a data URL."""
        buffer, kind = BytesIO(), "PNG" if max(self.picture.size) <= _SHARP else "JPEG"
        self.picture.save(buffer, format=kind, quality=85)
        return _url(buffer.getvalue(), kind.lower())

    @property
    def alternative(self) -> str:
        """Alternative text of the thumbnail."""
        return f"Training example {self.index}, labelled {self.label}, predicted {self.prediction}"


def show(
    findings: Findings, examples: Any, tokenizer: Any, index: int, tokens: Mapping[int, Sequence[Token]]
) -> ShownExample:
    """Prepare an example for display. Errors are shown in its place.

    Args:
        findings: figures of the training.
        examples: the examples to show, indexed by position.
        tokenizer: decodes `input_ids`; may be None.
        index: position of the example.
        tokens: tokens of some examples with their losses.
    """
    values = {name: column[index].item() for name, column in findings.columns.items()}
    picture, text = None, ""
    try:
        example = examples[index]
        picture = picture_of(example)
        text = text_of(example, tokenizer) if picture is None else ""
    except Exception as error:  # unreadable files, or arbitrary user data
        text = f"(cannot be shown: {type(error).__name__}: {cut(readable(str(error)), 120)})"
    return ShownExample(
        index=index,
        label=findings.name_of(values["label"]),
        prediction=findings.name_of(values["prediction"]),
        probability="" if values["probability"] != values["probability"] else f"{values['probability']:.0%}",
        importance=f"{values['importance']:.3g}",
        mean_loss=f"{values['mean_loss']:.3g}",
        visits=values["visits"],
        suspect=values["suspect"],
        text=text if picture is not None or text else "(no text, image or tokens to show)",
        picture=picture,
        tokens=tokens.get(index, ()),
    )


# ---- images ----------------------------------------------------------------------------------------------------------


def picture_of(example: Any) -> Image.Image | None:
    """Thumbnail of an image, or of `pixel_values` scaled from their minimum (black) to their maximum (white).

    None if the example has neither.
    """
    if isinstance(example, Image.Image):
        return _thumbnail(example)
    if not isinstance(example, Mapping):
        return None
    images = [value for value in example.values() if isinstance(value, Image.Image)]
    if images:
        return _thumbnail(images[0])
    pixels = example.get("pixel_values")
    return None if pixels is None else _of_pixels(_array(pixels))


def _thumbnail(image: Image.Image) -> Image.Image:
    """RGB thumbnail of at most `_LARGEST_PICTURE` pixels per side, on white."""
    image.load()  # raises an error if the file is damaged
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # 16 or 32 bits
        image = Image.fromarray(_to_uint8(np.asarray(image, dtype=np.float32)))
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
    return image


def _of_pixels(pixels: np.ndarray) -> Image.Image | None:
    """Image from `[channels, height, width]`, `[height, width, channels]`, `[height, width]`, or of a video."""
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


def _array(values: Any) -> np.ndarray:
    """Convert to float32, also from tensors on a device or with gradients."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu()
    return np.asarray(values, dtype=np.float32)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale to uint8, from the smallest finite value (0) to the largest (255)."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return ((values - low) / max(high - low, 1e-12) * _WHOLE).astype(np.uint8)


def png_url(png: bytes) -> str:
    """A PNG image as a data URL."""
    return _url(png, "png")


def _url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


# ---- texts -----------------------------------------------------------------------------------------------------------


def text_of(example: Any, tokenizer: Any) -> str:
    """Decoded tokens if there are tokens and a tokenizer, else the strings of an example, else empty."""
    if isinstance(example, str):
        return cut(readable(example), LONGEST_TEXT)
    if not isinstance(example, Mapping):
        return ""
    if "input_ids" in example and hasattr(tokenizer, "decode"):
        ids = example["input_ids"]
        ids = ids[:_MAX_TOKENS].tolist() if hasattr(ids, "tolist") else list(ids)[:_MAX_TOKENS]
        several = ids if ids and isinstance(ids[0], (list, tuple)) else [ids]  # as in multiple choice
        texts = (tokenizer.decode(list(one)[:_MAX_TOKENS], skip_special_tokens=True) for one in several)
        return cut(readable("\n".join(texts)), LONGEST_TEXT)
    strings = {name: cut(readable(value), LONGEST_TEXT) for name, value in example.items() if isinstance(value, str)}
    if len(strings) == 1:
        return next(iter(strings.values()))
    return "\n".join(f"{name}: {value}" for name, value in strings.items())
