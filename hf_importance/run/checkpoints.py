"""Checkpoints: one file per rank, written atomically; restored exactly, or as far as they match."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_importance.data.fingerprint import differences
from hf_importance.sampling.record import join
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.state import read_tensor

_FORMAT = 11
_FILES = "importance_*.pt"
_ADVICE = (
    "Resume from another checkpoint, or delete its importance_*.pt files to continue with the saved model and unknown "
    "importances."
)
_OTHER_RANK = "has no importances of another process: those of this one are kept, but the examples are in a new order."
_TRAINER_STATE = "trainer_state.json"  # written last by `Trainer`


class UnreadableError(ValueError):
    """A file cannot be read; the message names it and the fix."""


# ---- files -----------------------------------------------------------------------------------------------------------


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


class SavedStates:
    """The states of the ranks in a checkpoint. A file is read when its state is first needed.

    Files of other ranks are missing if these save on another machine; there are none in checkpoints of `Trainer`.

    Args:
        checkpoint: folder of the checkpoint.

    Raises:
        UnreadableError: if the name of a file does not match the others.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        paths = sorted(Path(checkpoint).glob(_FILES))
        names = [re.fullmatch(r"importance_(\d{5})_of_(\d{5})", path.stem) for path in paths]
        for path, name in zip(paths, names, strict=True):
            if name is None or name[2] != names[0][2] or int(name[1]) >= int(name[2]):
                raise _unreadable(
                    path, ValueError("its name must be importance_<rank>_of_<ranks>.pt, as of the others")
                )
        self._paths = {int(name[1]): path for path, name in zip(paths, names, strict=True)}
        self._loaded: dict[int, dict[str, Any]] = {}
        self.ranks = int(names[0][2]) if names else 0

    def __contains__(self, rank: int) -> bool:
        return rank in self._paths

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, self._paths)

    def __getitem__(self, rank: int) -> dict[str, Any]:
        """The state of a rank.

        Raises:
            UnreadableError: if its file is damaged, or does not match its name.
        """
        if rank not in self._loaded:
            self._loaded[rank] = _load(self._paths[rank], rank, self.ranks)
        return self._loaded[rank]

    def any(self, rank: int) -> dict[str, Any] | None:
        """The state of a rank, or of another one if it is missing, for what they have in common; None if all are."""
        return self[rank] if rank in self else next(iter(self), None)

    @property
    def missing(self) -> list[str]:
        """Names of the files that are missing."""
        return [_name(rank, self.ranks) for rank in range(self.ranks) if rank not in self]


def _name(rank: int, ranks: int) -> str:
    return f"importance_{rank:05d}_of_{ranks:05d}.pt"


def _load(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError(f"another version of hf_importance wrote it, with format {state['format']}, not {_FORMAT}")
        if (state["rank"], state["ranks"]) != (rank, ranks):
            raise ValueError(f"it was written by process {state['rank']} of {state['ranks']}")
        is_drawn = "sampler" in state or not state["unweighted"]  # by us, not by the dataloader of `Trainer`
        for name in ("sampler", "settings", "data", "objective", "figures") if is_drawn else ("backward",):
            if not isinstance(state[name], dict):
                raise ValueError(f"{name} must be a dict, but is a {type(state[name]).__name__}")
    except Exception as error:  # a damaged file may raise almost anything
        raise _unreadable(path, error) from error
    return state


def _unreadable(path: Path, error: Exception) -> UnreadableError:
    return UnreadableError(f"The importances in {path} cannot be read ({_first_line(error)}). {_ADVICE}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@contextmanager
def explaining_errors(checkpoint: str | Path) -> Iterator[None]:
    """Turn errors in a state into a `ValueError` that names the checkpoint and the fix."""
    try:
        yield
    except UnreadableError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"The importances in {checkpoint} cannot be used ({_first_line(error)}). {_ADVICE}") from error


def newest_complete(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; a run that is killed while saving leaves an incomplete one."""
    complete = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and _is_complete(path)
    }
    return complete[max(complete)] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


# ---- restoring the sampler -------------------------------------------------------------------------------------------


def restore_sampler(
    sampler: ImportanceBatchSampler,
    states: SavedStates,
    rank: int,
    data: dict[str, Any],
    settings: dict[str, Any],
    agree: Callable[[bool], bool],
) -> str | None:
    """Restore a sampler from a checkpoint, as far as the checkpoint matches.

    Args:
        sampler: sampler of this rank, before its first draw.
        states: the states in the checkpoint.
        rank: this rank.
        data: `fingerprint` of the training data.
        settings: settings of the resumed training.
        agree: whether all ranks pass True, a collective operation: either all ranks continue exactly, or none.

    Returns:
        A message on what could not be restored; None if everything was.

    Raises:
        UnreadableError: see [`SavedStates`].
        ValueError: if a state has the wrong form; other errors if parts are missing, see [`explaining_errors`].
    """
    obstacle, keeps_importances = _obstacle(sampler, states, rank, data, settings)
    if agree(obstacle is None):
        sampler.load_state_dict(states[rank]["sampler"])
        return None
    if not keeps_importances:
        sampler.restart(torch.full((sampler.shard.length,), torch.nan, dtype=torch.float32))
        return obstacle
    obstacle = obstacle or _OTHER_RANK
    if rank in states and _same(states[rank]["sampler"]["shard"], sampler.shard.index):
        samplers = [states[rank]["sampler"]]
    else:
        samplers = [state["sampler"] for state in states]
        obstacle += _not_found(states.missing)
    importance, record, prior = _join(samplers, sampler.shard.length)
    sampler.restart(importance, int(samplers[0]["visits"]["passes"]), record, prior)
    return obstacle


def _obstacle(
    sampler: ImportanceBatchSampler, states: SavedStates, rank: int, data: dict[str, Any], settings: dict[str, Any]
) -> tuple[str | None, bool]:
    """What prevents this rank from continuing exactly, None if nothing does; and whether importances remain valid."""
    before, length = states.any(rank), sampler.shard.length
    if before is None or "sampler" not in before:
        return "contains no importances: they start unknown.", False
    changed = [
        f"{name}={before['settings'][name]!r} (now {settings[name]!r})"
        for name in sorted(before["settings"].keys() & settings)
        if before["settings"][name] != settings[name]
    ]
    if before["sampler"]["length"] != length:
        message = f"has the importances of {before['sampler']['length']} training examples, but train_dataset now has "
        return f"{message}{length}: importances start unknown.", False
    if difference := differences(before["data"], data):
        return f"was written with different training data ({difference}): importances start unknown.", False
    if before["settings"].get("metric") != settings.get("metric"):
        return f"was written with {' and '.join(changed)}, a different metric: importances start unknown.", False
    if changed:
        message = f"was written with {' and '.join(changed)}: importances are kept, and training continues with the "
        return f"{message}new settings and a new order of the examples.", True
    if states.ranks == sampler.shard.ranks and rank not in states:
        return "has no importances of this process: the examples are in a new order.", True
    if states.ranks == sampler.shard.ranks and sampler.matches(before["sampler"]):
        return None, True
    message = "was written with a different number of processes, batch size or sampling method: "
    return f"{message}importances are kept, but the examples are in a new order.", True


def _same(positions: Tensor | None, others: Tensor | None) -> bool:
    return positions is others if positions is None or others is None else torch.equal(positions, others)


def _not_found(missing: list[str]) -> str:
    """What follows from missing files, of which it names at most three."""
    if not missing:
        return ""
    rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f" Not found: {', '.join(missing[:3])}{rest}; the importances of the examples in them start unknown."


def _join(samplers: list[dict[str, Any]], length: int) -> tuple[Tensor, dict[str, Any] | None, Tensor | None]:
    """Merge importances, records and priors of the samplers of all ranks; suspects, scaled, become unknown."""
    importance, prior = torch.full((2, length), torch.nan, dtype=torch.float32)
    index = [slice(None) if state["shard"] is None else state["shard"] for state in samplers]
    for positions, state in zip(index, samplers, strict=True):
        own = state["memory"]["importance"]
        if state["suspects"] is not None:
            own = own.masked_fill(state["suspects"]["flagged"], torch.nan)
        if own.shape != importance[positions].shape:
            raise ValueError(f"importance has shape {list(own.shape)}, unlike its examples")
        importance[positions] = own.float()
        if state["visits"].get("prior") is not None:
            prior[positions] = read_tensor(state["visits"], "prior", own.shape, torch.float32)
    prior = prior if prior.isfinite().any() else None
    if any(state["record"] is None for state in samplers):
        return importance, None, prior
    return importance, join([state["record"] for state in samplers], index, length), prior
