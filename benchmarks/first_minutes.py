"""``python -m benchmarks.first_minutes``: what a few minutes on a GPU are used for (``make gpu``).

Builds the extension with CUDA for this GPU, runs every kernel once, the GPU tests, the tuner, the
benchmarks, and a training step, in this order, each in a process of its own. A step gets a share
of the time that is left, and what it does not use goes to the next ones. A step that fails or runs
out of time does not stop the others. With less than ``FULL_SECONDS`` there is no tuning, and one
case for each target is measured.

Everything is written to ``--out`` as it comes. Another call with that folder continues: steps that
ended well at the same commit, on the same GPU, are left out, and the others keep what they have.
The exit status is 1 if a step failed or was stopped. A step that did what it could in its time is
"unfinished", which is no failure. Benchmarks and training run with the table that the tuner wrote.

This file imports nothing but the standard library, so that it runs before anything is built.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUMMARY, TABLE = "summary.csv", "launch_configs.json"
COLUMNS = ("step", "status", "seconds", "commit", "gpu")
OK, UNFINISHED, DONE_BEFORE = "ok", "unfinished", "done before"
UNFINISHED_STATUS = 75  # exit status of commands that a later call continues
FULL_SECONDS = 300.0
GRACE_SECONDS = 10.0  # between asking a step to end and killing it
LEAST_SECONDS = 5.0  # below which a step is not begun
SOURCES = ("csrc", "tokenflex_kernels", "tokenflex", "benchmarks", "experiments", "tests")
SUFFIXES = {".py", ".json", ".csv", ".cu", ".cpp", ".h", ".map"}

# Prints what this machine is, as one line of JSON.
PROBE = """
import json, torch
gpu = torch.cuda.is_available()
from tokenflex_kernels.backend import extension
built = extension()
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if gpu else "",
    "architecture": "%d%d" % torch.cuda.get_device_capability() if gpu else "",
    "built_for": list(built.cuda_architectures) if built and built.has_cuda else [],
}))
"""


@dataclass(frozen=True)
class Step:
    """A command with a share of the time.

    Attributes:
        name: In the summary, and of the log.
        command: Arguments of Python; ``{seconds}`` stands for the step's time.
        share: Of the time that is left.
        limit: The most seconds.
        margin: Seconds of its time that the command is not told of, to end by itself.
        tuned: Whether kernels are launched with the table that the tuner wrote.
    """

    name: str
    command: tuple[str, ...]
    share: float
    limit: float = math.inf
    margin: float = 0.0
    tuned: bool = False


# In the order of tests/continued.py. What needs more packages is left to `pytest -m gpu`.
TESTS = ("tests/kernels", "tests/benchmarks/test_on_gpu.py")


def steps(out: Path, budget: float) -> list[Step]:
    """Return the steps for a budget in seconds, in their order."""
    module = ("-m",)
    table = out / TABLE
    pip = ("pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", ".")
    smoke = ("tokenflex_kernels.smoke", "--csv", str(out / "smoke.csv"), "--seconds", "{seconds}")
    slices = ("tests.continued", "--results", str(out / "gpu-tests.csv"), "--seconds", "{seconds}")
    report = f"--junitxml={out / 'gpu-tests.xml'}"  # of the last call alone
    tests = ("pytest", "-v", "-p", *slices, report, *TESTS, "-m")
    tune = ("tokenflex_kernels.tune", "--table", str(table), "--csv", str(out / "tune.csv"))
    on_gpu = ("--device", "cuda", "--seconds", "{seconds}", "--out")
    benchmarks = ("benchmarks", *on_gpu, str(out), "--resume")
    training = ("experiments.speed.end_to_end", *on_gpu, str(out / "end-to-end"))
    first = [
        Step("build", module + pip, share=0.5, limit=150),
        Step("smoke", module + smoke, share=0.3, limit=60, margin=5),
    ]
    if budget < FULL_SECONDS:
        return [
            *first,
            Step(
                "quick-tests",
                (*module, *tests, "gpu and not slow"),
                share=0.4,
                limit=150,
                margin=15,
            ),
            Step("targets", (*module, *benchmarks, "--targets"), share=1.0, margin=12),
        ]
    return [
        *first,
        Step("tests", (*module, *tests, "gpu"), share=0.4, limit=150, margin=15),
        Step("tune", (*module, *tune, "--seconds", "{seconds}"), share=0.4, margin=10),
        Step("benchmarks", module + benchmarks, share=0.8, margin=12, tuned=True),
        Step("training", module + training, share=1.0, limit=75, margin=35, tuned=True),
    ]


def commit_of(root: Path) -> str:
    """Return the commit of the tree; of one that has changes or no history, with a digest."""
    commit = os.environ.get("TOKENFLEX_COMMIT", "")
    if not commit:
        command = ("git", "-C", str(root), "describe", "--always", "--dirty")
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            commit = done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = ""
    if commit and not commit.endswith("-dirty"):
        return commit
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{commit or 'tree'}-{digest.hexdigest()[:12]}"


def source_files(root: Path) -> Iterator[Path]:
    """Yield the files that results depend on, in a fixed order."""
    yield from (path for path in (root / "setup.py", root / "pyproject.toml") if path.exists())
    for folder in SOURCES:
        paths = sorted((root / folder).rglob("*"))
        yield from (path for path in paths if path.suffix in SUFFIXES and path.is_file())


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str], log: Path) -> str:
    """Run a command with its output in ``log``, and return its status.

    After ``seconds`` it is interrupted, as by a person, so that it can write what it has; after
    ``GRACE_SECONDS`` more, it and all that it started are killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            return f"stopped after {seconds:.0f} s"
        finally:
            _kill_group(process)
    if status == UNFINISHED_STATUS:
        return UNFINISHED
    return OK if status == 0 else f"failed: exit status {status}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Summary:
    """A row for each step: how it ended last, how long it took, and at which commit and GPU.

    Raises:
        ValueError: the file at ``path`` has other columns.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, str]] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
                    columns = ", ".join(reader.fieldnames or ())
                    raise ValueError(f"it has the columns {columns}, not {', '.join(COLUMNS)}")
                self.rows = {row["step"]: row for row in reader}

    def is_done(self, step: str, commit: str, gpu: str) -> bool:
        """Return whether a step ended well before."""
        row = self.rows.get(step)
        return row is not None and (row["status"], row["commit"], row["gpu"]) == (OK, commit, gpu)

    def add(self, step: str, status: str, seconds: float, commit: str, gpu: str) -> None:
        values = (step, status, f"{seconds:.0f}", commit, gpu)
        self.rows[step] = dict(zip(COLUMNS, values, strict=True))
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        os.replace(temporary, self._path)


def probe(python: str, environment: Mapping[str, str]) -> dict[str, object]:
    """Return the GPU's name and architecture ("90"), and what the extension was built for.

    Raises:
        RuntimeError: ``python`` does not start or is none, or PyTorch or the package cannot be
            imported.
    """
    command = (python, "-c", PROBE)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise RuntimeError(f"it does not start, {error.strerror}") from None
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"it ended with {done.returncode}")
    try:
        machine: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"it is no Python, and printed {done.stdout[:80]!r}") from None
    return machine


def last_lines(log: Path, number: int = 15) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-number:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_minutes", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder for results")
    parser.add_argument("--seconds", type=float, default=540.0, help="default: %(default)g")
    parser.add_argument("--python", default=sys.executable, help="runs the steps")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be positive and finite, got {options.seconds:g}")
    start = time.monotonic()
    end = start + options.seconds
    out: Path = options.out.resolve()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            parser.error(f"--out must be a folder to write to, got {options.out}: it is read-only")
        summary, table = Summary(out / SUMMARY), out / TABLE
    except OSError as error:
        parser.error(f"--out must be a folder to write to, got {options.out}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--out must have no {SUMMARY} of something else: {error}")
    try:
        machine = probe(options.python, environment)
    except RuntimeError as error:
        parser.error(f"--python must be one with PyTorch, got {options.python}: {error}")
    gpu, number = str(machine["gpu"]), str(machine["architecture"])
    if not gpu:
        parser.error("there is no CUDA device")
    commit = commit_of(ROOT)
    environment |= {"TOKENFLEX_COMMIT": commit, "TOKENFLEX_CUDA_ARCHITECTURES": number}
    environment["TOKENFLEX_CUDA"] = "1"
    failed = False
    for step in steps(out, options.seconds):
        left = end - time.monotonic()
        built = step.name != "build" or f"sm_{number}" in str(machine["built_for"])
        if built and summary.is_done(step.name, commit, gpu):
            print(f"{step.name}: {DONE_BEFORE}", flush=True)
            continue
        seconds = min(step.limit, step.share * left) - GRACE_SECONDS
        if seconds < LEAST_SECONDS:
            status, taken = "not run: no time left", 0.0
        else:
            print(f"{step.name}: up to {seconds:.0f} s", flush=True)
            began = time.monotonic()
            told = f"{max(1.0, seconds - step.margin):.0f}"
            command = [options.python, *(word.replace("{seconds}", told) for word in step.command)]
            variables = dict(environment)
            if step.tuned and table.exists():
                variables["TOKENFLEX_LAUNCH_CONFIGS"] = str(table)
            log = out / f"{step.name}.log"
            status = run(command, seconds, variables, log)
            if status not in (OK, UNFINISHED):
                print(last_lines(log), flush=True)
                if step.name == "build":  # the Triton kernels run without the CUDA half
                    variables["TOKENFLEX_CUDA"] = "0"
                    seconds = 0.3 * (end - time.monotonic()) - GRACE_SECONDS
                    run(command, max(1.0, seconds), variables, out / "build-without-cuda.log")
            taken = time.monotonic() - began
        summary.add(step.name, status, taken, commit, gpu)
        print(f"{step.name}: {status}, {taken:.0f} s", flush=True)
        failed |= status not in (OK, UNFINISHED)
    print(f"took {time.monotonic() - start:.0f} s of {options.seconds:g}; see {out / SUMMARY}")
    return int(failed)


def _end_by_signal(number: int, _: object) -> None:
    sys.exit(128 + number)  # the step that is running is killed on the way out


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_by_signal)
    sys.exit(main())
