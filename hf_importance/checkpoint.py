"""Checkpoint files, one per rank, written atomically."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_importance.fingerprint import differences
from hf_importance.record import join
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.state import read_number, read_tensor

_FORMAT = 8
_FILES = "importance_*.pt"
_ADVICE = (
    "Resume from another checkpoint, or delete its importance_*.pt files to continue with the saved model and unknown "
    "importances."
)
_TRAINER_STATE = "trainer_state.json"  # written last by `Trainer`


def save_state(checkpoint: str | Path, rank: int, ranks: int, state: dict[str, Any]) -> None:
    """Write the state of one rank, tensors and plain values, into the folder of a checkpoint."""
    path = Path(checkpoint) / _name(rank, ranks)
    for other in path.parent.glob(_FILES):  # left by a run that was killed while saving
        if not other.stem.endswith(f"_of_{ranks:05d}"):
            other.unlink(missing_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save({"format": _FORMAT, "rank": rank, "ranks": ranks, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_states(checkpoint: str | Path) -> list[dict[str, Any]]:
    """Load the states of all ranks in order; empty if there are no files.

    Raises:
        ValueError: if a file is missing or damaged, or does not match its name.
    """
    paths = sorted(Path(checkpoint).glob(_FILES))
    if not paths:
        return []
    ranks = re.search(r"_of_(\d{5})$", paths[0].stem)
    if ranks is None:
        raise _unreadable(paths[0], ValueError("its name must be importance_<rank>_of_<ranks>.pt"))
    names = [_name(rank, int(ranks[1])) for rank in range(int(ranks[1]))]
    for path in paths:
        if path.name not in names:
            raise _unreadable(path, ValueError(f"it does not belong with {paths[0].name}"))
    return [_load(Path(checkpoint) / name, rank, len(names)) for rank, name in enumerate(names)]


def resume(
    sampler: ImportanceBatchSampler,
    states: list[dict[str, Any]],
    rank: int,
    data: dict[str, Any],
    settings: dict[str, Any],
) -> str | None:
    """Restore a sampler from a checkpoint, as far as the checkpoint matches.

    Args:
        sampler: sampler of this rank, before its first draw.
        states: result of [`load_states`].
        rank: this rank.
        data: [`fingerprint.fingerprint`] of the training data.
        settings: settings of the resumed training.

    Returns:
        A message on what could not be restored; None if everything was.

    Raises:
        ValueError: if a state has the wrong form; other errors if parts are missing, see [`explaining_errors`].
    """
    length = sampler.shard.length
    unknown = torch.full((length,), torch.nan)
    if not states:
        sampler.restart(unknown)
        return "contains no importances: they start unknown."
    before, samplers = states[0], [state["sampler"] for state in states]
    changed = [
        f"{name}={before['settings'][name]!r} (now {settings[name]!r})"
        for name in sorted(before["settings"].keys() & settings)
        if before["settings"][name] != settings[name]
    ]
    keeps = False
    if samplers[0]["length"] != length:
        dropped = (
            f"has the importances of {samplers[0]['length']} training examples, but train_dataset now has {length}: "
            "importances start unknown."
        )
    elif other := differences(before["data"], data):
        dropped = f"was written with different training data ({other}): importances start unknown."
    elif before["settings"].get("metric") != settings.get("metric"):
        dropped = f"was written with {' and '.join(changed)}, a different metric: importances start unknown."
    elif changed:
        keeps = True
        dropped = (
            f"was written with {' and '.join(changed)}: importances are kept, and training continues with the "
            "new settings and a new order of the examples."
        )
    elif len(states) == sampler.shard.ranks and sampler.matches(samplers[rank]):
        sampler.load_state_dict(samplers[rank])
        return None
    else:
        keeps = True
        dropped = (
            "was written with a different number of processes, batch size or sampling method: importances are kept, "
            "but the examples are in a new order."
        )
    if keeps:
        importance, record = _join(samplers, length)
        sampler.restart(importance, read_number(samplers[0]["visits"], "passes", int), record)
    else:
        sampler.restart(unknown)
    return dropped


@contextmanager
def explaining_errors(checkpoint: str | Path) -> Iterator[None]:
    """Turn errors in a state into a `ValueError` that names the checkpoint and the fix."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"The importances in {checkpoint} cannot be used ({_first_line(error)}). {_ADVICE}") from error


def _join(samplers: list[dict[str, Any]], length: int) -> tuple[Tensor, dict[str, Any] | None]:
    """Merge the importances and the records of the samplers of all ranks."""
    importance = torch.full((length,), torch.nan)
    index = [slice(None) if state["shard"] is None else state["shard"] for state in samplers]
    for positions, state in zip(index, samplers, strict=True):
        mine = [len(importance[positions])]
        importance[positions] = _importance(state, mine)
    if any(state["record"] is None for state in samplers):
        return importance, None
    return importance, join([state["record"] for state in samplers], index, length)


def _importance(state: dict[str, Any], shape: list[int]) -> Tensor:
    """Importances of a rank; NaN for suspects, whose importance was scaled, see [`suspects.SuspectWeights`]."""
    importance = read_tensor(state["memory"], "importance", shape, torch.float32)
    if state["suspects"] is None:
        return importance
    return importance.masked_fill(read_tensor(state["suspects"], "flagged", shape, torch.bool), torch.nan)


def _name(rank: int, ranks: int) -> str:
    return f"importance_{rank:05d}_of_{ranks:05d}.pt"


def _load(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError(f"its format must be {_FORMAT}, but is {state['format']!r}")
        if (state["rank"], state["ranks"]) != (rank, ranks):
            raise ValueError(f"it was written by process {state['rank']} of {state['ranks']}")
        for name in ("sampler", "settings", "data", "objective", "reported"):
            if not isinstance(state[name], dict):
                raise ValueError(f"{name} must be a dict, but is a {type(state[name]).__name__}")
    except Exception as error:  # a damaged file may raise almost anything
        raise _unreadable(path, error) from error
    return state


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"The importances in {path} cannot be read ({_first_line(error)}). {_ADVICE}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def newest_complete(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; a run that is killed while saving leaves an incomplete one."""
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
