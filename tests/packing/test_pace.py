"""The benchmark of packed training: what its ways learn, and its published rows."""

from __future__ import annotations

import pytest

from benchmarks import packing_pace
from benchmarks.packing_pace import (
    BY_LENGTH,
    CASES,
    ONE_MASK,
    PACKED,
    PADDED,
    WARM_UP,
    Case,
    check_losses,
    format_table,
    measure,
)
from benchmarks.results import RESULTS, ROOT, read_csv


def published():
    [path] = (RESULTS / "packing-pace").glob("*.csv")
    return read_csv(path)


def test_the_documentation_has_the_published_rows():
    rows = published()
    assert {(row["case"], row["way"]) for row in rows} == {
        (case, way) for case in CASES for way in (PADDED, BY_LENGTH, PACKED, ONE_MASK)
    }
    assert format_table(rows) in (ROOT / "docs/packing.md").read_text("utf-8")


@pytest.mark.slow
def test_all_ways_learn_the_same(monkeypatch):
    monkeypatch.setattr(packing_pace, "BATCH", 2)
    monkeypatch.setitem(CASES, "few", Case(8, 0.5, 16, (0, 1)))
    rows = measure("few", 1)  # the losses of the first step are compared in it
    assert [row["way"] for row in rows] == [PADDED, BY_LENGTH, PACKED, ONE_MASK]
    assert rows[0]["ratio"] == 1
    assert rows[0]["padded_tokens"] > rows[2]["padded_tokens"] == rows[2]["tokens"]
    assert all(row["samples_per_s"] > 0 for row in rows)


def test_another_loss_is_named():
    with pytest.raises(ValueError, match="first loss of 'packed' must be that of the padded run"):
        check_losses({PADDED: [2.0], PACKED: [2.1]})


def test_samples_by_length_are_the_same_samples(tmp_path):
    study = packing_pace.Study(CASES["chats"], 4, tmp_path)
    assert {id(sample) for sample in study.grouped} == {id(sample) for sample in study.samples}
    lengths = [len(sample["input_ids"]) for sample in study.grouped]
    counted = lengths[WARM_UP * packing_pace.BATCH :][: packing_pace.BATCH]
    assert max(counted) - min(counted) < max(lengths) - min(lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--out", "/dev/null"], "--out: expected a folder to write to, got '/dev/null'"),
    ],
)
def test_misuse_is_refused_before_anything_is_measured(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(packing_pace, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        packing_pace.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
