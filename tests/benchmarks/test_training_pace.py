"""Training loops take turns, learn the same at their first step, and their paces are compared."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from benchmarks import training_pace
from benchmarks.results import RESULTS, ROOT, read_csv, replace_rows
from benchmarks.training_pace import (
    FIXED,
    LOSS_LIMIT,
    MIXED,
    PADDED,
    SCALES,
    TRL,
    WARM_UP,
    Turn,
    alternate,
    check_losses,
    format_table,
    interval,
    measure,
)


def test_loops_take_turns_a_step_each_and_end():
    happened = []

    def loop(name: str):
        def run(begin_step):
            for step in range(100):
                begin_step()
                happened.append((name, step))

        return run

    before = threading.active_count()
    turns = {name: Turn(loop(name)) for name in "ab"}
    for turn in turns.values():
        turn.step()
    assert happened == []
    seconds = list(alternate(turns, 3))
    assert happened == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert all(list(times) == ["a", "b"] and min(times.values()) >= 0 for times in seconds)
    for turn in turns.values():
        turn.finish()
    assert threading.active_count() == before


def test_an_error_of_a_loop_is_raised_where_its_turn_is():
    def broken(begin_step):
        begin_step()
        raise ValueError("no data")

    turn = Turn(broken)
    turn.step()
    with pytest.raises(ValueError, match="no data"):
        turn.step()


def test_first_losses_must_agree_at_the_same_counts():
    check_losses({MIXED: 2.0, FIXED: 3.0, PADDED: 2.0 * (1 + 0.9 * LOSS_LIMIT), TRL: 3.0})
    with pytest.raises(ValueError, match="'Trainer padded' must be that of our loop, 2, got 2"):
        check_losses({MIXED: 2.0, FIXED: 3.0, PADDED: 2.0 * (1 + 1.1 * LOSS_LIMIT)})
    with pytest.raises(ValueError, match="'TRL fixed'"):
        check_losses({MIXED: 2.0, FIXED: 3.0, TRL: 2.0})


def test_an_interval_holds_the_median_and_narrows_with_rounds():
    ratios = np.random.default_rng(1).normal(1.2, 0.1, 400)
    few, many = interval(ratios[:20]), interval(ratios)
    for median, low, high in (few, many):
        assert low <= median <= high
    assert many[2] - many[1] < few[2] - few[1]
    assert many[0] == pytest.approx(1.2, abs=0.02)


def row(**values: object) -> dict:
    names = ("model", "questions", "loop", "cpu_ms", "ratio", "low", "high", "arithmetic_saving")
    return dict.fromkeys(names, "") | values


def test_measured_rows_replace_those_of_the_same_model_and_questions(tmp_path):
    keys = ("model", "questions")
    replace_rows([row(model="tiny", questions=1, ratio=1.0)], tmp_path, keys)
    replace_rows([row(model="tiny", questions=8, ratio=2.0)], tmp_path, keys)
    published = replace_rows([row(model="tiny", questions=1, ratio=3.0)], tmp_path, keys)
    assert [line["ratio"] for line in published] == ["2.0", "3.0"]


def test_the_table_says_how_much_of_the_saving_becomes_time():
    fixed = row(model="tiny", loop=FIXED, ratio="1.25", arithmetic_saving="0.25")
    assert "20.0% of 25.0%: 80%" in format_table([fixed])


def test_the_documentation_has_the_published_rows():
    [path] = (RESULTS / "training-pace").glob("*.csv")
    assert format_table(read_csv(path)) in (ROOT / "benchmarks/README.md").read_text("utf-8")


@pytest.mark.slow
def test_all_loops_learn_the_same_and_mixed_counts_save_arithmetic(monkeypatch):
    monkeypatch.setattr(training_pace, "CANVASES", 8 * (WARM_UP + 3))
    rows = measure("tiny", SCALES["tiny"], 2, 1)  # the losses are compared in it
    assert [line["loop"] for line in rows][:2] == [MIXED, FIXED]
    assert rows[0]["ratio"] == 1
    assert 0 < rows[1]["arithmetic_saving"] < 0.2
    assert all(line["cpu_ms"] > 0 for line in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--out", "/dev/null"], "--out: expected a folder to write to, got '/dev/null'"),
    ],
)
def test_misuse_is_refused_before_anything_is_measured(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(training_pace, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        training_pace.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
