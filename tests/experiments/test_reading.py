"""The study of reading: its page is written from the report, guessing is measured beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from experiments.reading.__main__ import COUNTS, guessing, main, measure, page_of, training_of
from tests.reading.test_training import tiny_values
from tokenflex.reading.drawing import PLACEMENTS
from tokenflex.training.build import build_model, build_processor
from tokenflex.training.config import TrainConfig

RESULTS = Path(__file__).parents[2] / "docs/results/reading"


def test_the_page_is_that_of_the_report():
    report = json.loads((RESULTS / "report.json").read_text(encoding="utf-8"))
    assert page_of(report) == (RESULTS / "README.md").read_text(encoding="utf-8")


def test_guessing_is_the_share_of_the_most_frequent_answer():
    guesses = guessing(300)
    assert 0.4 < guesses["present"] < 0.6
    assert 0.4 < guesses["pair page"] < 0.6
    assert 0.05 < guesses["value"] < 0.25
    assert guesses["word"] < 0.2


def test_every_kind_is_measured_at_every_count_and_tall_pages_as_one_tile(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_COMMIT", "0a1b2c3")
    monkeypatch.setattr("experiments.reading.__main__.GUESSES", 200)
    config = TrainConfig.model_validate(tiny_values(tmp_path))
    torch.manual_seed(0)
    processor = build_processor(config.model)
    report = measure(build_model(config.model, processor).eval(), processor, 40)
    labels = [n if isinstance(n, int) else f"{n[0]}x{n[1]}" for n in COUNTS]
    assert [*report["accuracy"]] == [*map(str, labels)]
    assert set(report["guessing"]) == set(report["accuracy_by_kind"])
    assert {kind.split()[0] for kind in report["tall_by_tiles"]["1"]} == {"tall"}
    for placement in PLACEMENTS:
        assert {*report["figures_by_placement"][placement]} == {"cell", "rows", "value", "highest"}
    page = page_of(report)
    assert all(f"\n| cell | {placement} | " in page for placement in PLACEMENTS)
    for kind in report["questions"]:
        assert f"\n| {kind} | " in page
    assert "commit `0a1b2c3`" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such/run", "out"), "no/such/run"),
        (("run", "out", "--samples", "0"), "samples"),
        (("run", "out", "--samples", "-5"), "samples"),
        (("run", "file"), "file"),
    ],
)
def test_bad_arguments_are_refused_before_the_work(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["reading", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_report_says_how_its_model_was_trained(tmp_path):
    with pytest.raises(FileNotFoundError):
        training_of(tmp_path, "")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"seed": 7, "encoder_warm_up": {"steps": 5}, "stages": [{"name": "a", "steps": 4}]}
        )
    )
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="must be the folder of a finished run"):
        training_of(tmp_path, "")
    (tmp_path / "report.json").write_text('{"seconds": 61.2}')
    training = training_of(tmp_path, "shared")
    assert training["steps"] == {"a": 4}
    assert (training["seconds"], training["note"]) == (61.2, ", shared")
