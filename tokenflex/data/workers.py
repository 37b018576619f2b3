"""Loader workers that end with the process they read for, never before it and never after it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from tokenflex.errors import ReportedError

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerDiedError(ReportedError):
    """A process that reads data has ended: killed, out of memory, or by a fault of its own."""


def start_worker(worker: int) -> None:
    """Prepare a loader worker: the main process alone decides when it ends.

    A signal to a whole process group (Ctrl-C, systemd, Slurm) reaches workers as well, but the main
    process still needs them for the step that it is in. When the main process ends without a word,
    its workers end too.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def iterate(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """Iterate over a loader whose workers were prepared by :func:`start_worker`.

    The death of a worker is told where data is waited for. PyTorch raises it between any two
    instructions, also in the middle of an optimiser step.

    Raises:
        WorkerDiedError: A worker has ended.
    """
    if not loader.num_workers:
        yield from loader
        return
    before = set(multiprocessing.active_children())
    with _deaths:
        with _blocked_signals():
            batches = iter(loader)
        workers = set(multiprocessing.active_children()) - before
        _living.add(workers)
        try:
            while True:
                try:
                    batch = _deaths.next_of(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise WorkerDiedError(
                        f"a data-loader worker ended: {reason}; with a lack of memory, fewer "
                        "workers or smaller steps help"
                    ) from error
                yield batch
        finally:
            _living.end(workers)
            del batches


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Keep signals from workers until they ignore them; this process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Living:
    """Workers that this process must end, at the latest when it ends itself.

    Python would ask them to with a signal, which they ignore, and wait.
    """

    def __init__(self) -> None:
        self._workers: set[Any] = set()
        self._process = 0

    def add(self, workers: set[Any]) -> None:
        if self._process != os.getpid():  # also in a fork, whose workers these are not
            self._process, self._workers = os.getpid(), set()
            atexit.register(self._end_all)
        self._workers |= workers

    def end(self, workers: set[Any]) -> None:
        """Kill workers: they only read. Asked to end, each would finish its step first."""
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()  # a worker that has been waited for is no death to be told
        self._workers -= workers

    def _end_all(self) -> None:
        if self._process == os.getpid():
            self.end({*self._workers})


_living = _Living()


class _Deaths:
    """PyTorch's handler of SIGCHLD, which raises, held back until data is waited for."""

    def __init__(self) -> None:
        self._depth = 0
        self._waiting = False
        self._noted = False
        self._handler: Any = None

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            if self._handler is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
                signal.signal(signal.SIGCHLD, self._handler)
            self._handler = None
            self._noted = False

    def next_of(self, batches: Iterator[T]) -> T:
        """Return the next item; raise for a worker that has died meanwhile or since the last."""
        self._hold_back()
        self._waiting = True
        try:
            if self._noted:
                self._noted = False
                self._handler(signal.SIGCHLD, None)
            return next(batches)
        finally:
            self._waiting = False

    def _hold_back(self) -> None:
        """Take the place of the handler, which a loader sets when it starts its workers."""
        if self._handler is not None or threading.current_thread() != threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler):
            self._handler = handler
            signal.signal(signal.SIGCHLD, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._waiting:
            self._handler(number, frame)
        else:
            self._noted = True


_deaths = _Deaths()
