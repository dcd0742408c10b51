"""Checkpoint files, one per rank, written atomically."""

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
from hf_importance.sampling.state import read_number, read_tensor

_FORMAT = 8
_FILES = "importance_*.pt"
_ADVICE = (
    "Resume from another checkpoint, or delete its importance_*.pt files to continue with the saved model and unknown "
    "importances."
)
_OTHER_RANK = "has no importances of another process: those of this one are kept, but the examples are in a new order."
_TRAINER_STATE = "trainer_state.json"  # written last by `Trainer`


class UnreadableError(ValueError):
    """A file cannot be read; the message names it and the fix."""


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


def load_states(checkpoint: str | Path) -> SavedStates:
    """The states of the ranks in a checkpoint; none if there are no files.

    Raises:
        UnreadableError: if the name of a file does not match the others.
    """
    paths = sorted(Path(checkpoint).glob(_FILES))
    if not paths:
        return SavedStates({}, 0)
    ranks = re.search(r"_of_(\d{5})$", paths[0].stem)
    if ranks is None:
        raise _unreadable(paths[0], ValueError("its name must be importance_<rank>_of_<ranks>.pt"))
    names = {_name(rank, int(ranks[1])): rank for rank in range(int(ranks[1]))}
    for path in paths:
        if path.name not in names:
            raise _unreadable(path, ValueError(f"it does not belong with {paths[0].name}"))
    return SavedStates({names[path.name]: path for path in paths}, len(names))


class SavedStates:
    """The states of the ranks in a checkpoint, in order. A file is read when its state is first needed.

    Files of other ranks are missing if these save on another machine.

    Args:
        paths: the files that are there, by rank.
        ranks: number of ranks that saved the checkpoint.
    """

    def __init__(self, paths: dict[int, Path], ranks: int) -> None:
        self._paths, self._loaded = paths, {}
        self.ranks = ranks

    def __contains__(self, rank: int) -> bool:
        return rank in self._paths

    def __len__(self) -> int:
        return len(self._paths)

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


def resume(
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
        states: result of [`load_states`].
        rank: this rank.
        data: [`fingerprint.fingerprint`] of the training data.
        settings: settings of the resumed training.
        agree: whether all ranks pass True, a collective operation: either all ranks continue exactly, or none.

    Returns:
        A message on what could not be restored; None if everything was.

    Raises:
        UnreadableError: see [`SavedStates`].
        ValueError: if a state has the wrong form; other errors if parts are missing, see [`explaining_errors`].
    """
    obstacle, keeps = _obstacle(sampler, states, rank, data, settings)
    if agree(obstacle is None):
        sampler.load_state_dict(states[rank]["sampler"])
        return None
    if not keeps:
        sampler.restart(torch.full((sampler.shard.length,), torch.nan))
        return obstacle
    obstacle = obstacle or _OTHER_RANK
    if rank in states and _same(states[rank]["sampler"]["shard"], sampler.shard.index):
        needed = [states[rank]["sampler"]]
    else:
        needed = [state["sampler"] for state in states]
        obstacle += _unknown(states.missing)
    importance, record = _join(needed, sampler.shard.length)
    sampler.restart(importance, read_number(needed[0]["visits"], "passes", int), record)
    return obstacle


def _obstacle(
    sampler: ImportanceBatchSampler, states: SavedStates, rank: int, data: dict[str, Any], settings: dict[str, Any]
) -> tuple[str | None, bool]:
    """What prevents this rank from continuing exactly, None if nothing does; and whether importances remain valid."""
    before, length = states.any(rank), sampler.shard.length
    if before is None:
        return "contains no importances: they start unknown.", False
    saved = before["sampler"]["length"]
    changed = [
        f"{name}={before['settings'][name]!r} (now {settings[name]!r})"
        for name in sorted(before["settings"].keys() & settings)
        if before["settings"][name] != settings[name]
    ]
    if saved != length:
        message = f"has the importances of {saved} training examples, but train_dataset now has {length}: "
        return f"{message}importances start unknown.", False
    if other := differences(before["data"], data):
        return f"was written with different training data ({other}): importances start unknown.", False
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


def _unknown(missing: list[str]) -> str:
    """What follows from missing files, of which it names at most three."""
    if not missing:
        return ""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f" Not found: {', '.join(missing[:3])}{more}; the importances of the examples in them start unknown."


@contextmanager
def explaining_errors(checkpoint: str | Path) -> Iterator[None]:
    """Turn errors in a state into a `ValueError` that names the checkpoint and the fix."""
    try:
        yield
    except UnreadableError:
        raise
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


def _unreadable(path: Path, error: Exception) -> UnreadableError:
    return UnreadableError(f"The importances in {path} cannot be read ({_first_line(error)}). {_ADVICE}")


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
