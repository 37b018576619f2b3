"""The machine that a figure was measured on: the columns that every row of a CSV carries."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
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
    """Return the machine's columns; no host name, user or path is among them.

    ``load`` is the one-minute average and ``clocks`` the GPU's clocks at the time of the call.
    The version of a package that is not installed is empty.
    """
    columns: dict[str, object] = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
        "gpu": "",
        "driver": "",
        "clocks": clocks(device),
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
    return columns


def clocks(device: str) -> str:
    """Return the GPU's clocks (SM, memory, and the maximum of each); empty for a CPU."""
    if device != "cuda":
        return ""
    return _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem")


def machine_name(columns: Mapping[str, object]) -> str:
    """Return the name of the machine's CSV: "nvidia-h200", or "cpu-amd-epyc-2-cores"."""
    name = columns["gpu"] or f"cpu {columns['cpu']} {columns['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def last_level_cache(device: str) -> int:
    """Return the bytes of the cache that inputs must exceed: the GPU's L2, or the CPU's largest."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    paths = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text(encoding="utf-8").strip() for path in paths]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 * 2**20)


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
    """Query the GPU in use, or the first one where nvidia-smi does not know that one's number."""
    command = ("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", "")
    return _output(*command, f"--id=GPU-{uuid}") or _output(*command)


def _output(*command: str) -> str:
    """Return the first line that a command prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
