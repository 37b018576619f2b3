"""The README's Python runs, its figures are those of the committed report, and links exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
PAGES += sorted(ROOT.glob("experiments/*/README.md"))


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_in_the_readme_runs(code: str) -> None:
    assert "assert" in code
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 2


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 120


def test_figures_in_the_readme_are_those_of_the_report() -> None:
    report = json.loads((ROOT / "docs/results/demo/report.json").read_text(encoding="utf-8"))

    def cells(title: str) -> list[str]:
        (row,) = re.findall(rf"^\| {title} \|(.*)\|$", README, flags=re.MULTILINE)
        return row.replace(" ", "").split("|")

    table = dict(zip(cells("vision tokens"), cells("accuracy on held-out images"), strict=True))
    assert table == {count: f"{value:.3f}" for count, value in report["accuracy"].items()}


def test_supported_types_in_the_readme_are_those_of_the_table() -> None:
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    types, supported = re.search(r": (\d+) types, (\d+) supported", page).groups()
    assert f"[{supported} of transformers' {types} image-text types]" in README


@pytest.mark.parametrize(
    ("page", "target"),
    [
        pytest.param(page, target, id=f"{page.relative_to(ROOT)}-{target}")
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    ],
)
def test_links_lead_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target).exists()
