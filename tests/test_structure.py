"""The package is read upward, as its imports go: no module imports one that stands after it."""

import ast
import sys
from pathlib import Path

import pytest

import hf_importance

ORDER = [
    "functional",
    "memory",
    "sampler",
    "checkpoint",
    "data",
    "config",
    "objective",
    "trainer",
    "report",
    "__init__",
]
ONLY_TORCH = {"functional", "memory", "sampler", "checkpoint", "data", "objective"}
PACKAGE = Path(hf_importance.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imported(source):
    """Names of modules: our own without the package's name, of others the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            ours = node.module == "hf_importance"
            names = [f"hf_importance.{alias.name}" for alias in node.names] if ours else [node.module]
        else:
            continue
        for name in names:
            yield name if name.startswith("hf_importance.") else name.split(".")[0]


def faults(module, source):
    for name in imported(source):
        if name.startswith("hf_importance."):
            if ORDER.index(name.split(".")[1]) >= ORDER.index(module):
                yield f"{module} imports {name}, which stands above it"
        elif module in ONLY_TORCH and name != "torch" and name not in sys.stdlib_module_names:
            yield f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    assert list(faults(module, (PACKAGE / f"{module}.py").read_text())) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("memory", "from hf_importance.sampler import Draw"),
        ("memory", "from hf_importance import sampler"),
        ("memory", "def f():\n    import hf_importance.trainer"),
        ("data", "import transformers"),
        ("objective", "from transformers.utils import logging"),
    ],
)
def test_faults_are_found(module, source):
    assert len(list(faults(module, source))) == 1


def test_the_reading_order_names_every_module():
    for module in MODULES:
        assert module == "__init__" or f"- `{module}`:" in hf_importance.__doc__
