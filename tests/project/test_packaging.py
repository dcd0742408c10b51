"""What is told about this release in several files is the same in all of them."""

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


def ranges():
    """Requirements of all extras, without those that name our own extras."""
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    found = [Requirement(text) for texts in lists for text in texts]
    return [r for r in found if r.name != "hf_importance"]


def pins(python):
    """The tested versions, by name."""
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    chosen = [r for r in found if r.marker is None or r.marker.evaluate({"python_version": python})]
    names = [canonicalize_name(r.name) for r in chosen]
    assert len(set(names)) == len(names), "one version of each"
    return {name: next(iter(r.specifier)).version for name, r in zip(names, chosen, strict=True)}


def outside(requirements, versions, python):
    """Those whose tested version is not in their range."""
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"python_version": python})]
    known = {r: versions.get(canonicalize_name(r.name)) for r in wanted}
    return [r.name for r, version in known.items() if version is not None and not r.specifier.contains(version)]


@pytest.mark.parametrize("python", PYTHONS)
def test_tested_versions_are_in_the_ranges(python):
    versions = pins(python)
    assert outside(ranges(), versions, python) == []
    changed = versions | {"transformers": "6.0.0", "numpy": "1.23"}
    assert outside(ranges(), changed, python) == ["numpy", "transformers"], "control"


def test_every_requirement_has_a_tested_version():
    known = set().union(*map(pins, PYTHONS))
    assert {canonicalize_name(r.name) for r in ranges()} <= known


def test_pythons():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    assert tuple(named) == PYTHONS
    assert project()["requires-python"] == f">={PYTHONS[0]}"


def test_the_citation_is_of_this_version():
    version = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert version == Version(hf_importance.__version__).base_version
