"""Runs jobs as processes, several at once; jobs that are done are not repeated."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.ablation.jobs import CONFIG, LOG, REPORT, Job
from tokenflex.errors import ReportedError
from tokenflex.files import check_folder, parse_json
from tokenflex.interruption import Interruption
from tokenflex.terminal import progress_bar

LOCK = ".lock"
REPOSITORY = Path(__file__).parents[2]
LOOK_EVERY = 0.2
"""Seconds between two looks at the jobs."""
LOCK_PATIENCE = 30.0
"""Seconds that jobs of a killed ablation have to save their states."""
LAST_LINES = 15
JOBS_A_PROCESS = 8
"""Jobs that a process runs in turn if one runs at a time: its imports take as long as a short job.
"""


class JobFailedError(ReportedError):
    """A job ended without a report; the message holds its name and the end of its log."""


class _Running:
    """The process of jobs in turn. It ends when its input closes, and so when this process ends."""

    def __init__(self, jobs: Sequence[Job], output: Path, lock: int, *, on_gpu: bool) -> None:
        self.jobs = jobs
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TQDM_DISABLE": "1",
            **({} if on_gpu else {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}),
        }
        with _log_of(jobs[0], output).open("ab") as log:
            self.process = subprocess.Popen(
                command_of(jobs),
                cwd=output,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process, which stops the jobs
                pass_fds=(lock,),
            )

    def job(self, output: Path) -> Job | None:
        """Return the first job that is not done."""
        return next((job for job in self.jobs if not job.is_done(output)), None)

    def stop(self) -> None:
        """Ask the process to save its state and end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def has_ended(self, output: Path) -> bool:
        """Return whether the process has ended.

        Raises:
            JobFailedError: It ended without a report.
        """
        code = self.process.poll()
        if code is None:
            return False
        self.stop()
        failed = self.job(output)
        if failed is not None:
            log = _log_of(failed, output)
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            end = "\n".join(text.splitlines()[-LAST_LINES:])
            raise JobFailedError(
                f"job {failed.name} ended with exit status {code} and without a report; the end "
                f"of {log}:\n{end}"
            )
        return True


def command_of(jobs: Sequence[Job]) -> list[str]:
    """Return the command of the process of jobs, which runs in the ablation's folder.

    Each job's configuration is followed by the number of training canvases that it is asked about.
    """
    command = [sys.executable, "-m", "experiments.ablation.worker"]
    return [*command, *(f"{job.name}/{CONFIG}:{job.asked_again}" for job in jobs)]


def _log_of(job: Job, output: Path) -> Path:
    return output / job.name / LOG


def run_jobs(
    jobs: Sequence[Job], output: Path, *, at_once: int, on_gpu: bool, show_bar: bool = True
) -> None:
    """Run every job that is not done after the one that it needs, ``at_once`` at a time.

    The same call continues after a kill at any moment: done jobs stay, and running jobs resume from
    their states.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after every running job has saved its state.
        JobFailedError: A job failed; the others have stopped and saved their states.
        ValueError: The folder holds another ablation, or one is running in it, or it is a file.
    """
    check_folder(output)
    if output.is_dir() and any(output.iterdir()) and not (output / LOCK).exists():
        raise ValueError(
            f"output {output} holds files of something else and no ablation; give an empty folder, "
            "or one that does not exist"
        )
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output) as lock:
        for job in jobs:
            job.write_config(output)
        waiting = [job for job in jobs if not job.is_done(output)]
        running: list[_Running] = []
        bar = progress_bar("ablation", sum(job.steps for job in jobs), shown=show_bar)
        with bar, Interruption() as interruption:
            try:
                while waiting or running:
                    interruption.check()
                    for _ in range(at_once - len(running)):
                        turn = _next_jobs(waiting, output, JOBS_A_PROCESS if at_once == 1 else 1)
                        if turn:
                            waiting = [job for job in waiting if job not in turn]
                            running.append(_Running(turn, output, lock, on_gpu=on_gpu))
                    _show(bar, jobs, running, output)
                    time.sleep(LOOK_EVERY)
                    running = [process for process in running if not process.has_ended(output)]
                _show(bar, jobs, running, output)
            finally:
                for process in running:
                    process.stop()
                for process in running:
                    process.process.wait()


def _next_jobs(waiting: Sequence[Job], output: Path, number: int) -> list[Job]:
    """Return jobs that can run in turn, each after the one that it needs."""
    turn: list[Job] = []
    for job in waiting:
        needed = job.needs is None or (output / job.needs / REPORT).is_file()
        if needed or job.needs in {earlier.name for earlier in turn}:
            turn.append(job)
        if len(turn) == number:
            break
    return turn


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Hold the folder's lock. Jobs hold it too, so that those of a killed ablation end first."""
    with (output / LOCK).open("w") as lock:
        give_up = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > give_up:
                    raise ValueError(
                        f"output {output} is in use by another ablation that is running"
                    ) from None
                time.sleep(LOOK_EVERY)
        yield lock.fileno()


def _show(bar: Any, jobs: Sequence[Job], running: Sequence[_Running], output: Path) -> None:
    """Show the steps of all jobs; steps before a continuation do not count for the rate."""
    done = [job for job in jobs if job.is_done(output)]
    at_work = [process.job(output) for process in running]
    names = [job.name for job in at_work if job is not None]
    steps_of = {name: steps_done(output / name) for name in names}
    steps = sum(job.steps for job in done) + sum(steps_of.values())
    if not bar.n and steps:
        bar.initial = bar.n = steps
    bar.update(max(steps - bar.n, 0))
    shown = ", ".join(f"{name} {step}" for name, step in steps_of.items())
    bar.set_postfix_str(f"{len(done)} of {len(jobs)} runs done; {shown}", refresh=False)


def steps_done(folder: Path) -> int:
    """Return the last step that a run has logged."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 4096, 0))
            lines = file.read().splitlines()
        return int(parse_json(lines[-1], "line")["step"])
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return 0  # no line yet, or an incomplete one
