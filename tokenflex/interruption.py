"""Interruption of a run between two steps, when its state is consistent."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO = 1.0  # seconds; a launcher passes on a signal that its whole group has just received
_LAUNCHER = "TORCHELASTIC_RUN_ID"  # torchrun sets it for its processes


class Interruption:
    """Note Ctrl-C, SIGTERM or SIGHUP during a ``with`` block, which acts on it when it can.

    SIGHUP stays ignored if it already is, as under ``nohup``.

    A second signal raises KeyboardInterrupt at once. A signal within a second of the first counts
    as the same: a launcher passes on to its processes what systemd, Slurm or a terminal has already
    sent to them. torchrun is known to do so, and may be late on a busy machine: the first
    repetition counts as the same at any time in a process that it has started.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._expects_repetition = _LAUNCHER in os.environ
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python allows it only there
            is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            noted = _SIGNALS[:-1] if is_ignored else _SIGNALS
            self._previous = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self._requested_at = time.monotonic()
        elif self._expects_repetition:
            self._expects_repetition = False
            self._requested_at = time.monotonic()
        elif time.monotonic() - self._requested_at > ECHO:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal was noted."""
        if self.requested:
            raise KeyboardInterrupt
