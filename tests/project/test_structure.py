"""The order of the modules: each imports only modules that are listed before it."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import hf_importance

ORDER = [
    "state",
    "randomness",
    "record",
    "losses.per_example",
    "losses.rows",
    "losses.heads",
    "losses.isolation",
    "losses.made_up",
    "losses.first_batch",
    "losses.own_loss",
    "losses.last_layer",
    "losses.objective",
    "sampling.draw",
    "sampling.rates",
    "sampling.memory",
    "sampling.guard",
    "sampling.strata",
    "sampling.segments",
    "sampling.replacement",
    "sampling.groups",
    "sampling.suspects",
    "sampling.progress",
    "sampling.sampler",
    "adapters.base",
    "adapters.fused_head",
    "adapters.sft",
    "adapters.preference",
    "adapters.sentences",
    "adapters.known",
    "data",
    "fingerprint",
    "lengths",
    "checkpoint",
    "config",
    "step",
    "columns",
    "loader",
    "epochs",
    "schedule",
    "support",
    "overrides",
    "report.texts",
    "report.tokens",
    "report.findings",
    "report.plots",
    "report.examples",
    "report.duplicates",
    "report.page",
    "report.hub",
    "report.logs",
    "report.training",
    "hooks.data",
    "hooks.step",
    "hooks.checkpoints",
    "hooks.report",
    "trainer",
    "__init__",
    "command_line.arguments",
    "command_line.metrics",
    "command_line.embedded_data",
    "command_line.data_files",
    "command_line.completions",
    "command_line.labels",
    "command_line.fine_tuning",
    "command_line.lora",
]
FOLDERS = ("losses", "sampling", "adapters", "report", "hooks", "command_line")
ONLY_TORCH = {"state", "randomness", "record", "fingerprint", "checkpoint", "data", "report.findings"}
ONLY_TORCH |= {module for module in ORDER if module.startswith(("losses.", "sampling."))}
TORCH = ("torch", "numpy")
PACKAGE = Path(hf_importance.__file__).parent
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = sorted(FILES.keys() - {f"{folder}.__init__" for folder in FOLDERS})  # which only have docstrings


def imported(source):
    """Imported modules of hf_importance, and names of other imported packages."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            ours = node.module in ("hf_importance", *(f"hf_importance.{folder}" for folder in FOLDERS))
            names = [f"{node.module}.{alias.name}" for alias in node.names] if ours else [node.module]
        else:
            continue
        for name in names:
            yield name if name.startswith("hf_importance.") else name.split(".")[0]


def violations(module, source):
    """Messages on imports that the order does not allow."""
    for name in imported(source):
        if name.startswith("hf_importance."):
            if ORDER.index(name.removeprefix("hf_importance.")) >= ORDER.index(module):
                yield f"{module} imports {name}, which is not listed before it"
        elif module in ONLY_TORCH and name not in TORCH and name not in sys.stdlib_module_names:
            yield f"{module} imports {name}, on which it must not depend"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_modules_before_it(module):
    assert list(violations(module, FILES[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sampling.memory", "from hf_importance.sampling.sampler import ImportanceBatchSampler"),
        ("record", "from hf_importance import checkpoint"),
        ("sampling.segments", "def f():\n    import hf_importance.trainer"),
        ("sampling.sampler", "from hf_importance.run.schedule import follow"),
        ("sampling.progress", "import transformers"),
        ("data", "import transformers"),
        ("losses.objective", "from transformers.utils import logging"),
        ("losses.heads", "from hf_importance.losses import objective"),
    ],
)
def test_control_violations_are_found(module, source):
    assert len(list(violations(module, source))) == 1


def test_order_lists_every_module():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("folder", [None, *FOLDERS])
def test_docstring_lists_the_modules_in_order(folder):
    """In the docstring of the package, a folder is listed at the position of its modules."""
    if folder is None:
        text, parts = hf_importance.__doc__, [module.split(".")[0] for module in ORDER if module != "__init__"]
    else:
        text = importlib.import_module(f"hf_importance.{folder}").__doc__
        parts = [module.removeprefix(f"{folder}.") for module in ORDER if module.startswith(f"{folder}.")]
    positions = [text.find(f"- `{name}`:") for name in dict.fromkeys(parts)]
    assert positions == sorted(positions)
    assert positions[0] > 0
