"""The extension lets other Python threads run while it works, as data-loader threads need."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from tokenflex_kernels.backend import extension

ROWS = 1_000_000
OFFSETS = np.array([0, ROWS], np.int64)
NOTHING = np.empty(0, np.int64)
IDS = np.zeros(ROWS, np.int64)
ZEROS, FILLED = (np.zeros(ROWS, np.int32) for _ in range(2))
ORDER = np.arange(ROWS)
LENGTHS = np.full(20_000, 7)
MANY, PARTIALS = (np.zeros((ROWS, 4), np.float32) for _ in range(2))
ONE = np.zeros((1, 4), np.float32)


def at(array: np.ndarray) -> int:
    return array.ctypes.data


# Each call takes a millisecond or more.
CALLS = {
    "plan": (IDS, OFFSETS, NOTHING, None, -1, False, None, -100),
    "merge_source": (at(NOTHING), True, 0, at(FILLED), ROWS),
    "bin_pack": (LENGTHS, 100),
    "balance_bins": (LENGTHS, LENGTHS, 100, 100, 1, 1, 1, 1, False),
    "pack_rows": (at(ONE), 16, at(ONE), 16, at(MANY), 16, at(ZEROS), ROWS, 16, 1, 0, False, 1),
    "sum_rows": (
        *(at(MANY), 16, at(ONE), 16, at(PARTIALS), 16, at(ZEROS), at(ORDER), ROWS, 4),
        *("float32", 1, 1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_thread_runs_during_a_call(name):
    """With switches of threads put off for longer than the test takes, another thread can only run
    where this one gives up the interpreter, and between two calls nothing here does. On a busy
    machine it may miss the first calls, and so there are more."""
    call = getattr(extension(), name)
    arguments = CALLS[name]
    start = threading.Lock()
    start.acquire()
    ran = []

    def run():
        with start:
            ran.append(True)

    before = sys.getswitchinterval()
    other = threading.Thread(target=run)
    other.start()
    sys.setswitchinterval(1000)
    try:
        deadline = time.monotonic() + 5
        start.release()
        while not ran and time.monotonic() < deadline:
            call(*arguments)
    finally:
        found = bool(ran)
        sys.setswitchinterval(before)
        other.join()
    assert found
