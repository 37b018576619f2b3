"""Which kernel and which block sizes: a pure function of the stage, rows, dtype and architecture.

Nothing is tuned at run time. The answers are in ``launch_configs.json``, which
``python -m tokenflex_kernels.tune`` writes from measurements on the GPU at hand; a part of it that
was not measured says so in its ``source``. The layout:

    architecture ("sm_90") -> {"source": .., "stages": stage -> dtype -> [bucket, ..]}
    bucket: {"up_to": rows or null, "use": "library" or the fields of the stage's config}

The first bucket whose ``up_to`` is at least the rows of a call answers it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE_PATH = Path(__file__).with_name("launch_configs.json")


class RowConfig(NamedTuple):
    """Of a kernel that works on whole rows (pooling and normalisation)."""

    rows: int
    """Rows of patches (backward), or rows (scale and shift), that a program owns."""
    columns: int
    """Neighbouring cells (forward) or patches (backward) of a row that a program owns."""
    unroll: int
    """Loads in flight at once."""
    num_warps: int
    """For rows of 1025 to 2048 features; wider rows get more, narrower ones fewer."""
    max_registers: int
    """A thread's. Said outright, since ptxas's own choice may spill for the sake of occupancy."""


class TileConfig(NamedTuple):
    """Of a matrix product, or of a pointwise kernel on tiles."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    """Tiles of rows that are walked together, for the sake of L2."""
    num_warps: int
    num_stages: int
    tma: bool = False
    """Whether tiles are loaded through tensor-map descriptors (Hopper and newer)."""
    max_registers: int | None = None
    """A thread's; None leaves it to ptxas."""
    ragged: bool = False
    """Of a product: whether it takes sides that are no multiples of 16 too. It then loads element
    by element, which most tiles have too few registers for; the others leave such to the library.
    """


Config = RowConfig | TileConfig

# Stages, each with the kind of config it takes. For those of PRODUCTS the answer may be "library":
# PyTorch's matrix product (cuBLAS), and a pointwise kernel where there is more to do.
STAGES: dict[str, type[RowConfig] | type[TileConfig]] = {
    "pool_norm_forward": RowConfig,
    "pool_norm_backward": RowConfig,
    "norm_gradient": RowConfig,
    "scale_shift": RowConfig,
    "gate_up": TileConfig,
    "down_gradient": TileConfig,
    "input_gradient": TileConfig,
    "pointwise": TileConfig,
}
PRODUCTS = ("gate_up", "down_gradient", "input_gradient")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INTERPRETER = "interpreter"


def architecture(device: torch.device) -> str:
    """ "sm_90" and the like for a CUDA device; the interpreter's own name for the CPU.

    For the meta device, on which kernels are only compiled, the target that Triton compiles for.
    """
    if device.type == "cuda":
        return _cuda_architecture(device)
    if device.type == "meta":
        from triton.runtime import driver

        return f"sm_{driver.active.get_current_target().arch}"
    return INTERPRETER


@cache
def _cuda_architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


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


def config_for(stage: str, like: torch.Tensor, rows: int) -> Any:
    """Return the config of ``stage`` for a call on ``rows`` rows, of dtype and device of ``like``.

    A ``RowConfig`` or ``TileConfig``, see ``STAGES``; None stands for PyTorch's matrix product.
    """
    if stage in _overrides:
        return _overrides[stage]
    return launch_config(stage, rows, like.dtype, architecture(like.device))


def launch_config(stage: str, rows: int, dtype: torch.dtype, architecture: str) -> Config | None:
    """The config of ``stage`` for a call on ``rows`` rows; None where the library is to be used.

    Args:
        stage: one of ``STAGES``.
        rows: tokens of the whole batch (patches, in the backward pass of pooling).
        dtype: of the activations: float16, bfloat16 or float32.
        architecture: see :func:`architecture`. One that is not in the table takes the answers of
            the newest that is not newer than it, or else of the oldest.
    """
    for up_to, config in _buckets(stage, NAMES[dtype], architecture):
        if up_to is None or rows <= up_to:
            return config
    raise AssertionError("the last bucket of a stage has no end")


@cache
def _buckets(
    stage: str, dtype: str, architecture: str
) -> tuple[tuple[int | None, Config | None], ...]:
    return parse_stage(read_table()[nearest(architecture, tuple(read_table()))]["stages"], stage)[
        dtype
    ]


@cache
def read_table(path: Path = TABLE_PATH) -> dict[str, Any]:
    """The table as it is written, by architecture."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


def nearest(architecture: str, known: tuple[str, ...]) -> str:
    """The entry of the table that serves ``architecture``."""
    if architecture in known:
        return architecture
    numbers = sorted(int(name.removeprefix("sm_")) for name in known if name != INTERPRETER)
    wanted = int(architecture.removeprefix("sm_"))
    not_newer = [number for number in numbers if number <= wanted]
    return f"sm_{not_newer[-1] if not_newer else numbers[0]}"


def parse_stage(
    stages: dict[str, Any], stage: str
) -> dict[str, tuple[tuple[int | None, Config | None], ...]]:
    """The buckets of one stage by dtype, checked.

    Raises:
        ValueError: a bucket is out of order, lacks a field, or the last one has an end.
    """
    parsed: dict[str, tuple[tuple[int | None, Config | None], ...]] = {}
    for dtypes, buckets in stages[stage].items():
        configs: list[tuple[int | None, Config | None]] = []
        for bucket in buckets:
            if set(bucket) != {"up_to", "use"}:
                raise ValueError(f"{stage}, {dtypes}: a bucket has up_to and use, got {bucket}")
            use = bucket["use"]
            if use == "library":
                if stage not in PRODUCTS:
                    raise ValueError(f"{stage} has no library form, but its {dtypes} asks for it")
                configs.append((bucket["up_to"], None))
                continue
            try:
                configs.append((bucket["up_to"], STAGES[stage](**use)))
            except TypeError as error:
                raise ValueError(f"{stage}, {dtypes}, up to {bucket['up_to']}: {error}") from None
        ends = [end for end, _ in configs]
        rising = [end for end in ends if end is not None]
        if ends != [*sorted(set(rising)), None]:
            raise ValueError(f"{stage}, {dtypes}: buckets must rise to one without end, got {ends}")
        for dtype in dtypes.split(","):
            parsed[dtype] = tuple(configs)
    return parsed
