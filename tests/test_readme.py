"""The README is true: its Python runs, its figures are those of the committed report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_in_the_readme_runs(code: str) -> None:
    assert "assert" in code
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 2


def test_figures_in_the_readme_are_those_of_the_report() -> None:
    report = json.loads((ROOT / "docs/results/demo/report.json").read_text(encoding="utf-8"))
    counts = re.search(r"^\| vision tokens \|(.*)\|$", README, flags=re.MULTILINE)
    shown = re.search(r"^\| accuracy on held-out images \|(.*)\|$", README, flags=re.MULTILINE)
    assert counts is not None
    assert shown is not None
    table = dict(
        zip(
            counts[1].replace(" ", "").split("|"), shown[1].replace(" ", "").split("|"), strict=True
        )
    )
    assert table == {count: f"{value:.3f}" for count, value in report["accuracy"].items()}


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_in_the_readme_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
