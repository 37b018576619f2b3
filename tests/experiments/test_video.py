"""The study of clips: every split is measured, and its page is written from the report."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.video.__main__ import COUNTS, SHOWN, measure, page_of
from tests.models.tiny import tiny_model
from tokenflex.digits.moving import QUESTIONS, moving_processor

RESULTS = Path(__file__).parents[2] / "docs/results/video"


def test_the_page_is_that_of_the_report():
    report = json.loads((RESULTS / "report.json").read_text(encoding="utf-8"))
    assert page_of(report) == (RESULTS / "README.md").read_text(encoding="utf-8")


def test_every_split_is_measured():
    report = measure(tiny_model(), moving_processor(), 2)
    assert report["questions"] == dict.fromkeys(QUESTIONS, 2)
    splits = {(split["frames"], split["tokens_per_frame"]) for split in report["splits"]}
    assert splits == {(frames, count) for frames in SHOWN for count in COUNTS}
    rows = [line for line in page_of(report).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(splits)
    totals = [int(row.split("|")[1]) for row in rows[1:]]
    assert totals == sorted(totals)
