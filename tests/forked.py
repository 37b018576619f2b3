"""Commands of ``tokenflex`` as processes that fork from one in which all is imported already.

Importing torch, transformers and scikit-learn takes a process seconds, which tests of signals,
locks and ports are not about. What a fresh interpreter does, as ``python -m tokenflex`` starts it,
is tested in ``tests/test_cli.py``, and by torchrun in ``tests/training``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *(
            "tokenflex.cli",
            "tokenflex.training.loop",
            "tokenflex.training.curves",
            "tokenflex.plots",
        ),
        *("tokenflex.digits.dataset", "tokenflex.models.loading", "tokenflex.evaluation.report"),
        *("tokenflex.serving.server.app", "tokenflex.serving.server.served"),
        "tests.models.tiny",  # transformers imports the classes of a model when they are asked for
    ]
)


class Command:
    """A running command, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        arguments: Of ``tokenflex``.
        folder: Its working folder.
        environment: Variables to set.
        before: A function that it calls first, of a module that can be imported.
    """

    def __init__(
        self,
        *arguments: object,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.stdout, self.stderr = files = [
            tempfile.NamedTemporaryFile("r+")  # noqa: SIM115  # removed together with this object
            for _ in range(2)
        ]
        paths = [file.name for file in files]
        self._process = _CONTEXT.Process(
            target=_run,
            args=([*map(str, arguments)], str(folder), paths, dict(environment or {}), before),
        )
        search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with patch.dict(os.environ, PYTHONPATH=search):  # the server may start, in any folder
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("tokenflex", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what it wrote to stdout and to stderr."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def first_line(self, timeout: float) -> str:
        """Return the first line on stdout, or what there is of it when the process ends."""
        deadline = time.monotonic() + timeout
        while True:
            has_ended = self.poll() is not None or time.monotonic() > deadline
            self.stdout.seek(0)
            line = self.stdout.readline()
            if line.endswith("\n") or has_ended:
                return line
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _run(
    arguments: list[str],
    folder: str,
    outputs: list[str],
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    """Run a command in a process group of its own, as systemd or a terminal starts it."""
    from tokenflex.cli import main

    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # workers start as in any process
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.update(environment)
    if before is not None:
        before()
    sys.exit(main(arguments))
