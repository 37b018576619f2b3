"""Seconds to the first token, measured and written for a tiny model."""

from __future__ import annotations

import csv

import pytest

from benchmarks.results import environment, read_csv
from experiments.speed import first_token
from experiments.speed.models import RESULTS, fields, random_model
from tests.models.test_modeling import CallCounter

VISION = fields(16, 16, 1, 2, image_size=32, patch_size=4)
TEXT = {**first_token.TEXT, **fields(16, 16, 1, 2, vocab_size=64)}


@pytest.fixture(scope="module")
def model():
    return random_model(VISION, TEXT, "cpu").eval()


def test_encoder_runs_only_where_pixels_are_given(model):
    encoder = CallCounter(model.model.vision_model)
    rows = first_token.measure(model, (4, 9), rounds=2)
    assert encoder.calls == 1 + (2 + 1) * 2  # once before, and from pixels: each count, each round
    assert [(row["vision_tokens"], row["way"]) for row in rows] == [
        (4, "from pixels"),
        (4, "images encoded before"),
        (9, "from pixels"),
        (9, "images encoded before"),
    ]
    for row in rows:
        assert 0 < row["best_s"] <= row["median_s"]
        assert row["prompt_tokens"] == row["vision_tokens"] + first_token.TEXT_TOKENS
        assert row["patches"] == 64


def test_command_writes_rows_with_their_machine_and_a_plot(monkeypatch, tmp_path):
    monkeypatch.setattr(first_token, "VISION", VISION)
    monkeypatch.setattr(first_token, "TEXT", TEXT)
    monkeypatch.setattr(first_token, "COUNTS", (1, 4))
    assert first_token.main(["--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    assert path.with_suffix(".png").stat().st_size > 1000
    rows = read_csv(path)
    assert len(rows) == 4
    assert {row["cpu"] for row in rows} == {str(environment("cpu")["cpu"])}


def test_committed_results_are_whole():
    """Each count both ways; the plot beside them was drawn from them."""
    for path in (RESULTS / "first-token").glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2 * len(first_token.COUNTS)
        assert path.with_suffix(".png").exists()
        assert all(0.4e9 < int(row["parameters"]) < 0.7e9 for row in rows)


def test_rounds_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        first_token.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
