"""Seconds beside accuracies: measured for a tiny model, joined and written from made-up rows."""

from __future__ import annotations

import json
from functools import partial

import pytest

from benchmarks.results import read_csv
from experiments.ablation.suites import SPECIALISTS, SUITES
from experiments.speed import seconds
from experiments.speed.models import Taken, publish, take_turns
from experiments.speed.seconds import (
    ANSWER_TOKENS,
    BATCHES,
    OUT,
    QUESTION_TOKENS,
    Answers,
    build,
    measure_answers,
    measure_training,
)
from experiments.speed.seconds_page import MODEL, PLAIN, POSITIONED, Reports
from experiments.speed.seconds_page import format_page as format_seconds
from tests.experiments.ablation.tiny import TINY, canned_report
from tests.models.test_modeling import CallCounter
from tokenflex.evaluation.baselines import METHODS

NAMES = ("start", *SUITES["gap"])


@pytest.fixture
def reports(tmp_path) -> Reports:
    return Reports.read(*files(tmp_path), budget="")


def files(folder, names=NAMES):
    (folder / "gap.json").write_text(json.dumps(canned_report(names=names)))
    accuracy = {"4": 0.8, "9": 0.9, "16": 0.99}
    methods = {method: {"4": 0.6, "9": 0.7} for method in METHODS}
    baselines = {"accuracy": accuracy, "baselines": {"accuracy": methods}}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    return [folder / "gap.json"], [folder / "baselines.json"]


def made_up_rows() -> list[dict]:
    """10 ms and a millisecond a token for one question, 3 times as much for 16 of them."""
    rows = []
    for shape, ways in ((PLAIN, (MODEL, *METHODS)), (POSITIONED, (MODEL,))):
        for way in ways:
            for count in (4, 9, 16) if way == MODEL else (4, 9):
                for batch in BATCHES:
                    time = (10 + count) * (3 if batch > 1 else 1)
                    times = {"first_token": time, "answer": time + 2}
                    row = {"measured": "answer", "name": shape, "way": way, "batch": batch}
                    row |= {f"{name}_processor_ms": ms for name, ms in times.items()}
                    row |= {f"{name}_ms": 1.5 * ms for name, ms in times.items()}
                    rows.append({**row, "vision_tokens": count})
    for name in NAMES[1:]:
        ms = {"fixed-small": 40, "fixed-middle": 45, "fixed-large": 50}.get(name, 48)
        rows.append({"measured": "training", "name": name, "step_processor_ms": ms})
    return rows


@pytest.fixture
def rows(tmp_path):
    return publish(made_up_rows(), "cpu", tmp_path / "out")


def line_of(page: str, *cells: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(cells) :]


# ---- measuring


def test_calls_take_turns_after_a_round_that_is_not_counted():
    made = []
    taken = take_turns({name: partial(made.append, name) for name in "ab"}, rounds=2)
    assert made == ["a", "b"] * 3
    assert [len(turns) for turns in taken.values()] == [2, 2]
    assert all(turn.seconds > 0 for turn in taken["a"])


def test_an_answer_is_as_long_as_wanted_and_encodes_its_pictures_once():
    model, processor = build(TINY, {})
    answers = Answers(TINY, model, processor, batch=3)
    encoder = CallCounter(model.model.vision_model)
    calls = answers.calls(METHODS)
    assert len(calls) == 2 * (3 + 2 * len(METHODS))
    for (way, count, tokens), call in calls.items():
        before = encoder.calls
        shown = 16 if way == "enlarged" else count
        assert call().shape == (3, shown + QUESTION_TOKENS + tokens), (way, count)
        assert encoder.calls == before + 1, (way, count)


def test_resized_pictures_cost_fewer_patches():
    model, processor = build(TINY, {})
    answers = Answers(TINY, model, processor, batch=1)
    shapes = []
    model.model.vision_model.register_forward_pre_hook(
        lambda _, positional, named: shapes.append(named["pixel_values"].shape[-2:]),
        with_kwargs=True,
    )
    for call in answers.calls(("resized", "enlarged")).values():
        call()
    assert {(16, 16), (24, 24), (32, 32)} == {tuple(shape) for shape in shapes}


def test_every_shape_way_and_batch_has_its_row(monkeypatch):
    """The time to the first token is that of one token, an answer's that of all."""
    lengths = {}

    def take_turns(calls, rounds):
        taken = {}
        for key, call in calls.items():
            lengths[key[:-1]] = lengths.get(key[:-1], 0) + (call().shape[1] > 0)
            taken[key] = [Taken(key[-1] * rounds, key[-1] / 2)] * rounds
        return taken

    monkeypatch.setattr(seconds, "take_turns", take_turns)
    rows = measure_answers(TINY, rounds=1)
    assert {*lengths.values()} == {2}
    assert len(rows) == len(BATCHES) * (3 + 2 * len(METHODS) + 3)
    assert len({(row["name"], row["way"], row["vision_tokens"], row["batch"]) for row in rows}) == (
        len(rows)
    )
    for row in rows:
        assert (row["first_token_ms"], row["first_token_processor_ms"]) == (1000, 500)
        assert row["answer_ms"] == 1000 * ANSWER_TOKENS


def test_regimes_whose_steps_are_alike_are_measured_once():
    names = ("stochastic", "positions", "positions-longer", "positions-300-x1")
    rows = measure_training(TINY, names, rounds=1)
    times = {row["name"]: row["step_processor_ms"] for row in rows}
    assert {*times} == {*names}
    assert times["positions"] == times["positions-longer"] == times["positions-300-x1"] > 0
    assert times["positions"] != times["stochastic"]


# ---- the page


def test_times_stand_beside_accuracies(reports, rows):
    page = format_seconds(reports, rows, "seconds.png")
    # 10 + 4 ms, an answer 2 more; of 16 questions 3 times as long, divided by them.
    times = ["14.00", "16.00", "2.62", "2.75"]
    assert line_of(page, PLAIN, "4") == [*times, "81.0 ± 1.0", "86.0 ± 1.0"]
    assert line_of(page, "resized", "4") == [*times, "60.0"]
    assert line_of(page, MODEL, "16")[-1] == "99.0"
    assert "By the clock an answer took 1.50 times its processor's time" in page
    assert (
        f"{PLAIN}: at 16 tokens an answer takes, beside 4, 1.75 times as long (16.00 and 28.00 ms) "
        "1 at a time"
    ) in page


def test_seconds_of_training_are_those_of_its_steps(reports, rows):
    page = format_seconds(reports, rows, "seconds.png")
    assert line_of(page, "fixed 4")[-3:] == ["1,000", "40.0", "40"]
    assert "one model for all counts takes 48 s, 0.96 times the largest specialist's 50 s" in page
    assert "three specialists take 135 s and answer 93.3 %, each at its own" in page  # 40 + 45 + 50


def test_a_budget_of_limited_data_is_chosen(tmp_path, rows):
    of_files = files(tmp_path, ("start", *SUITES["limited"]))
    reports = Reports.read(*of_files, budget="1200-x4")
    assert {"stochastic", "positions", *SPECIALISTS} <= {*reports.regimes}
    assert "on the budget 1200-x4 of the suite `limited`" in format_seconds(reports, rows, "a.png")
    with pytest.raises(ValueError, match=r"budget must be one of .*1200-x4.*, got 7-x4"):
        Reports.read(*of_files, budget="7-x4")


def test_a_regime_that_was_not_measured_is_named(reports, rows):
    rest = [row for row in rows if row["name"] != "positions-longer"]
    with pytest.raises(ValueError, match="no training step of positions-longer: measure again"):
        format_seconds(reports, rest, "seconds.png")


def test_several_evaluations_are_averaged(tmp_path):
    ablations, (path,) = files(tmp_path)
    other = json.loads(path.read_text())
    other["baselines"]["accuracy"]["strided"]["4"] = 0.8
    (tmp_path / "other.json").write_text(json.dumps(other))
    reports = Reports.read(ablations, [path, tmp_path / "other.json"], "")
    assert reports.baselines["strided"]["4"]["mean"] == pytest.approx(0.7)


def test_a_report_of_something_else_is_named(tmp_path):
    ablations, (path,) = files(tmp_path)
    with pytest.raises(ValueError, match=r"gap\.json must have accuracy, baselines"):
        Reports.read(ablations, ablations, "")
    with pytest.raises(ValueError, match=r"baselines\.json must have regimes, counts, seeds"):
        Reports.read([path], [path], "")


def test_the_page_is_written_again_beside_other_reports(tmp_path, rows, capsys):
    out = tmp_path / "out"  # where the rows are
    (ablation,), (baselines,) = files(tmp_path)
    options = ["--page", "--out", str(out), "--reports", str(ablation)]
    assert seconds.main([*options, "--baselines", str(baselines)]) == 0
    (picture,) = out.glob("*.png")
    assert picture.stat().st_size > 10_000
    assert f"({picture.name})" in (out / "report.md").read_text()


def test_bad_options_are_named_before_anything_is_measured(tmp_path):
    with pytest.raises(SystemExit, match="--steps must be at least 1, got 0"):
        seconds.main(["--steps", "0"])
    with pytest.raises(SystemExit, match=r"seconds: .*missing\.json"):
        seconds.main(["--reports", str(tmp_path / "missing.json")])
    with pytest.raises(SystemExit, match=r"seconds: .*\.csv"):
        seconds.main(["--page", "--out", str(tmp_path)])


def test_the_committed_page_is_written_from_its_figures():
    (path,) = OUT.glob("*.csv")
    options = seconds._parser().parse_args([])
    reports = Reports.read(options.reports, options.baselines, options.budget)
    rows, page = read_csv(path), (OUT / "report.md").read_text(encoding="utf-8")
    assert page == format_seconds(reports, rows, path.with_suffix(".png").name)
    assert path.with_suffix(".png").exists()
