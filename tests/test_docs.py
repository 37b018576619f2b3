"""The pages of docs/ are true: the Python of docs/models.md runs, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.models.tiny import picture, tiny_model
from tokenflex.digits.processor import digits_processor

DOCS = Path(__file__).parents[1] / "docs"
MODELS = (DOCS / "models.md").read_text(encoding="utf-8")


def test_python_of_the_models_page_runs_in_order(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    digits_processor(16).save_pretrained(tmp_path)
    names = {"folder": str(tmp_path), "a": picture(1), "b": picture(2)}
    snippets = re.findall(r"```python\n(.*?)```", MODELS, flags=re.DOTALL)
    assert len(snippets) >= 7
    for snippet in snippets:
        exec(compile(snippet, "docs/models.md", "exec"), names)
    assert names["loss"].item() > 0
    assert names["answer"][0]["generated_text"]


LINKS = [
    (page.name, target)
    for page in sorted(DOCS.glob("*.md"))
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page, target):
    assert (DOCS / page).parent.joinpath(target).exists()
