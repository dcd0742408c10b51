"""Checkpoints: one file per rank, written so that half of one is never taken for a whole one."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from hf_importance.record import join
from hf_importance.sampling.sampler import ImportanceBatchSampler

_FORMAT = 4
_TRAINER_STATE = "trainer_state.json"  # what `Trainer` writes last


def save_state(checkpoint: str | Path, rank: int, ranks: int, state: dict[str, Any]) -> None:
    """Write the state of one rank into the folder of a checkpoint: tensors and plain values."""
    path = Path(checkpoint) / _name(rank, ranks)
    for other in path.parent.glob("importance_*_of_*.pt"):  # of a run that was killed here
        if not other.stem.endswith(f"_of_{ranks:05d}"):
            other.unlink(missing_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save({"format": _FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_states(checkpoint: str | Path) -> list[dict[str, Any]]:
    """The states of all ranks, in their order; none if there are no files.

    Raises:
        ValueError: if a file is missing among others, damaged, or not one of ours.
    """
    paths = sorted(Path(checkpoint).glob("importance_*_of_*.pt"))
    if not paths:
        return []
    ranks = int(paths[0].stem.split("_of_")[1])
    return [_load(Path(checkpoint) / _name(rank, ranks)) for rank in range(ranks)]


def resume(sampler: ImportanceBatchSampler, states: list[dict[str, Any]], rank: int, skip: int) -> str | None:
    """Put a sampler where it was, or as near as it can be.

    Args:
        sampler: of this rank; nothing was drawn.
        states: what [`load_states`] gave.
        rank: this one.
        skip: see [`ImportanceBatchSampler.load_state_dict`].

    Returns:
        What could not be kept, None if all was.
    """
    if len(states) == sampler.shard.ranks and sampler.goes_on_from(states[rank]["sampler"]):
        sampler.load_state_dict(states[rank]["sampler"], skip)
        return None
    length = sampler.shard.length
    importance = torch.full((length,), torch.nan)
    passes, record = 0, None
    if not states:
        dropped = "has no importances: they start unknown."
    elif (found := states[0]["sampler"]["length"]) != length:
        dropped = (
            f"has the importances of {found} training examples, but there are {length}, so that it is not known which "
            "is which: importances start unknown."
        )
    else:
        dropped = (
            "was written with another number of processes, batch size or kind of sampling: the "
            "importances are kept, the order of the examples is a new one."
        )
        samplers = [state["sampler"] for state in states]
        passes = samplers[0]["visits"]["passes"]
        index = [slice(None) if state["shard"] is None else state["shard"] for state in samplers]
        for positions, state in zip(index, samplers, strict=True):
            importance[positions] = state["memory"]["importance"]
        if all(state["record"] is not None for state in samplers):
            record = join([state["record"] for state in samplers], index, length)
    sampler.restart(importance, passes, skip, record)
    return dropped


def _name(rank: int, ranks: int) -> str:
    return f"importance_{rank:05d}_of_{ranks:05d}.pt"


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT or "sampler" not in state:
            raise ValueError(f"its format is {state['format']!r}, wanted is {_FORMAT}")
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The importances in {path} cannot be read ({_first_line(error)}). Resume from another checkpoint, or "
            f"remove {path.parent}/importance_*.pt to go on with the model as it is and importances that are unknown."
        ) from error
    return state


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def newest_complete(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; killed while saving, a run leaves one behind that was not."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and _is_complete(path)
    }
    return found[max(found)] if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
