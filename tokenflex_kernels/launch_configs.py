"""The kernel and block sizes of a call: a pure function of stage, rows, dtype and architecture.

Nothing is tuned at run time. The table is ``launch_configs.json``, or the file that the variable
``TOKENFLEX_LAUNCH_CONFIGS`` names when the first kernel is launched. ``python -m
tokenflex_kernels.tune`` writes it from measurements on the GPU at hand; the ``source`` of each
architecture says what was measured. The layout:

    architecture ("sm_90", "gfx942") -> {"source": .., "stages": stage -> dtype -> [bucket, ..]}
    bucket: {"up_to": rows or null, "use": "library" or the fields of the stage's config}

A call takes the first bucket whose ``up_to`` is at least its rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenflex_kernels.gpus import is_amd, number_of

TABLE_PATH = Path(__file__).with_name("launch_configs.json")
TABLE_VARIABLE = "TOKENFLEX_LAUNCH_CONFIGS"


class RowConfig(NamedTuple):
    """The config of a kernel that works on whole rows (pooling and normalisation)."""

    rows: int  # of patches (backward), or of cells (norm_gradient, scale_shift), of a program
    columns: int  # neighbouring cells (forward), or patches (backward, a power of 2), of a program
    unroll: int  # steps of a loop whose loads may be in flight at once
    num_warps: int  # for rows of 1025 to 2048 features; wider rows get more, narrower ones fewer
    max_registers: int  # of a thread; given because ptxas may choose to spill for occupancy
    channels: int = 128  # of a tile of patches (backward, whose warps are as given at any width)


class TileConfig(NamedTuple):
    """The config of a matrix product, or of a pointwise kernel on tiles."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int  # tiles of rows that are walked together, for the sake of L2
    num_warps: int
    num_stages: int
    tma: bool = False  # tiles through tensor-map descriptors (Hopper and newer): see ``fits_rows``
    max_registers: int | None = None  # of a thread; None leaves it to ptxas
    # Whether a product takes sides that are not multiples of 16 too. It then loads element by
    # element, for which most tiles have too few registers; other configs leave such products to
    # PyTorch.
    ragged: bool = False
    # Programs on each multiprocessor, for kernels whose programs walk over tiles; None: as many as
    # there are tiles.
    programs_per_sm: int | None = None


# Descriptors are built on the host at each launch, for some microseconds that a small call notices.
MIN_DESCRIBED_ROWS = 513

Config = RowConfig | TileConfig
Buckets = tuple[tuple[int | None, Config | None], ...]  # (up_to, config)

# The kind of config of each stage. Those of PRODUCTS may be "library" instead: PyTorch's matrix
# product (cuBLAS), followed by a pointwise kernel, or by packing, where needed.
STAGES: dict[str, type[RowConfig] | type[TileConfig]] = {
    "pool_norm_forward": RowConfig,
    "pool_norm_backward": RowConfig,
    "norm_gradient": RowConfig,
    "scale_shift": RowConfig,
    "gate_up": TileConfig,
    "down_gradient": TileConfig,
    "input_gradient": TileConfig,
    "pointwise": TileConfig,
    "packed_down": TileConfig,
}
PRODUCTS = ("gate_up", "down_gradient", "input_gradient", "packed_down")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INTERPRETER = "interpreter"


def architecture(device: torch.device) -> str:
    """Return "sm_90" or similar for a CUDA device, and ``INTERPRETER`` for the CPU.

    For the meta device, on which kernels are only compiled: the target that Triton compiles for.
    PyTorch calls AMD's devices CUDA devices too; theirs is "gfx942" or similar.
    """
    if device.type == "cuda":
        return _cuda_architecture(device)
    if device.type == "meta":
        from triton.runtime import driver

        target = driver.active.get_current_target()
        return f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    return INTERPRETER


@cache
def _cuda_architecture(device: torch.device) -> str:
    if torch.version.hip is not None:  # "gfx942:sramecc+:xnack-"
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def fits_rows(config: Config | None, rows: int) -> bool:
    """Return whether ``config`` may serve a call on that many rows; small ones do without TMA."""
    return rows >= MIN_DESCRIBED_ROWS or not (isinstance(config, TileConfig) and config.tma)


_overrides: dict[str, Config | None] = {}


@contextmanager
def overriding(**configs: Config | None) -> Iterator[None]:
    """Use these configs of stages instead of the table's: for tuning, compiling and tests."""
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def is_overridden() -> bool:
    """Return whether any stage has another config than the table's."""
    return bool(_overrides)


def config_for(stage: str, like: torch.Tensor, rows: int) -> Any:
    """Return the config of ``stage`` for a call on ``rows`` rows, of dtype and device of ``like``.

    A ``RowConfig`` or ``TileConfig``, see ``STAGES``; None stands for PyTorch's matrix product.
    """
    if stage in _overrides:
        return _overrides[stage]
    return launch_config(stage, rows, like.dtype, architecture(like.device))


def launch_config(stage: str, rows: int, dtype: torch.dtype, architecture: str) -> Config | None:
    """Return the config of ``stage`` for a call on ``rows`` rows; None for PyTorch's product.

    Args:
        stage: one of ``STAGES``.
        rows: tokens of the whole batch (patches, in the backward pass of pooling).
        dtype: of the activations: float16, bfloat16 or float32.
        architecture: see :func:`architecture`. One that is not in the table takes the configs of
            the newest of its vendor that is not newer than it, or else of the oldest.
    """
    for up_to, config in _buckets(stage, NAMES[dtype], architecture):
        if up_to is None or rows <= up_to:
            return config
    raise AssertionError("the last bucket of a stage has no end")


@cache
def _buckets(stage: str, dtype: str, architecture: str) -> Buckets:
    table = read_table()
    return parse_stage(table[nearest(architecture, tuple(table))]["stages"], stage)[dtype]


@cache
def read_table(path: Path | None = None) -> dict[str, Any]:
    """Return the table as it is written, by architecture; by default the one that is in use."""
    return json.loads((path or table_in_use()).read_text(encoding="utf-8"))


def table_in_use() -> Path:
    """Return the path of the table that ``TOKENFLEX_LAUNCH_CONFIGS`` names, or the shipped one."""
    return Path(os.environ.get(TABLE_VARIABLE) or TABLE_PATH)


def nearest(architecture: str, known: tuple[str, ...]) -> str:
    """Return the entry of the table that serves ``architecture``.

    Raises:
        ValueError: no entry is of its vendor.
    """
    if architecture in known:
        return architecture
    entries = sorted(
        (number_of(name), name)
        for name in known
        if name != INTERPRETER and is_amd(name) == is_amd(architecture)
    )
    if not entries:
        raise ValueError(
            f"the table of launch configs has no entry for {architecture} or its vendor, only "
            f"{', '.join(known)}"
        )
    not_newer = [name for number, name in entries if number <= number_of(architecture)]
    return not_newer[-1] if not_newer else entries[0][1]


def parse_stage(stages: dict[str, Any], stage: str) -> dict[str, Buckets]:
    """Return the buckets of one stage by dtype.

    Raises:
        ValueError: a bucket is out of order, lacks a field, or the last one has an end.
    """
    parsed: dict[str, Buckets] = {}
    for dtypes, buckets in stages[stage].items():
        configs: list[tuple[int | None, Config | None]] = []
        for bucket in buckets:
            if set(bucket) != {"up_to", "use"}:
                raise ValueError(f"{stage}, {dtypes}: a bucket has up_to and use, got {bucket}")
            use = bucket["use"]
            if use == "library" and stage not in PRODUCTS:
                raise ValueError(f"{stage} has no library form, but its {dtypes} asks for it")
            try:
                config = None if use == "library" else STAGES[stage](**use)
            except TypeError as error:
                raise ValueError(f"{stage}, {dtypes}, up to {bucket['up_to']}: {error}") from None
            configs.append((bucket["up_to"], config))
        ends = [end for end, _ in configs]
        rising = [end for end in ends if end is not None]
        if ends != [*sorted(set(rising)), None]:
            raise ValueError(f"{stage}, {dtypes}: buckets must rise to one without end, got {ends}")
        parsed |= dict.fromkeys(dtypes.split(","), tuple(configs))
    return parsed
