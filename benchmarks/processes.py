"""A suite in a process of its own, watched: a hang or a crash costs rows, not the run.

The process sends the row that it is about to measure, and each row when it is measured. If it stays
silent for too long, or ends, that row gets the reason; another process continues with the rest of
the suite, without the variant that was to blame.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from benchmarks.harness import Deadline, Run, reason
from benchmarks.results import NewRow, new_row

Suite = Callable[[Run], None]
CONTEXT = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
START_SECONDS = 60.0  # to import PyTorch on a busy machine
ROW_SECONDS = 120.0  # compiling one shape takes a minute
GRACE_SECONDS = 10.0  # a call that has begun may run so long after its suite's time
LATE = "not run: no time left, stopped while it ran"


def watched_rows(
    name: str,
    suite: Suite,
    device: str,
    quick: bool,
    seconds: float,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    done: Collection[tuple[str, str, str]] = (),
    for_targets: bool = False,
) -> Iterator[list[NewRow]]:
    """Yield a suite's rows as they come, until it has ended or its time is over.

    Args:
        name: Name of the suite, for rows about the suite itself.
        suite: Measures and emits rows; it runs in another process.
        device, quick, dtype, threads, for_targets: As in :class:`Run`.
        seconds: Time for the suite. It aims at less, since importing takes a while too. A silence
            of three quarters of it counts as a hang, so that others get some time as well.
        done: (op, case, mode) of what was measured before.
    """
    deadline = Deadline(seconds)
    run = Run(device, quick, deadline, emit=print, dtype=dtype, threads=threads)
    run.done, run.for_targets = set(done), for_targets
    row_seconds = min(ROW_SECONDS, 0.75 * seconds)
    while True:
        current = new_row(op=f"{name} suite")
        why = yield from _one_process(suite, run, row_seconds, current)
        if not why:
            return
        current["status"] = why
        variant, key = current["variant"], (current["op"], current["case"], current["mode"])
        if run.deadline.left < 1:
            late = new_row(op=f"{name} suite", status=f"stopped after {seconds:.0f} s")
            yield [current, late]
            return
        if variant and variant not in run.banned:
            run.banned[variant] = current  # the next process writes its rows
        else:
            yield [current]
            if not current["case"] or key in run.done:
                return  # nothing to leave out is known
            run.done.add(key)


def _one_process(
    suite: Suite, run: Run, row_seconds: float, current: NewRow
) -> Generator[list[NewRow], None, str]:
    """Yield rows, keep ``current`` up to date, and return why the process failed, or ""."""
    nothing = dict(current)
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(sender, suite, run))
    process.start()
    sender.close()
    patience = START_SECONDS
    try:
        while True:
            left = max(0.0, run.deadline.left) + GRACE_SECONDS
            if not receiver.poll(min(patience, left)):
                return f"failed: hung for {patience:.0f} s" if patience < left else LATE
            kind, value = receiver.recv()
            patience = row_seconds
            if kind == "end":
                return value
            if kind == "begin":
                current |= value
            else:
                current |= nothing
                run.done |= {(row["op"], row["case"], row["mode"]) for row in value}
                yield value
    except (EOFError, OSError):  # the latter in the middle of a message
        process.join()
        return f"failed: the process ended with {process.exitcode}"
    finally:
        if process.pid:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # compilers that it started too
        process.kill()
        process.join()


def _work(connection: Connection, suite: Suite, run: Run) -> None:
    """Run the suite in this process, which becomes the first of a process group."""
    os.setsid()
    if run.threads:
        torch.set_num_threads(run.threads)
    run.deadline = Deadline(0.8 * run.deadline.left)
    run.emit = lambda rows: connection.send(("rows", rows))
    run.begin = lambda row: connection.send(("begin", row))
    try:
        suite(run)
    except BaseException as error:
        connection.send(("end", reason(error)))
        raise
    connection.send(("end", ""))
