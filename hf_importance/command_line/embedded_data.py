"""Real data from installed packages, without network: scanned digits, and docstrings."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import datasets
from PIL import Image
from sklearn.datasets import load_digits

PACKAGES = {  # module → distribution
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface_hub",
}
STANDARD_LIBRARY = "python"
_MIN_WORDS = 6


def digits() -> datasets.DatasetDict:
    """1,797 scanned digits of 8 × 8 pixels in 10 classes (UCI, from scikit-learn), with a fifth as test split."""
    scans = load_digits()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    rows = {
        "image": [Image.fromarray(pixels) for pixels in (scans.images * 15.9).astype("uint8")],
        "label": scans.target.tolist(),
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def docstrings(per_package: int = 1000, whole: bool = False) -> datasets.DatasetDict:
    """First paragraphs of docstrings of installed packages, or `whole` docstrings, labelled with the package.

    A fifth is the test split. Of texts that start or end with the same six words only one is kept, so that no near
    duplicates cross the split. The first call reads source files (some seconds); `datasets` caches the result for these
    versions of the packages.
    """
    versions = {module: version(name) for module, name in PACKAGES.items()}
    names = [*versions, STANDARD_LIBRARY]
    data = datasets.Dataset.from_generator(
        _texts,
        features=datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names)),
        gen_kwargs={"versions": versions, "per_package": per_package, "whole": whole},
    )
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def signatures(per_package: int = 1000) -> datasets.DatasetDict:
    """Signatures of functions in installed packages with the first sentence of their docstring; a tenth for testing."""
    versions = {module: version(name) for module, name in PACKAGES.items()}
    data = datasets.Dataset.from_generator(
        _signatures,
        features=datasets.Features(prompt=datasets.Value("string"), completion=datasets.Value("string")),
        gen_kwargs={"versions": versions, "per_package": per_package},
    )
    return data.train_test_split(test_size=0.1, seed=0)


def _signatures(versions: dict[str, str], per_package: int) -> Iterator[dict[str, object]]:
    seen: set[str] = set()
    for folder in _folders(versions):
        found = 0
        for node, text in _documented(folder):
            ends = _ends(text)
            if found < per_package and isinstance(node, ast.FunctionDef) and seen.isdisjoint(ends):
                sentence = re.split(r"(?<=[.:])\s", text)[0]
                yield {"prompt": f"{node.name}({ast.unparse(node.args)})", "completion": sentence}
                found += 1
            seen.update(ends)


def _folders(versions: dict[str, str]) -> list[Path]:
    folders = [Path(importlib.util.find_spec(name).origin).parent for name in versions]
    return [*folders, Path(sysconfig.get_path("stdlib"))]


def _texts(versions: dict[str, str], per_package: int, whole: bool) -> Iterator[dict[str, object]]:
    seen: set[str] = set()
    for label, folder in enumerate(_folders(versions)):
        found = 0
        for _, text in _documented(folder, whole):
            ends = _ends(text)
            if seen.isdisjoint(ends):
                yield {"text": text, "label": label}
                found += 1
            seen.update(ends)
            if found == per_package:
                break


def _ends(text: str) -> tuple[str, str]:
    words = re.findall(r"[a-z]+", text.lower())
    return "^" + " ".join(words[:_MIN_WORDS]), "$" + " ".join(words[-_MIN_WORDS:])


def _documented(folder: Path, whole: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """Docstrings or their first paragraphs, of at least six words, with files in an order that mixes subpackages."""
    relative = [path.relative_to(folder) for path in folder.rglob("*.py")]
    files = [path for path in relative if {"site-packages", "tests", "test"}.isdisjoint(path.parts)]
    for path in sorted(files, key=lambda path: zlib.crc32(path.as_posix().encode())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse((folder / path).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and test files of other packages
            continue
        for node in _definitions(tree):
            text = ast.get_docstring(node) or ""
            paragraph = " ".join((text if whole else text.split("\n\n")[0]).split())
            if len(re.findall(r"[A-Za-z]+", paragraph)) >= _MIN_WORDS:
                yield node, paragraph


def _definitions(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    yield node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _definitions(child)
