"""The runner: order, failures, interruption; with processes that do next to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.ablation import runner
from experiments.ablation.jobs import Job
from experiments.ablation.runner import JobFailedError, run_jobs, steps_done

# Say when they ran, and leave what training runs leave; "stop" in a name: waits to be stopped.
JOBS = """
import os, sys, time

def write(line):
    with open("journal", "a") as journal:
        journal.write(f"{line}\\n")

write(f"process of {' '.join(sys.argv[1:])}")
for name in sys.argv[1:]:
    write(f"{name} begins")
    if "fail" in name:
        print("warming up")
        sys.exit("tokenflex: no such file")
    if "stop" in name:
        os.read(0, 1)
        write(f"{name} saves")
        sys.exit(2)
    time.sleep(0.1)
    with open(f"{name}/report.json", "w") as report:
        report.write("{}")
    write(f"{name} ends")
"""


@pytest.fixture(autouse=True)
def _short_jobs(monkeypatch):
    monkeypatch.setattr(
        runner,
        "command_of",
        lambda jobs: [sys.executable, "-c", JOBS, *(job.name for job in jobs)],
    )
    monkeypatch.setattr(runner, "LOOK_EVERY", 0.01)


def job(name: str, needs: str | None = None) -> Job:
    return Job(name, name, 0, {"output": name}, 10, needs)


def run(jobs: list[Job], output: Path, at_once: int = 1) -> list[str]:
    run_jobs(jobs, output, at_once=at_once, on_gpu=False, show_bar=False)
    return journal(output)


def journal(output: Path) -> list[str]:
    return (output / "journal").read_text().splitlines()


def test_a_job_waits_for_the_one_it_needs(tmp_path):
    lines = run([job("b", needs="a"), job("a"), job("c")], tmp_path, at_once=3)
    assert lines.index("a ends") < lines.index("b begins")
    assert sorted(line for line in lines if line.endswith("ends")) == ["a ends", "b ends", "c ends"]


def test_so_many_run_at_once(tmp_path):
    lines = run([job(name) for name in "abcdef"], tmp_path, at_once=2)
    running = most = 0
    for line in lines:
        running += line.endswith("begins") - line.endswith("ends")
        most = max(most, running)
    assert most == 2


def test_one_at_a_time_run_in_turn_in_a_process(tmp_path, monkeypatch):
    """Each after the one that it needs; no process has more than so many."""
    monkeypatch.setattr(runner, "JOBS_A_PROCESS", 3)
    jobs = [job("b", needs="a"), job("a"), job("c"), job("d", needs="a"), job("e")]
    lines = run(jobs, tmp_path)
    assert [line for line in lines if line.startswith("process")] == [
        "process of a c d",
        "process of b e",
    ]


def test_the_job_that_failed_is_named_among_those_of_its_process(tmp_path):
    with pytest.raises(JobFailedError, match=r"job fail ended with exit status 1.*fail.train\.log"):
        run([job("a"), job("fail"), job("later")], tmp_path)
    assert journal(tmp_path)[-2:] == ["a ends", "fail begins"]


def test_what_is_done_is_not_done_again(tmp_path):
    run([job("a")], tmp_path)
    lines = run([job("a"), job("b")], tmp_path)
    assert lines.count("a begins") == 1
    assert lines[-1] == "b ends"


def test_a_failed_job_is_named_with_its_last_words_and_stops_the_others(tmp_path):
    jobs = [job("stop"), job("fail"), job("later")]
    with pytest.raises(
        JobFailedError, match=r"(?s)job fail ended with exit status 1.*no such file"
    ):
        run(jobs, tmp_path, at_once=2)
    assert "stop saves" in journal(tmp_path)
    assert "later begins" not in journal(tmp_path)


def test_a_signal_stops_the_jobs_and_waits_for_their_states(tmp_path):
    def interrupt() -> None:
        while not (tmp_path / "journal").exists() or len(journal(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run([job("stop-1"), job("stop-2"), job("later")], tmp_path, at_once=2)
    thread.join()
    assert {"stop-1 saves", "stop-2 saves"} <= {*journal(tmp_path)}
    assert "later begins" not in journal(tmp_path)


def test_one_ablation_at_a_time(tmp_path, monkeypatch):
    """Another process holds the folder, as jobs of a killed ablation do until they have ended."""
    monkeypatch.setattr(runner, "LOCK_PATIENCE", 0.3)
    held = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held, tmp_path / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another ablation"):
            run([job("a")], tmp_path)
        other.communicate()
    assert run([job("a")], tmp_path)[-1] == "a ends"


def test_steps_are_read_from_what_a_run_logs(tmp_path):
    assert steps_done(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"stage": 0, "step": 10}\n{"stage": 0, "step": 20}\n')
    assert steps_done(tmp_path) == 20
