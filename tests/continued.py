"""A pytest plugin for time that comes in slices: ``pytest -p tests.continued``, as in ``make gpu``.

The tests that tell most run first: one small case of every kernel and dtype (of the tests marked
``first``), then the real sizes, then the first case of every other test and dtype, then the rest.

``--results FILE.csv`` gets a row as soon as a test has ended. Another call with that file, at the
same commit and on the same GPU, leaves out the tests in it, whether they passed or failed. A test
that ends all use of the GPU costs itself alone: pytest starts again without it. ``--seconds N``
begins no further test after N seconds. The exit status is 1 if a test in the file failed, 75 if
none did and some are left, and otherwise 0.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.first_minutes import ROOT, commit_of
from tokenflex_kernels.journal import LOST, UNFINISHED, Journal, device_is_lost

COLUMNS = ("test", "status", "seconds")
REAL_SIZES = "test_kernels_on_gpu.py"
FAILED = "failed"  # how the status of a test that did begins

Kind = tuple[str, tuple[str, ...]]


def kind_of(item: pytest.Item) -> Kind:
    """Return the test function of a case, and its dtypes."""
    call = getattr(item, "callspec", None)
    values = [] if call is None else call.params.values()
    dtypes = [str(value) for value in values if isinstance(value, torch.dtype)]
    return item.nodeid.partition("[")[0], tuple(dtypes)


def ordered(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests, those that tell most first; otherwise in their order."""
    seen: set[Kind] = set()
    ranked: list[tuple[int, pytest.Item]] = []
    for item in items:
        kind = kind_of(item)
        is_new = kind not in seen
        seen.add(kind)
        if is_new and item.get_closest_marker("first") is not None:
            rank = 0
        elif item.path.name == REAL_SIZES:
            rank = 1
        else:
            rank = 2 if is_new else 3
        ranked.append((rank, item))
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])]


class Slice:
    """One session of tests, which continues those before it.

    Args:
        journal: of the tests that have ended.
        end: the ``time.monotonic()`` after which no further test begins.
    """

    def __init__(self, journal: Journal, end: float) -> None:
        self._journal, self._end = journal, end
        self._left: set[str] = set()
        self._status, self._seconds = "", 0.0
        if journal.lost:
            journal.add(journal.lost, f"{FAILED}: {LOST}", "")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        done = {row["test"] for row in self._journal.rows}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in ordered(items) if item.nodeid not in done]
        self._left = {item.nodeid for item in items}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._status, self._seconds = "passed", 0.0
        with self._journal.measuring(item.nodeid):
            result = yield
        self._left.discard(item.nodeid)
        self._journal.add(item.nodeid, self._status, f"{self._seconds:.2f}")
        if self._status.startswith(FAILED) and torch.cuda.is_available() and device_is_lost():
            print("\na test ended the use of the GPU: starting again without it", flush=True)
            left = ("--seconds", f"{max(1.0, self._end - time.monotonic())}")
            os.execv(sys.executable, [*sys.orig_argv, *left])  # the last one counts
        if self._left and time.monotonic() > self._end:
            item.session.shouldstop = "time ended: run it again for the rest"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._status = f"{FAILED}: {getattr(crash, 'message', report.longreprtext)}"[:300]
        elif report.skipped:
            self._status = "skipped"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
        if exitstatus not in (*ended, pytest.ExitCode.NO_TESTS_COLLECTED):
            return
        if any(row["status"].startswith(FAILED) for row in self._journal.rows):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif session.testsfailed:  # to be collected
            return
        elif self._left:
            session.exitstatus = UNFINISHED
        elif self._journal.rows:
            session.exitstatus = pytest.ExitCode.OK


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("continued", "tests in slices of time")
    group.addoption("--results", type=Path, default=None, help="CSV of the tests that have ended")
    group.addoption("--seconds", type=float, default=math.inf, help="default: no limit")


def pytest_configure(config: pytest.Config) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    setting = f"{gpu}, {commit_of(ROOT)}"
    journal = Journal(config.getoption("results"), COLUMNS, setting)
    end = time.monotonic() + config.getoption("seconds")
    config.pluginmanager.register(Slice(journal, end), "slice-of-time")
