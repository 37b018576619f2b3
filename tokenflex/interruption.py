"""Stopping a run between two steps, where everything is whole."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO = 1.0  # seconds; a launcher passes on the signal that its whole group has just got


class Interruption:
    """Notes Ctrl-C, SIGTERM or SIGHUP in a ``with`` block, for the block to act on when it can.

    SIGHUP stays ignored where it is already, as ``nohup`` has it.

    A second signal is not noted but raises KeyboardInterrupt at once. One within a second of the
    first is the same signal: torchrun passes on to its processes what systemd, Slurm or a terminal
    has sent to them already.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there it is allowed
            has_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            noted = _SIGNALS[:-1] if has_nohup else _SIGNALS
            self._previous = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self._previous.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self._requested_at = time.monotonic()
        elif time.monotonic() - self._requested_at > ECHO:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.requested:
            raise KeyboardInterrupt
