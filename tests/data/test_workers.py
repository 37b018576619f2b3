"""Loader workers: signals to a group do not end them, the end of their parent does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.training.processes import is_alive
from tests.training.runs import ROOT
from tokenflex.data.order import load_in_order
from tokenflex.data.workers import WorkerDiedError, _death_of

KEYS = [[(0, step)] for step in range(40)]
BUSY = """
import time, multiprocessing
from tokenflex.data.order import load_in_order
steps = load_in_order(lambda keys: time.sleep(60 * keys[0][1]), [[(0, 0)], [(0, 1)]], workers=1)
next(steps)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(60)
"""


def first(keys):
    return keys[0][1]


def test_signals_do_not_end_workers():
    steps = load_in_order(first, KEYS, workers=2)
    seen = [next(steps)]
    for worker in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    assert seen + list(steps) == list(range(40))


def test_a_death_is_told_where_data_is_waited_for():
    steps = load_in_order(first, KEYS, workers=1)
    next(steps)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # an optimiser step
        pass
    with pytest.raises(WorkerDiedError, match=r"a data-loader worker ended: process \d+: Killed"):
        list(steps)
    assert multiprocessing.active_children() == []


def fails_at_five(keys):
    if keys[0][1] == 5:
        raise KeyError("five", 5)
    return keys[0][1]


def test_an_error_of_a_worker_comes_in_order_and_ends_the_others():
    steps = load_in_order(fails_at_five, KEYS, workers=2)
    assert [next(steps) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError) as error:
        next(steps)
    assert error.value.args == ("five", 5)
    assert multiprocessing.active_children() == []


def test_a_loader_that_is_closed_leaves_no_worker():
    steps = load_in_order(first, KEYS, workers=2)
    next(steps)
    steps.close()
    assert multiprocessing.active_children() == []


def sleeps(keys):
    time.sleep(60 * keys[0][1])


def test_a_loader_that_is_closed_does_not_wait_for_a_busy_worker():
    began = time.monotonic()
    steps = load_in_order(sleeps, KEYS, workers=1)
    next(steps)
    steps.close()
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 30


def test_a_busy_worker_ends_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(worker)


def test_an_exit_code_that_is_collected_meanwhile_is_waited_for():
    class Process:
        pid, looks = 7, iter([None, None, -signal.SIGKILL])
        exitcode = property(lambda self: next(self.looks))

    assert _death_of([Process()]) == "process 7: Killed"
