"""Real data from installed packages, without network access: scanned digits, docstrings and signatures."""

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

PACKAGES = {  # import name → distribution name
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
    """1,797 scanned digits of 8 × 8 pixels in 10 classes (UCI, from scikit-learn); a fifth is the test split."""
    scans = load_digits()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    rows = {
        "image": [Image.fromarray(pixels) for pixels in (scans.images * 15.9).astype("uint8")],
        "label": scans.target.tolist(),
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    return data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def docstrings(per_package: int = 1000, whole: bool = False) -> datasets.DatasetDict:
    """Docstrings in installed packages, labelled with the package; a fifth is the test split.

    If several texts start or end with the same six words, only one is kept, so that the splits share no near
    duplicates. The first call reads source files, which takes some seconds; `datasets` caches the result for the
    installed versions of the packages.

    Args:
        per_package: maximum number of texts per package.
        whole: whether to use whole docstrings instead of their first paragraphs.
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
    """Signatures of functions in installed packages as prompts, and the first sentences of docstrings as completions.

    A tenth is the test split; see [`docstrings`] on duplicates and caching.

    Args:
        per_package: maximum number of functions per package.
    """
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
            words = _first_and_last_words(text)
            if found < per_package and isinstance(node, ast.FunctionDef) and seen.isdisjoint(words):
                sentence = re.split(r"(?<=[.:])\s", text)[0]
                yield {"prompt": f"{node.name}({ast.unparse(node.args)})", "completion": sentence}
                found += 1
            seen.update(words)


def _folders(versions: dict[str, str]) -> list[Path]:
    folders = [Path(importlib.util.find_spec(name).origin).parent for name in versions]
    return [*folders, Path(sysconfig.get_path("stdlib"))]


def _texts(versions: dict[str, str], per_package: int, whole: bool) -> Iterator[dict[str, object]]:
    seen: set[str] = set()
    for label, folder in enumerate(_folders(versions)):
        found = 0
        for _, text in _documented(folder, whole):
            words = _first_and_last_words(text)
            if seen.isdisjoint(words):
                yield {"text": text, "label": label}
                found += 1
            seen.update(words)
            if found == per_package:
                break


def _first_and_last_words(text: str) -> tuple[str, str]:
    words = re.findall(r"[a-z]+", text.lower())
    return "^" + " ".join(words[:_MIN_WORDS]), "$" + " ".join(words[-_MIN_WORDS:])


def _documented(folder: Path, whole: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """Definitions with a docstring, and its text, if it has at least six words.

    Files are read in a fixed order that mixes subpackages.
    """
    relative = [path.relative_to(folder) for path in folder.rglob("*.py")]
    files = [path for path in relative if {"site-packages", "tests", "test"}.isdisjoint(path.parts)]
    for path in sorted(files, key=lambda path: zlib.crc32(path.as_posix().encode())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse((folder / path).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates, or files in other encodings
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
