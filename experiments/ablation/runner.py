"""Runs jobs as processes of their own, several at once; what is done stays done."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from experiments.ablation.jobs import CONFIG, REPORT, Job
from tokenflex.errors import ReportedError
from tokenflex.files import parse_json
from tokenflex.interruption import Interruption

LOG = "train.log"
LOCK = ".lock"
PACKAGE_ROOT = Path(__file__).parents[2]
LOOK_EVERY = 0.2  # seconds
LOCK_PATIENCE = 30.0  # seconds: jobs of a killed ablation save their states and end
LAST_LINES = 15


class JobFailedError(ReportedError):
    """A job ended without a report; the message names it and ends with its last words."""


class _Running:
    """A job's process. Its input is a pipe that closes when we end: the job then ends as well."""

    def __init__(self, job: Job, output: Path, lock: int, *, on_gpu: bool) -> None:
        self.job = job
        self.log = output / job.name / LOG
        paths = [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TQDM_DISABLE": "1",
            **({} if on_gpu else {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}),
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command_of(job),
                cwd=output,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us, and we tell the jobs
                pass_fds=(lock,),
            )

    def stop(self) -> None:
        """Ask it to save its state and end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def last_words(self) -> str:
        """The end of what it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


def command_of(job: Job) -> list[str]:
    """What its process runs, in the ablation's folder."""
    return [sys.executable, "-m", "experiments.ablation.worker", f"{job.name}/{CONFIG}"]


def run_jobs(
    jobs: Sequence[Job], output: Path, *, at_once: int, on_gpu: bool, show_bar: bool = True
) -> None:
    """Run every job that is not done, each after the one that it needs, ``at_once`` at a time.

    Killed at any moment, the same call goes on: jobs that are done stay, those that were running
    resume from their own states.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM came; every running job has saved its state.
        JobFailedError: one failed; the others have stopped, their states saved.
        ValueError: the folder holds another ablation, or one is at work in it.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / LOCK).exists():
        raise ValueError(
            f"output {output} holds files of something else and no ablation; give an empty folder, "
            "or one that does not exist"
        )
    output.mkdir(parents=True, exist_ok=True)
    with _alone_in(output) as lock:
        for job in jobs:
            job.write_config(output)
        waiting = [job for job in jobs if not job.is_done(output)]
        running: list[_Running] = []
        with _bar(jobs, show_bar) as bar, Interruption() as interruption:
            try:
                while waiting or running:
                    interruption.check()
                    for job in _ready(waiting, output, at_once - len(running)):
                        waiting.remove(job)
                        running.append(_Running(job, output, lock, on_gpu=on_gpu))
                    _show(bar, jobs, running, output)
                    time.sleep(LOOK_EVERY)
                    running = [one for one in running if not _has_ended(one, output)]
                _show(bar, jobs, running, output)
            finally:
                _stop_all(running)


def _ready(waiting: Sequence[Job], output: Path, free: int) -> list[Job]:
    """The next jobs whose start is there."""
    ready = [job for job in waiting if job.needs is None or (output / job.needs / REPORT).is_file()]
    return ready[: max(free, 0)]


def _has_ended(one: _Running, output: Path) -> bool:
    code = one.process.poll()
    if code is None:
        return False
    one.stop()
    if not one.job.is_done(output):
        raise JobFailedError(
            f"job {one.job.name} ended with exit status {code} and without a report; the end of "
            f"{one.log}:\n{one.last_words()}"
        )
    return True


def _stop_all(running: Sequence[_Running]) -> None:
    for one in running:
        one.stop()
    for one in running:
        one.process.wait()


@contextmanager
def _alone_in(output: Path) -> Iterator[int]:
    """Hold the folder's lock. Jobs hold it too: those of a killed ablation are waited for."""
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


# ---------------------------------------------------------------------- progress


def _bar(jobs: Sequence[Job], shown: bool) -> tqdm:
    return tqdm(
        total=sum(job.steps for job in jobs),
        unit="step",
        desc="ablation",
        disable=not shown,
        dynamic_ncols=True,
        mininterval=1,
    )


def _show(bar: tqdm, jobs: Sequence[Job], running: Sequence[_Running], output: Path) -> None:
    """Steps of all jobs; steps of an earlier half of this ablation do not count for the rate."""
    done = [job for job in jobs if job.is_done(output)]
    at = {one.job.name: steps_done(output / one.job.name) for one in running if one.job not in done}
    steps = sum(job.steps for job in done) + sum(at.values())
    if not bar.n and steps:
        bar.initial = bar.n = steps
    bar.update(max(steps - bar.n, 0))
    names = ", ".join(f"{name} {step}" for name, step in at.items())
    bar.set_postfix_str(f"{len(done)} of {len(jobs)} runs done; {names}", refresh=False)


def steps_done(folder: Path) -> int:
    """The step that a run logged last."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 4096, 0))
            lines = file.read().splitlines()
        return int(parse_json(lines[-1], "line")["step"])
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return 0  # nothing yet, or a line that is being written
