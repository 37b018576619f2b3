"""One job's process: ``tokenflex train`` that ends when the process that started it does."""

from __future__ import annotations

import os
import signal
import sys
import threading

from tokenflex.cli import main


def _end_with_parent() -> None:
    """Stop as SIGTERM does, state saved, once nobody holds the other end of our input."""
    os.read(sys.stdin.fileno(), 1)  # returns at the end: nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(["train", sys.argv[1]]))
