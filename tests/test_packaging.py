"""The files that a release is made of."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import tokenflex
from tokenflex.cli import main

ROOT = Path(__file__).parents[1]


def test_the_command_line_says_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tokenflex {tokenflex.__version__}\n"


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == tokenflex.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## .*$", changelog, flags=re.MULTILINE)
    assert latest is not None
    assert tokenflex.__version__ in latest.group()


def test_the_source_distribution_holds_every_folder():
    """The packages are found by setuptools; all else must be named."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a clone of the repository")
    folders = {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    grafted = set(re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    assert folders - {"tokenflex", "tokenflex_kernels", ".github"} == grafted


def test_the_workflows_run_commands_that_exist():
    """They run on a public host alone: what they name here must be here."""
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["jobs"]
        for name in re.findall(r"(?:tests|\.ci)/[\w/.]+", text):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
