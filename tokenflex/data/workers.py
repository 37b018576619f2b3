"""Worker processes that read data ahead. They end with the process that they read for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch

from tokenflex.errors import ReportedError

K = TypeVar("K")
T = TypeVar("T")

AHEAD = 4  # items that each worker has at hand
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_function: Callable[[Any], Any]  # in a worker, what it calls


class WorkerDiedError(ReportedError):
    """A process that reads data has ended: killed, out of memory, or by a fault of its own."""


def map_in_order(
    function: Callable[[K], T], items: Iterable[K], *, workers: int = 0
) -> Generator[T, None, None]:
    """Yield ``function(item)`` for each item, computed ahead in ``workers`` processes.

    Close the generator to end the workers early.

    Args:
        function: The function. It is sent to each worker once.
        items: The items, which are taken ahead of the values that are yielded.
        workers: Processes; 0 calls the function here.

    Raises:
        ValueError: ``workers`` is negative.
        WorkerDiedError: A worker has ended.
        Exception: Whatever ``function`` raised.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if not workers:
        yield from map(function, items)
        return
    items = iter(items)
    before = {*multiprocessing.active_children()}
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(function,))
    processes: Collection[Any] = ()
    try:
        with _blocked_signals():
            pending = deque(pool.submit(_call, item) for item in islice(items, AHEAD * workers))
        processes = {*multiprocessing.active_children()} - before
        while pending:
            try:
                value: T = pending.popleft().result()
                following: list[Future[T]] = [pool.submit(_call, item) for item in islice(items, 1)]
            except BrokenProcessPool as error:
                raise WorkerDiedError(
                    f"a data-loader worker ended: {_death_of(processes) or error}; with a lack of "
                    "memory, fewer workers or smaller steps help"
                ) from error
            pending += following
            yield value
    finally:
        for process in processes:
            process.kill()  # workers only read; asked to end, each would finish its item first
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Prepare a worker, which ignores signals: the main process alone decides when it ends.

    A signal to a whole process group (Ctrl-C, systemd, Slurm) reaches workers as well, but the main
    process still needs them for its current step. A worker also ends with a main process that was
    killed.
    """
    global _function
    _function = function
    torch.set_num_threads(1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Keep signals from workers until they ignore them; this process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death_of(processes: Collection[Any]) -> str | None:
    """Describe how the first of some processes has ended; None if none has after a second.

    The pool's own thread may be collecting the exit code at this moment, so the first look can
    find none.
    """
    deadline = time.monotonic() + 1
    while True:
        for process in processes:
            code = process.exitcode
            if code is not None:
                end = f"exited with code {code}" if code >= 0 else signal.strsignal(-code)
                return f"process {process.pid}: {end}"
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
