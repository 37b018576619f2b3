"""Training processes that tests start, watch and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.forked import Command
from tests.training.runs import ROOT

PATIENCE = 120  # seconds before a process counts as hanging


Process = Command | subprocess.Popen


def start(config: Path, *options: str, ranks: int = 1) -> Process:
    """`tokenflex train`, in a process group of its own; several ranks under torchrun."""
    if ranks == 1:
        return Command("train", config, *options, folder=config.parent)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *launcher, *("-m", "tokenflex.cli", "train", str(config), *options)],
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_two(config: Path) -> list[Command]:
    """Two ranks that train together without torchrun, which would end one when the other ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
    world |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    return [
        Command(
            *("train", config),
            folder=config.parent,
            environment={**world, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]


def steps_logged(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(process: Process, output: Path, steps: int) -> None:
    wait_for(process, lambda: steps_logged(output) >= steps)


def wait_for(process: Process, condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(process.communicate()[1])


def end_of(process: Process) -> tuple[int, str]:
    """(exit code, last line of what it said) once it has ended."""
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, (errors.strip().splitlines() or [""])[-1]


def children_of(process: int) -> list[int]:
    """The processes that ``process`` has started, loader workers among them, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            child = int(path.parent.name)
            found += [child, *children_of(child)]
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def last_step(output: Path) -> int:
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"]
