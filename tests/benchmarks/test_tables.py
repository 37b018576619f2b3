"""Figures in the documents are those of the CSV: written by ``python -m benchmarks.tables``."""

from __future__ import annotations

import re

import pytest

from benchmarks import tables
from benchmarks.machine import ROOT
from benchmarks.results import read_csv, write_csv
from tests.benchmarks.rows import row

RESULTS = sorted(tables.RESULTS.glob("*.csv"))


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_documents_are_as_written_from_the_csv(name):
    """If this fails, `python -m benchmarks.tables` puts it right."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == tables.rewritten(text)


def test_what_is_said_is_said_where_it_belongs():
    marked = {
        name: [found["name"] for found in tables.MARK.finditer((ROOT / name).read_text("utf-8"))]
        for name in tables.DOCUMENTS
    }
    assert marked["README.md"] == ["summary", "machine", "overview"]
    assert marked["docs/packing.md"] == [
        "bins",
        "machine",
        "pack-forward",
        "pack-backward",
        "pack-training",
        "merge-forward",
        "losses",
        "calls",
        "copies",
        "planning",
    ]
    assert marked["benchmarks/README.md"] == ["machine"]
    assert {name for names in marked.values() for name in names} == set(tables.BLOCKS)


def test_no_time_stands_outside_the_marks():
    """Of packing on the CPU: what is written by hand does not follow a new CSV."""
    text = tables.MARK.sub("", (ROOT / "docs/packing.md").read_text(encoding="utf-8"))
    assert re.findall(r"\d+(?:\.\d+)? (?:ms|microseconds|GB/s)\b", text) == []


def test_a_block_that_nothing_writes_is_refused(tmp_path):
    text = "<!-- benchmarks: gossip of x -->\n<!-- end of gossip -->"
    with pytest.raises(ValueError, match=r"block must be one of machine, .*, got gossip"):
        tables.rewritten(text, tmp_path)


def test_the_rest_of_a_document_stays(tmp_path):
    write_csv(tmp_path / "x.csv", [row("a", "", "tokenflex", 1, samples=3, cores=2, sets=7)], {})
    text = "before\n<!-- benchmarks: machine of x -->\nold\n<!-- end of machine -->\nafter\n"
    new = tables.rewritten(text, tmp_path)
    assert new.startswith("before\n<!-- benchmarks: machine of x -->\nMeasured on Some GPU;")
    assert "1 rows have times, 1 of them from fewer than 5 samples; 0 found" in new
    assert "up to 7 sets of buffers." in new
    assert new.endswith("\n<!-- end of machine -->\nafter\n")
    assert "old" not in new
    assert tables.rewritten(new, tmp_path) == new


def timed(variant, p50, spread=1.0, **values):
    percentiles = {"p20_us": p50 - spread, "p80_us": p50 + spread}
    return row("merge_vision", "4x", variant, p50, **percentiles, **{"samples": 50, **values})


@pytest.mark.parametrize(
    ("ours", "peer", "bold"),
    [
        (timed("tokenflex", 1000), timed("index_put", 2000), "ours"),
        (timed("tokenflex", 2000), timed("index_put", 1000), "peer"),
        (timed("tokenflex", 1000), timed("index_put", 1001.5), None),  # they overlap
        (timed("tokenflex", 1000, samples=3), timed("index_put", 2000), None),
        (timed("tokenflex", 1000), timed("index_put", 2000, samples=4), None),
    ],
)
def test_bold_is_the_fastest_where_it_is_clear(ours, peer, bold):
    cells = [tables.milliseconds(ours), tables.milliseconds(peer)]
    if bold:
        at = ("ours", "peer").index(bold)
        cells[at] = f"**{cells[at]}**"
    assert tables.BLOCKS["merge-forward"]([ours, peer]).splitlines() == [
        "| forward | `merge_vision` | `index_put` |",
        "|---|---|---|",
        f"| 4x | {cells[0]} | {cells[1]} |",
    ]


def test_every_loss_is_listed_worst_first():
    rows = [
        timed("tokenflex", 1000),
        timed("index_put", 800),
        timed("masked_scatter", 500),
        timed("nested", 1500),
        row("swiglu", "T=8", "tokenflex", 9),
        row("swiglu", "T=8", "PyTorch eager", 1),  # not packing
    ]
    text = tables.losses(rows).splitlines()
    assert text[0] == "A peer is faster in 2 of 3 comparisons:"
    assert text[4:] == [
        "| merge_vision, forward, 4x | masked_scatter | 1 | 0.5 | 0.50 |",
        "| merge_vision, forward, 4x | index_put | 1 | 0.8 | 0.80 |",
    ]


def test_an_overview_has_the_worst_and_the_best_case_and_the_verdicts():
    rows = []
    for case, ours, peer in (("8 images", 10, 5), ("16 images", 10, 30)):
        rows += [row("project_tokens", case, "tokenflex", ours)]
        rows += [row("project_tokens", case, "PyTorch eager", peer)]
    text = tables.overview(rows)
    assert "| `project_tokens` (triton) | PyTorch eager | 0.50 | 3.00 | 1 of 2 |" in text
    assert "| projector, any T: never slower than eager | SHORT by 50.0%: 0.5 at worst" in text
    assert tables.summary(rows) == (
        "Beside eager PyTorch and torch.compile, `project_tokens` takes 0.33 to 2 times as long."
    )


# ---- the CSV against itself


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_rates_and_shares_in_the_csv_are_those_of_its_times(path):
    """A figure that was changed by hand, or a column that was, does not fit the others."""
    rows = [one for one in read_csv(path) if one["status"] == "ok"]
    ceilings = {one["variant"]: one for one in rows if one["op"] == "ceiling"}
    for one in rows:
        p50 = float(one["p50_us"])
        if one["ideal_bytes"]:
            rate = float(one["ideal_bytes"]) / p50 / 1e3
            assert float(one["gb_per_s"]) == pytest.approx(rate, rel=1e-3, abs=2e-3), one
            copy = float(ceilings["copy"]["gb_per_s"])
            assert float(one["share_of_copy"]) == pytest.approx(rate / copy, rel=1e-2, abs=1e-3)
        if one["flops"]:
            rate = float(one["flops"]) / p50 / 1e6
            assert float(one["tflop_per_s"]) == pytest.approx(rate, rel=1e-3, abs=2e-5), one
            matmul = float(ceilings["matmul"]["tflop_per_s"])
            assert float(one["share_of_matmul"]) == pytest.approx(rate / matmul, rel=1e-2, abs=1e-3)
        if one["tokens_per_s"]:
            tokens = 1e6 * float(one["tokens"]) / p50
            assert float(one["tokens_per_s"]) == pytest.approx(tokens, rel=1e-3, abs=1)
        assert p50 > 0
