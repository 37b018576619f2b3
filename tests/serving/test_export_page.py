"""The page about export is true: its Python runs, and its table is the measurement's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.models.tiny import WIDTH, picture, tiny_model
from tests.test_docs import snippets_of
from tokenflex.digits.processor import digits_processor

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "serving/export.md").read_text(encoding="utf-8")


def test_python_of_the_page_runs_in_order():
    names = {"model": tiny_model(), "processor": digits_processor(16)}
    names |= {"a": picture(1), "b": picture(2)}
    snippets = snippets_of(PAGE)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "docs/serving/export.md", "exec"), names)
    assert [len(names[name]) for name in ("first", "second")] == [5, 10]
    assert names["tokens"].shape == torch.Size([5, 9, WIDTH])


def test_the_table_is_what_was_measured():
    rows = json.loads((DOCS / "results/export/demo.json").read_text(encoding="utf-8"))
    assert {row["rounds"] for row in rows} == {100}
    measured = {(row["runtime"], row["work"]): row["best_ms"] for row in rows}
    works = [*dict.fromkeys(work for _, work in measured)]
    table = [f"| runtime | {' | '.join(works)} |", "|" + "---|" * (len(works) + 1)]
    for runtime in dict.fromkeys(runtime for runtime, _ in measured):
        times = [f"{measured[runtime, work]:.2f}" for work in works]
        table.append(f"| {runtime} | {' | '.join(times)} |")
    assert "\n".join(table) in PAGE
