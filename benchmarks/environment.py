"""What a figure was measured on, and the CSV it is written to."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, object]:
    """The columns that every result carries. No host name, user or path is among them."""
    columns: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
        "gpu": "",
        "driver": "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenflex": _version("tokenflex"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }
    if torch.cuda.is_available():
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
        columns["gpu"] = torch.cuda.get_device_name()
        columns["driver"] = _output("nvidia-smi", query, "--format=csv,noheader")
    return columns


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``rows``, all of the same columns, with the environment's columns after theirs."""
    shared = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *shared], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, each a value that was measured."""
    ordered = sorted(values)
    return {f"p{share}": ordered[(len(ordered) - 1) * share // 100] for share in (20, 50, 80)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
