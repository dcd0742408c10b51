"""The order of the modules: each imports only modules that are listed before it."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import hf_importance

ORDER = [
    "randomness",
    "upstream",
    "errors",
    *(
        f"sampling.{name}"
        for name in ("state", "draw", "shard", "rates", "memory", "guard", "strata", "segments", "replacement")
    ),
    *(f"sampling.{name}" for name in ("groups", "record", "first_passes", "suspects", "effective_steps", "sampler")),
    *(f"losses.{name}" for name in ("per_example", "outputs", "isolation", "first_batch", "custom", "made_up")),
    *(f"losses.{name}" for name in ("own_loss", "objective")),
    *(f"backward.{name}" for name in ("rows", "rules", "shape_rules", "part_rules", "layer_rules", "token_rules")),
    *(f"backward.{name}" for name in ("repeat", "blocks", "recompute", "pivotal", "threshold", "places")),
    *(f"backward.{name}" for name in ("verification", "selection", "selective")),
    *(f"data.{name}" for name in ("rows", "combining", "dataset", "loader", "lengths", "fingerprint")),
    "config",
    *(f"adapters.{name}" for name in ("base", "trl", "sentence_transformers", "known")),
    *(f"report.{name}" for name in ("columns", "texts", "tokens", "findings", "pictures", "plots", "duplicates")),
    *(f"report.{name}" for name in ("tables", "examples", "hub", "logs", "training", "page")),
    *(
        f"run.{name}"
        for name in ("loop_epochs", "effective_epochs", "validation", "backward", "data", "step", "checkpoints")
    ),
    *(f"run.{name}" for name in ("reuse", "unweighted", "run", "callbacks")),
    "trainer",
    "__init__",
]
FOLDERS = ("sampling", "losses", "backward", "data", "adapters", "report", "run")
STRANGERS = ("sampling", "losses", "backward", "data")
"""Folders that do not know each other."""
ONLY_TORCH = {module for module in ORDER if module.startswith(("losses.", "sampling.", "backward."))}
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
            other = name.removeprefix("hf_importance.")
            folder, other_folder = module.split(".")[0], other.split(".")[0]
            if ORDER.index(other) >= ORDER.index(module):
                yield f"{module} imports {name}, which is not listed before it"
            elif folder != other_folder and {folder, other_folder} <= set(STRANGERS):
                yield f"{module} imports {name}, on which it must not depend"
        elif module in ONLY_TORCH and name not in TORCH and name not in sys.stdlib_module_names:
            yield f"{module} imports {name}, on which it must not depend"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_modules_before_it(module):
    assert list(violations(module, FILES[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sampling.memory", "from hf_importance.sampling.sampler import ImportanceBatchSampler"),
        ("sampling.record", "from hf_importance.run import checkpoints"),
        ("sampling.segments", "def f():\n    import hf_importance.trainer"),
        ("sampling.sampler", "from hf_importance.run.effective_epochs import EffectiveEpochs"),
        ("sampling.rates", "import transformers"),
        ("losses.objective", "from transformers.utils import logging"),
        ("backward.recompute", "from transformers.modeling_layers import GradientCheckpointingLayer"),
        ("backward.selection", "from hf_importance.losses.objective import Measured"),
        ("backward.rows", "from hf_importance.backward import rules"),
        ("losses.objective", "from hf_importance.sampling.draw import Draw"),
        ("data.dataset", "from hf_importance.sampling.draw import Draw"),
        ("losses.outputs", "from hf_importance.losses import objective"),
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
