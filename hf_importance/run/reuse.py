"""What a training leaves for the next one on the same data: its importances, in a file with the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from hf_importance.config import checked_importances
from hf_importance.data.fingerprint import differences

IMPORTANCES_FILE = "importances.safetensors"
_TENSOR = "importance"
_FORMAT = "1"
_OF_A_PART = (
    "For a fold or another part of that data, pass a tensor with the importances of its examples: "
    'start_from=safetensors.torch.load_file("importances.safetensors")["importance"][index].'
)


def write_importances(folder: str | Path, importance: Tensor, data: dict[str, Any], metric: str) -> Path:
    """Write importances into the folder of a model, and return the path of the file. It holds no training examples.

    Args:
        folder: created if needed.
        importance: float32 `[examples]`, NaN where unknown.
        data: `fingerprint` of the training data.
        metric: what was measured, as in `ImportanceConfig`.
    """
    path = Path(folder) / IMPORTANCES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    about = {"format": _FORMAT, "metric": metric, "data": json.dumps(data)}
    save_file({_TENSOR: importance.contiguous()}, unfinished, about)
    os.replace(unfinished, path)
    return path


def start_importances(start_from: str | Tensor, length: int, data: dict[str, Any], metric: str) -> Tensor:
    """The importances to start with, float32 `[examples]`, NaN where unknown.

    Args:
        start_from: as in `ImportanceConfig`.
        length: number of training examples.
        data: `fingerprint` of the training data; ignored if `start_from` is a tensor.
        metric: what is measured, as in `ImportanceConfig`.

    Raises:
        OSError: if there is no file.
        ValueError: if it cannot be read, or is of other data or another metric; if the number of examples differs.
    """
    if isinstance(start_from, Tensor):
        if len(start_from) != length:
            raise ValueError(
                f"start_from must have an importance for each of the {length} training examples, but has "
                f"{len(start_from)}: index it like the data, start_from=importances[index]."
            )
        return start_from
    path = _path_of(start_from)
    importance, before, measured = _read(path)
    if len(importance) != length:
        raise ValueError(
            f"start_from must be a training on the same data, but {path} has the importances of {len(importance)} "
            f"examples, and train_dataset has {length}. {_OF_A_PART}"
        )
    if difference := differences(before, data):
        raise ValueError(
            f"start_from must be a training on the same data in the same order, but that of {path} was another "
            f"({difference}). {_OF_A_PART}"
        )
    if measured != metric:
        raise ValueError(
            f"start_from must be a training with the same metric, {metric!r}, but in {path} it is {measured!r}."
        )
    return importance


def _path_of(start_from: str) -> Path:
    path = Path(start_from)
    if path.is_file():
        return path
    try:
        return Path(cached_file(start_from, IMPORTANCES_FILE))
    except OSError as error:
        raise OSError(
            f"start_from={start_from!r} must be a folder, or a model on the Hub, with {IMPORTANCES_FILE}, which "
            f"ImportanceTrainer saves with its models and checkpoints: {error}"
        ) from error


def _read(path: Path) -> tuple[Tensor, dict[str, Any], str]:
    """Importances, the fingerprint of their data, and what was measured."""
    try:
        with safe_open(path, framework="pt") as file:
            about, importance = file.metadata() or {}, file.get_tensor(_TENSOR)
        if about["format"] != _FORMAT:
            raise ValueError(f"another version of hf_importance wrote it, with format {about['format']}")
        data = json.loads(about["data"])
        if not isinstance(data, dict) or not data.keys() >= {"datasets", "columns"}:
            raise ValueError("it does not say which data they are of")
        return checked_importances(importance, "its tensor"), data, about["metric"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"start_from: the importances in {path} cannot be read ({type(error).__name__}: {error}). Train that model "
            "again, or remove start_from."
        ) from error
