"""Threads that read pictures and texts, and do not keep a process alive.

Those of ``concurrent.futures`` are joined when the interpreter ends, and a decoder of pictures
cannot be stopped: the end of the server would wait for the slowest picture of a stranger.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any


class Readers(Executor):
    """A fixed number of daemon threads.

    Args:
        number: Number of threads.
    """

    def __init__(self, number: int) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._number = number
        for i in range(number):
            Thread(target=self._run, name=f"tokenflex-reader-{i}", daemon=True).start()

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function in one of the threads; a future that is cancelled before is skipped."""
        future: Future[Any] = Future()
        self._work.put((future, partial(call, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End each thread after its work, without waiting for it."""
        for _ in range(self._number):
            self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            future, call = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del work, future, call  # before the next wait: pictures are large
