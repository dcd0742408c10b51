"""Versions and requirements are the same in all files that state them."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_importance

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def project():
    toml = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements():
    """Requirements of the package and its extras, except those that are extras of the package."""
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    return [r for r in requirements if r.name != "hf_importance"]


def pins(python):
    """The versions of scripts/constraints.txt for a version of Python, by name."""
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = [Requirement(line) for line in lines if not line.startswith("#")]
    chosen = [r for r in constraints if r.marker is None or r.marker.evaluate({"python_version": python})]
    names = [canonicalize_name(r.name) for r in chosen]
    assert len(set(names)) == len(names), "each package has one version"
    return {name: next(iter(r.specifier)).version for name, r in zip(names, chosen, strict=True)}


def outside(requirements, versions, python):
    """Names of the requirements whose tested version is not in their range."""
    active = [r for r in requirements if r.marker is None or r.marker.evaluate({"python_version": python})]
    tested = {r: versions.get(canonicalize_name(r.name)) for r in active}
    return [r.name for r, version in tested.items() if version is not None and not r.specifier.contains(version)]


@pytest.mark.parametrize("python", PYTHONS)
def test_tested_versions_are_in_the_required_ranges(python):
    versions = pins(python)
    assert outside(requirements(), versions, python) == []
    changed = versions | {"transformers": "6.0.0", "numpy": "1.23"}
    assert outside(requirements(), changed, python) == ["numpy", "transformers"], "control: others are not"


def test_every_requirement_has_a_tested_version():
    tested = set().union(*map(pins, PYTHONS))
    assert {canonicalize_name(r.name) for r in requirements()} <= tested


def test_classifiers_and_minimum_agree_on_the_python_versions():
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    assert tuple(classified) == PYTHONS
    assert project()["requires-python"] == f">={PYTHONS[0]}"


def test_citation_has_the_version_of_the_package():
    version = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert version == Version(hf_importance.__version__).base_version
