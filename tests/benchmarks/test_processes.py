"""A suite's process is watched: whoever hangs or dies is a row, and the others go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks import peers, processes
from benchmarks.cases import MODES, Variant, run_cases
from benchmarks.harness import NO_TIME
from benchmarks.processes import watched_rows
from tests.benchmarks.small import product, square_case

FORWARD = ("forward",)


@pytest.fixture(autouse=True)
def _fork(monkeypatch):
    """Without importing PyTorch anew, there is nothing to wait for."""
    monkeypatch.setattr(processes, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(processes, "ROW_SECONDS", 1.0)


def rows_of(suite, seconds=30.0):
    start = time.monotonic()
    rows = [row for rows in watched_rows("some", suite, "cpu", True, seconds) for row in rows]
    assert time.monotonic() - start < 15
    return [(row["op"], row["case"], row["mode"], row["variant"], row["status"]) for row in rows]


def sleeps(leaves, _):
    time.sleep(60)


def raises(leaves, _):
    raise RuntimeError("no such kernel")


def is_killed(leaves, _):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_peer_that_sleeps_raises_or_is_killed_costs_its_rows_alone():
    def suite(run):
        variants = [Variant(call.__name__, call) for call in (product, sleeps, raises, is_killed)]
        for name in ("six", "again"):
            run_cases([square_case(*variants, name=name, modes=FORWARD)], run)

    hung, killed = "failed: hung for 1 s", "failed: the process ended with -9"
    wrong = "failed: RuntimeError: no such kernel"
    assert rows_of(suite) == [
        ("product", "six", "forward", "product", "ok"),
        ("product", "six", "forward", "sleeps", hung),
        ("product", "six", "forward", "raises", wrong),
        ("product", "six", "forward", "is_killed", killed),
        ("product", "again", "forward", "product", "ok"),
        ("product", "again", "forward", "sleeps", f"not run: {hung} (six, forward)"),
        ("product", "again", "forward", "raises", wrong),
        ("product", "again", "forward", "is_killed", f"not run: {killed} (six, forward)"),
    ]


def test_a_package_that_ends_the_process_when_it_is_imported_is_a_row(monkeypatch):
    load = {"right": lambda: Variant("right", product), "deadly": lambda: is_killed(None, None)}
    monkeypatch.setattr(peers, "PEERS", {"product": load})

    def suite(run):
        run_cases([square_case(*peers.load_peers("product", run), modes=FORWARD)], run)

    assert rows_of(suite) == [
        ("product", "", "", "deadly", "failed: the process ended with -9"),
        ("product", "six", "forward", "right", "ok"),
    ]


def test_a_hang_in_the_middle_of_sampling_is_reported_by_name():
    calls = []

    def hangs_late(leaves, _):
        calls.append(1)
        if len(calls) > 8:  # costs take two calls, warming up six
            time.sleep(60)
        return product(leaves)

    def suite(run):
        last = Variant("last", product)
        run_cases([square_case(Variant("late", hangs_late), last, modes=FORWARD)], run)

    assert [row[3:] for row in rows_of(suite)] == [("late", "failed: hung for 1 s"), ("last", "ok")]


def test_a_case_whose_inputs_kill_the_process_is_left_out_mode_by_mode():
    def suite(run):
        deadly = square_case(Variant("right", product), name="deadly", batch=is_killed_too)
        run_cases([deadly, square_case(Variant("right", product), modes=FORWARD)], run)

    def is_killed_too(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    killed = "failed: the process ended with -9"
    assert rows_of(suite) == [
        *(("product", "deadly", mode, "", killed) for mode in MODES),
        ("product", "six", "forward", "right", "ok"),
    ]


def test_an_error_of_the_suite_itself_is_a_row_after_those_that_it_had_measured():
    def suite(run):
        run_cases([square_case(Variant("right", product), modes=FORWARD)], run)
        raise ValueError("no more cases")

    (first,), (last,) = watched_rows("some", suite, "cpu", True, 30.0)
    assert (first["variant"], first["status"]) == ("right", "ok")
    assert (last["op"], last["status"]) == ("some suite", "failed: ValueError: no more cases")


def test_a_suite_that_does_not_end_in_its_time_is_stopped(monkeypatch):
    monkeypatch.setattr(processes, "ROW_SECONDS", 60.0)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)

    def suite(run):
        run_cases([square_case(Variant("sleeps", sleeps), modes=FORWARD)], run)

    assert rows_of(suite, seconds=1.0)[1:] == [("some suite", "", "", "", "stopped after 1 s")]


def test_compilers_that_a_process_started_end_with_it():
    started = multiprocessing.get_context("fork").Value("i", 0)

    def starts_another(leaves, _):
        started.value = os.fork()
        time.sleep(60)

    def suite(run):
        run_cases([square_case(Variant("compiles", starts_another), modes=FORWARD)], run)

    rows_of(suite)
    time.sleep(0.1)
    status = Path(f"/proc/{started.value}/status")
    assert not status.exists() or "zombie" in status.read_text(encoding="utf-8")


def test_an_interrupted_run_ends_its_process():
    def suite(run):
        run.emit([{"op": "first", "case": "", "mode": ""}])
        time.sleep(60)

    rows = watched_rows("some", suite, "cpu", True, 30.0)
    assert next(rows)[0]["op"] == "first"
    start = time.monotonic()
    rows.close()
    assert time.monotonic() - start < 5


def test_a_case_that_finds_no_time_left_says_so():
    def suite(run):
        time.sleep(1.0)
        run_cases([square_case(Variant("right", product), modes=FORWARD)], run)

    assert rows_of(suite, seconds=1.2) == [("product", "six", "forward", "", NO_TIME)]
