"""Files of results: JSON with all runs, updated after each run, so none is repeated."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_importance

FORMAT = 2
FOLDER = Path(__file__).parent.parent / "results"
_PACKAGES = ("torch", "transformers", "accelerate", "numpy", "scikit-learn")


def load(path: Path) -> dict[str, Any]:
    """Load a file, or start a new one with versions, machine and no runs."""
    if path.exists():
        return json.loads(path.read_text())
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "runs": [],
    }


def save(path: Path, results: dict[str, Any], keys: Sequence[str]) -> None:
    """Write the file atomically, with the runs sorted by `keys`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    runs = sorted(results["runs"], key=lambda run: [run[name] for name in keys])
    head = json.dumps({name: value for name, value in results.items() if name != "runs"}, indent=1)
    lines = ",\n  ".join(map(json.dumps, runs))
    unfinished.write_text(f'{head[:-2]},\n "runs": [\n  {lines}\n ]\n}}\n')
    os.replace(unfinished, path)


def fill(
    path: Path,
    keys: Sequence[str],
    grid: Iterable[tuple[Any, ...]],
    run: Callable[..., dict[str, Any]],
    processes: int,
    settings: Callable[[str, Any], dict[str, Any] | None] = lambda key, value: None,
) -> None:
    """Run the points of the grid that are missing in the file, in parallel.

    Args:
        path: path of the file.
        keys: names of the coordinates of a point.
        grid: points of the grid.
        run: function from a point, as arguments, to its results.
        processes: number of processes.
        settings: function from a key and a value to the settings that the value stands for, which are saved.

    Raises:
        SystemExit: if the file has runs with different settings under the same name.
    """
    results = load(path)
    done = {tuple(found[name] for name in keys) for found in results["runs"]}
    grid = list(grid)
    missing = [point for point in grid if point not in done]
    print(f"{len(grid) - len(missing)} of {len(grid)} runs are in {path}; {len(missing)} to go")
    for key, value in dict.fromkeys(pair for point in missing for pair in zip(keys, point, strict=True)):
        now = json.loads(json.dumps(settings(key, value)))
        if now is not None:
            kept = results.setdefault("settings", {}).setdefault(key, {})
            if kept.setdefault(str(value), now) != now and any(found[key] == value for found in results["runs"]):
                raise SystemExit(
                    f"error: {path} has runs of the {key} {value!r} with other settings, {kept[str(value)]}; now they "
                    f"are {now}. Remove those runs, or choose another file with --output."
                )
            kept[str(value)] = now
    with ProcessPoolExecutor(processes, initializer=_be_quiet) as pool:
        jobs = {pool.submit(run, *point): point for point in missing}
        for number, job in enumerate(as_completed(jobs), 1):
            found = {"version": hf_importance.__version__} | job.result()
            results["runs"].append(dict(zip(keys, jobs[job], strict=True)) | found)
            save(path, results, keys)
            print(f"{number}/{len(missing)} {jobs[job]}", flush=True)


def _be_quiet() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def digest(runs: list[dict[str, Any]]) -> str:
    """Digest of the runs, to check whether a plot was drawn from them."""
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()


def grouped(runs: Iterable[dict[str, Any]], figure: str, keys: Sequence[str]) -> dict[tuple[Any, ...], list[float]]:
    """Values of a figure grouped by keys, in order of the seeds."""
    groups = defaultdict(list)
    for found in sorted(runs, key=lambda run: run["seed"]):
        groups[tuple(found[name] for name in keys)].append(found[figure])
    return groups


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the latter is NaN for one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error
