"""Errors whose message tells a user what to mend."""

from __future__ import annotations

REASON_LENGTH = 500
"""Characters of an error's reason, at most, in a message that may name several."""


class ReportedError(RuntimeError):
    """A failure with a cause outside the program: data, a disk, another process, too little memory.

    The command line prints its message as one line. Other RuntimeErrors are faults of the program
    and keep their traceback.
    """
