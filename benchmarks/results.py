"""Results: the columns of a CSV, the machine in them, reading and writing, and comparing rows."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenflex.files import write_atomically
from tokenflex_kernels.gpus import data_sheet

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
KEY = ("op", "case", "mode", "variant")
COLUMNS = (
    *("op", "case", "tokens", "mode", "variant", "status", "backend", "dtype", "timing"),
    *("p20_us", "p50_us", "p80_us", "eager_us", "samples", "sets", "tokens_per_s"),
    *("ideal_bytes", "gb_per_s", "share_of_copy", "flops", "tflop_per_s", "share_of_matmul"),
    *("share_of_sheet", "peak_bytes", "saved_bytes", "synchronisations", "error", "seed", "note"),
)
PACKAGES = (
    *("torch", "triton", "tokenflex", "transformers"),
    *("liger-kernel", "quack-kernels", "flash-swiglu-mlp", "flash-attn"),
)

OURS = "tokenflex"
NO_BIASES = "tokenflex, no biases"
LEAN = "tokenflex, save=input"
SPARSE = "tokenflex, sparse_grad"
EAGER = "PyTorch eager"
COMPILED = "torch.compile, max-autotune"
WALL_CLOCK = "wall clock"

NewRow = dict[str, Any]  # as measured
Row = dict[str, str]  # as read from a CSV


def new_row(**values: Any) -> NewRow:
    """Return a row with every column, empty except for ``values``."""
    return dict.fromkeys(COLUMNS, "") | values


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
        # A copy of the tree may come without its history.
        "commit": os.environ.get("TOKENFLEX_COMMIT")
        or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def gpu_clocks(device: str) -> str:
    """Return the GPU's clocks (SM, memory, and the maximum of each); empty for a CPU."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    return _nvidia_smi(query) if device == "cuda" else ""


def machine_name(columns: Mapping[str, object]) -> str:
    """Return the name of the machine's CSV: "nvidia-h200", or "cpu-amd-epyc-2-cores"."""
    name = columns["gpu"] or f"cpu {columns['cpu']} {columns['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def last_level_cache(device: str) -> int:
    """Return the bytes of the GPU's L2 cache, or of the CPU's largest cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    paths = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text(encoding="utf-8").strip() for path in paths]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 * 2**20)


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
    """Write rows of the same columns atomically, each followed by the columns of ``shared``."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *shared], lineterminator="\n")
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


def add_shares(rows: Sequence[NewRow], shared: Mapping[str, object]) -> None:
    """Fill in the shares of the measured ceilings, and of the rates in the data sheet."""
    ceilings = {row["variant"]: row for row in rows if row["op"] == "ceiling"}
    sheet = data_sheet(str(shared["gpu"]))
    for rate, ceiling, stated in (
        ("gb_per_s", "copy", sheet and sheet.bandwidth),
        ("tflop_per_s", "matmul", sheet and sheet.half),
    ):
        measured = ceilings.get(ceiling, {}).get(rate)
        for row in rows:
            if row[rate] != "" and measured:
                row[f"share_of_{ceiling}"] = round(row[rate] / measured, 4)
            if row[rate] != "" and stated:
                row["share_of_sheet"] = round(row[rate] / stated, 4)


# ---- comparing


class Figure(NamedTuple):
    """A number, and what a reader must know beside it."""

    value: float
    remark: str = ""


class Comparison(NamedTuple):
    """A row of ours, a peer's of the same case, and the peer's time over ours."""

    ours: Row
    peer: Row
    figure: Figure


class Results:
    """The rows of one machine; the measured ones are found by op, case, mode and variant."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.measured = [row for row in self.rows if row["status"] == "ok"]
        self._by_key = {tuple(row[name] for name in KEY): row for row in self.measured}

    def beside(self, row: Row, **changes: str) -> Row | None:
        """Return the measured row that differs from ``row`` in ``changes`` alone."""
        wanted = row | changes
        return self._by_key.get(tuple(wanted[name] for name in KEY))

    def uniform(self, row: Row) -> Row | None:
        """Return the row of the uniform batch that a mixed one is compared with."""
        return self.beside(row, case=row["case"].replace("mixed", "uniform"))

    def comparisons(self) -> list[Comparison]:
        """Return each measured row of a peer beside ours that computes the same."""
        pairs = []
        for row in self.measured:
            ours = self.beside(row, variant=_counterpart(row))
            if row["variant"].startswith(OURS) or not ours:
                continue
            if figure := speed_up(ours, row):
                pairs.append(Comparison(ours, row, figure))
        return pairs


def _counterpart(row: Row) -> str:
    if row["variant"].endswith("no biases"):
        return NO_BIASES
    return SPARSE if row["case"].endswith("sparse table gradient") else OURS


def speed_up(ours: Row, peer: Row) -> Figure | None:
    """Return the peer's time over ours; None where one of them has no time.

    A CUDA-graph replay excludes the host's time. If only one of the two was captured, the wall
    clock times of both are compared, and the figure says so.
    """
    if ours["timing"] == peer["timing"]:
        return ratio(peer, ours, "p50_us")
    figure = ratio(peer, ours, "eager_us")
    return figure and Figure(figure.value, WALL_CLOCK)


def ratio(above: Row, below: Row, column: str) -> Figure | None:
    """Return one row's column over another's; None where either is empty."""
    if not above[column] or not below[column]:
        return None
    numerator, denominator = float(above[column]), float(below[column])
    if not denominator:
        return Figure(1.0 if not numerator else float("inf"))
    return Figure(numerator / denominator)
