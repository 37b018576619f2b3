"""The study of clips: every split is measured, and its page is written from the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.video.__main__ import COUNTS, SHOWN, measure, page_of, training_of
from tests.models.tiny import tiny_model
from tokenflex.digits.moving import QUESTIONS, moving_processor

RESULTS = Path(__file__).parents[2] / "docs/results/video"


def test_the_page_is_that_of_the_report():
    report = json.loads((RESULTS / "report.json").read_text(encoding="utf-8"))
    assert page_of(report) == (RESULTS / "README.md").read_text(encoding="utf-8")


def test_every_split_is_measured(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_COMMIT", "0a1b2c3")
    report = measure(tiny_model(), moving_processor(), 2)
    assert report["questions"] == dict.fromkeys(QUESTIONS, 2)
    splits = {(split["frames"], split["tokens_per_frame"]) for split in report["splits"]}
    assert splits == {(frames, count) for frames in SHOWN for count in COUNTS}
    rows = [line for line in page_of(report).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(splits)
    totals = [int(row.split("|")[1]) for row in rows[1:]]
    assert totals == sorted(totals)
    assert report["commit"] == "0a1b2c3"


def test_a_report_says_how_its_model_was_trained(tmp_path):
    config = {
        "seed": 7,
        "encoder_warm_up": {"steps": 20},
        "stages": [{"name": "a", "steps": 40}, {"name": "b", "steps": 50}],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    training = training_of(tmp_path / "checkpoint")
    assert training == {
        "seed": 7,
        "encoder_warm_up_steps": 20,
        "steps": {"a": 40, "b": 50},
        "total_steps": 90,
    }
    report = json.loads((RESULTS / "report.json").read_text(encoding="utf-8"))
    page = page_of({**report, "commit": "0a1b2c3", "training": training})
    assert "commit `0a1b2c3`; trained with seed 7 for 90 steps, after 20 of" in page
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must be the configuration of a training run"):
        training_of(tmp_path / "checkpoint")
