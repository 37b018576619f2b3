"""What a figure was measured on, and the CSV it is written to."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch",
    "triton",
    "tokenflex",
    "transformers",
    "liger-kernel",
    "quack-kernels",
    "flash-swiglu-mlp",
    "flash-attn",
)

# GB/s and dense bf16 TFLOP/s that the vendor states, by the device's name.
DATA_SHEETS = {"NVIDIA H200": (4800.0, 989.0), "NVIDIA H100 80GB HBM3": (3350.0, 989.0)}


def environment(device: str) -> dict[str, object]:
    """The columns that every result carries. No host name, user or path is among them.

    ``load`` is the one-minute load average at the moment of the call, ``clocks`` are those of SM
    and memory then, and their maxima; versions of packages that are not installed are empty.
    """
    columns: dict[str, object] = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
        "gpu": "",
        "driver": "",
        "clocks": "",
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        # A copy of the tree may come without its history.
        "commit": os.environ.get("TOKENFLEX_COMMIT")
        or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }
    if device == "cuda":
        columns["gpu"] = torch.cuda.get_device_name()
        columns["driver"] = _nvidia_smi("driver_version")
        columns["clocks"] = clocks(device)
    return columns


def clocks(device: str) -> str:
    """Of SM and memory, and their maxima; nothing for a CPU."""
    if device != "cuda":
        return ""
    return _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem")


def machine_name(columns: Mapping[str, object]) -> str:
    """What the machine's CSV is called: "nvidia-h200", or "cpu-amd-epyc-2-cores"."""
    name = columns["gpu"] or f"cpu {columns['cpu']} {columns['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def write_csv(
    path: Path, rows: Sequence[Mapping[str, object]], shared: Mapping[str, object]
) -> None:
    """Write ``rows``, all of the same columns, with the columns of ``shared`` after theirs.

    The file appears whole or not at all.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *shared], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **shared} for row in rows)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV, every value as it is written there.

    Raises:
        ValueError: it has no row, lacks one of ``columns``, or a row of it is torn.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header, rows = reader.fieldnames or (), list(reader)
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"{path} must have the columns of a result, got none called {missing[0]}")
    if not rows:
        raise ValueError(f"{path} must have rows, got none")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} must have a value for every column, got a row without")
    return rows


def last_level_cache(device: str) -> int:
    """Bytes of the cache that inputs must exceed: the GPU's L2, or the CPU's largest."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    found = [path.read_text(encoding="utf-8").strip() for path in sizes]
    return max((int(size[:-1]) * units[size[-1]] for size in found), default=32 * 2**20)


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
        return ""


def _nvidia_smi(query: str) -> str:
    """What nvidia-smi says of the GPU in use, or of the first where it does not know that one."""
    wanted = ("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", "")
    return _output(*wanted, f"--id=GPU-{uuid}") or _output(*wanted)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
