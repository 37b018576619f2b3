"""Results: the columns of a CSV, the machine in them, reading and writing."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tokenflex.files import write_atomically
from tokenflex_kernels.gpus import data_sheet
from tokenflex_kernels.launch_configs import TABLE_PATH, table_in_use

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
KEY = ("op", "case", "mode", "dtype", "threads", "variant")
COLUMNS = (
    *("op", "case", "tokens", "mode", "variant", "status", "backend", "dtype", "timing"),
    *("p20_us", "p50_us", "p80_us", "eager_us", "samples", "sets", "tokens_per_s"),
    *("over_ours", "over_ours_low", "over_ours_high"),
    *("ideal_bytes", "gb_per_s", "share_of_copy", "flops", "tflop_per_s", "share_of_matmul"),
    *("share_of_sheet", "peak_bytes", "saved_bytes", "synchronisations", "error", "seed", "note"),
)
PACKAGES = (
    *("torch", "triton", "tokenflex", "transformers"),
    *("liger-kernel", "quack-kernels", "flash-swiglu-mlp", "flash-attn"),
    "nvidia-cudnn-frontend",
)

OURS = "tokenflex"
NO_BIASES = "tokenflex, no biases"
LEAN = "tokenflex, save=input"
SPARSE = "tokenflex, sparse_grad"
EAGER = "PyTorch eager"
COMPILED = "torch.compile, max-autotune"
AGAIN = ", again"  # ends the name of a control: a variant that is compared with itself
WALL_CLOCK = "wall clock"
# The ops of suites that are not called like their op.
SUITES = dict.fromkeys(("pack_embeddings", "merge_vision", "unpack_vision"), "packing")
SUITES["ceiling"] = "ceilings"

NewRow = dict[str, Any]  # as measured
Row = dict[str, str]  # as read from a CSV


def new_row(**values: Any) -> NewRow:
    """Return a row with every column, empty except for ``values``."""
    return dict.fromkeys(COLUMNS, "") | values


def suite_of(row: NewRow) -> str:
    """Return the name of the suite that measures a row, or that a row is about."""
    op = row["op"].removesuffix(" suite")
    return SUITES.get(op, op)


# ---- the machine


def environment(device: str) -> dict[str, Any]:
    """Return the machine's columns, which contain no host name, user or path.

    ``load`` is the one-minute average and ``clocks`` the GPU's clocks at the time of the call.
    The version of a package that is not installed is empty.
    """
    on_gpu = device == "cuda"
    return {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "driver": _nvidia_smi("driver_version") if on_gpu else "",
        "clocks": gpu_clocks(device),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "configs": configs_in_use(),
        # A copy of the tree may come without its history.
        "commit": os.environ.get("TOKENFLEX_COMMIT")
        or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def configs_in_use() -> str:
    """Return "shipped", or a short digest of the table of launch configs that is used instead."""
    path = table_in_use()
    if path == TABLE_PATH:
        return "shipped"
    return f"table {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def gpu_clocks(device: str) -> str:
    """Return the GPU's clocks (SM, memory, and the maximum of each); empty for a CPU."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    return _nvidia_smi(query) if device == "cuda" else ""


def machine_name(columns: Mapping[str, object]) -> str:
    """Return the name of the machine's CSV: "nvidia-h200", or "cpu-amd-epyc-2-cores"."""
    name = columns["gpu"] or f"cpu {columns['cpu']} {columns['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def last_level_cache(device: str) -> int:
    """Return the bytes of the GPU's L2 cache, or those that the CPU's cores have to themselves.

    A CPU's last cache is shared by all tenants of the machine: hundreds of MiB, of which a batch
    finds a part or nothing.
    """
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="utf-8")
    except OSError:
        size = "2048K"
    return len(os.sched_getaffinity(0)) * int(size.strip().rstrip("K")) * 2**10


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*: (.+)$", text, flags=re.MULTILINE)
    return name[1] if name else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _nvidia_smi(query: str) -> str:
    """Query the GPU in use, or the first GPU where nvidia-smi does not know its identifier."""
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


# ---- the CSV


def write_csv(
    path: Path, rows: Sequence[Mapping[str, object]], shared: Mapping[str, object]
) -> None:
    """Write rows atomically, each followed by the columns of ``shared``.

    A row may lack columns that others have: those of a version that did not write them.
    """
    names = dict.fromkeys(name for row in (*rows, shared) for name in row)

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **shared} for row in rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a CSV, every value as a string.

    Raises:
        ValueError: The file has no row, lacks one of ``columns``, or has an incomplete row.
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


def replace_rows(rows: Sequence[NewRow], folder: Path, keys: Sequence[str]) -> list[Row]:
    """Write rows of the CPU into the machine's CSV, in place of those with the same ``keys``."""
    shared = environment("cpu")
    path = folder / f"{machine_name(shared)}.csv"
    measured = {tuple(str(row[key]) for key in keys) for row in rows}
    earlier = read_csv(path) if path.exists() else []
    kept = [row for row in earlier if tuple(row[key] for key in keys) not in measured]
    write_csv(path, [*kept, *({**row, **shared} for row in rows)], {})
    print(f"{len(rows)} rows in {path}")
    return read_csv(path)


def add_shares(rows: Sequence[NewRow], shared: Mapping[str, object]) -> None:
    """Fill in the shares of the measured ceilings, and of the rates in the data sheet.

    The ceilings are those of the row's dtype and number of threads.
    """

    def setting(row: NewRow) -> tuple[str, str]:
        return str(row.get("threads")), row["dtype"]

    ceilings = {(row["variant"], *setting(row)): row for row in rows if row["op"] == "ceiling"}
    sheet = data_sheet(str(shared["gpu"]))
    for rate, ceiling, stated in (
        ("gb_per_s", "copy", sheet and sheet.bandwidth),
        ("tflop_per_s", "matmul", sheet and sheet.half),
    ):
        for row in rows:
            measured = ceilings.get((ceiling, *setting(row)), {}).get(rate)
            if row[rate] != "" and measured:
                row[f"share_of_{ceiling}"] = round(float(row[rate]) / float(measured), 4)
            if row[rate] != "" and stated:
                row["share_of_sheet"] = round(float(row[rate]) / stated, 4)
