"""Stopping a run between two steps, where everything is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Notes Ctrl-C (or SIGTERM) inside a ``with`` block, for the block to act on when it can.

    A second signal is not noted but raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there it is allowed
            self._previous = {one: signal.signal(one, self._note) for one in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self._previous.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.requested:
            raise KeyboardInterrupt


def ignore_interrupts(worker: int) -> None:
    """For data-loader workers: Ctrl-C reaches them too, but the main process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
