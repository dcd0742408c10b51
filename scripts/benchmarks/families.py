"""Which families of models have operations in their backward pass for which row gradients become dense."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks.tables import row, rule

KEYS = ("family",)
_FOLDER = Path(__file__).parents[2] / "tests" / "backward"


def names() -> list[str]:
    """Families that the tests know."""
    return list(_of_tests().FAMILIES)


def run(family: str) -> dict[str, Any]:
    """Detours of a backward pass without dropout and one with it, of which rows are dropped."""
    found = _of_tests()
    return {"model": found.FAMILIES[family].model, "detours": dict(sorted(found.detours_of(family).items()))}


def _of_tests() -> Any:
    """The module of the tests with tiny models of all families."""
    if str(_FOLDER) not in sys.path:
        sys.path.append(str(_FOLDER))
    return importlib.import_module("families")


def tables(runs: list[dict[str, Any]]) -> str:
    """Table in Markdown."""
    head = ("family", "model", "dense detours")
    lines = [row(head), rule(head)]
    for found in runs:
        operations = ", ".join(f"`{name}`" for name in found["detours"])
        lines.append(row([found["family"], f"`{found['model']}`", operations or "none"]))
    return "\n".join(lines)
