"""The package is read upward, as its imports go: no module imports one that stands after it."""

import ast
import sys
from pathlib import Path

import pytest

import hf_importance

ORDER = [
    "functional",
    "record",
    "memory",
    "sampler",
    "checkpoint",
    "data",
    "config",
    "objective",
    "report.findings",
    "report.plots",
    "report.page",
    "report.hub",
    "report.hooks",
    "trainer",
    "__init__",
]
ONLY_TORCH = {"functional", "record", "memory", "sampler", "checkpoint", "data", "objective", "report.findings"}
PACKAGE = Path(hf_importance.__file__).parent
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = sorted(FILES.keys() - {"report.__init__"})  # which only says what is in the folder


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
            if ORDER.index(name.removeprefix("hf_importance.")) >= ORDER.index(module):
                yield f"{module} imports {name}, which stands above it"
        elif module in ONLY_TORCH and name != "torch" and name not in sys.stdlib_module_names:
            yield f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    assert list(faults(module, FILES[module].read_text())) == []


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
        name, text = module, hf_importance.__doc__
        if module.startswith("report."):
            name, text = module.removeprefix("report."), hf_importance.report.__doc__
        assert module == "__init__" or f"- `{name}`:" in text
