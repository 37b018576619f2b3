"""An old release of a package is refused at import; the bounds are those of pyproject.toml."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tokenflex_kernels import versions

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("found", ["5.16.1", "5.16.1.dev0", "4.57.0", "5"])
def test_an_older_release_is_refused(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda package: found)
    with pytest.raises(ImportError) as error:
        versions.require("transformers", "5.17", "tokenflex.models")
    assert str(error.value) == f"tokenflex.models needs transformers >= 5.17, found {found}"


@pytest.mark.parametrize("found", ["5.17", "5.17.0", "5.17.0.dev0", "5.100", "6.0a1", "5.17+cu130"])
def test_a_release_from_the_oldest_on_is_taken(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda package: found)
    versions.require("transformers", "5.17")


@pytest.mark.parametrize(
    ("found", "expected"),
    [("3.7", True), ("3.7.1", True), ("3.7.0+cu130", True), ("3.70", False), ("3.9.0", False)],
)
def test_a_release_is_known_by_its_first_numbers(monkeypatch, found, expected):
    monkeypatch.setattr(versions, "version", lambda package: found)
    assert versions.is_release("triton", "3.7") == expected


def test_a_package_that_is_missing_is_not_too_old(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", version)
    versions.require("triton", "3.6")
    assert not versions.is_release("triton", "3.6")


@pytest.mark.parametrize(
    ("module", "package", "needed_by"),
    [
        ("tokenflex_kernels", "torch", "tokenflex"),
        ("tokenflex_kernels", "triton", "tokenflex"),
        ("tokenflex.models", "transformers", "tokenflex"),
    ],
)
def test_importing_refuses_what_the_project_does_not_admit(module, package, needed_by):
    """In a process of its own, in which the package says that it is of a release before ours."""
    oldest = re.search(rf'"{package}>=([\d.]+)', PROJECT)[1]
    code = f"""
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "1.9.7" if name == {package!r} else version(name)
import {module}
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: {needed_by} needs {package} >= {oldest}, found 1.9.7"


def test_the_drop_in_names_the_release_that_it_needs(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(versions, "version", lambda package: "5.17.0")
    for name in [name for name in sys.modules if name.startswith("tokenflex.dropin")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"tokenflex\.dropin needs transformers >= 5\.18, found"):
        importlib.import_module("tokenflex.dropin")


def test_the_oldest_set_is_what_the_project_admits():
    """make test-versions runs on the lowest release of each."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints/oldest.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    for package in ("torch", "triton", "transformers"):
        oldest = re.search(rf'"{package}>=([\d.]+)', PROJECT)[1]
        assert pins[package] == f"{oldest}.0"
