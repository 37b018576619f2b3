"""Process of one job: ``tokenflex train``, which ends together with its parent."""

from __future__ import annotations

import os
import signal
import sys
import threading

from tokenflex.cli import main


def _end_with_parent() -> None:
    """Save the state and stop, as on SIGTERM, when the input is closed."""
    os.read(sys.stdin.fileno(), 1)  # returns when the input is closed: nothing is written
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(["train", sys.argv[1]]))
