"""``python -m tokenflex_kernels.tune``: measure the candidates on this GPU, write the table.

For each stage, dtype and batch size, every candidate config runs the variant that training runs, at
the reference shapes; the candidates of products include PyTorch's own (cuBLAS). The fastest whose
result agrees with the first one's is written to ``launch_configs.json`` under the GPU's
architecture; stages that were not measured keep their configs. ``--csv`` writes all times.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenflex_kernels.checks import Grid
from tokenflex_kernels.launch_configs import (
    DTYPES,
    NAMES,
    STAGES,
    TABLE_PATH,
    Config,
    RowConfig,
    TileConfig,
    architecture,
    fits_rows,
    nearest,
    parse_stage,
)
from tokenflex_kernels.stage_calls import rows_of_stage, stage_calls

# (images, tokens of each): from one small image to a training batch.
SIZES: tuple[tuple[int, Grid], ...] = (
    (1, (8, 8)),
    (1, (16, 16)),
    (2, (16, 16)),
    (4, (16, 16)),
    (8, (16, 16)),
    (16, (16, 16)),
    (64, (16, 16)),
    (128, (16, 16)),
)
CLEARLY_FASTER = 0.98  # a challenger must be: otherwise neighbouring sizes flip between equals
# Of each stage on rows: rows, columns, unroll, num_warps, max_registers, and channels of a tile.
ROW_CHOICES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pool_norm_forward": ((1,), (1, 2, 4, 16), (1, 2), (1, 2, 4), (128,)),
    "pool_norm_backward": ((1, 3, 9, 27), (4, 8), (1,), (1, 2), (128,), (128, 256)),
    "norm_gradient": ((4, 16, 32, 64), (1,), (1, 2), (1, 2), (168,)),
    "scale_shift": ((1, 2, 4, 8), (1,), (1,), (1, 2, 4), (128,)),
}

# stage -> dtype -> buckets, as the table has them.
Tuned = dict[str, dict[str, list[dict[str, Any]]]]


class Timing(NamedTuple):
    """The time of one candidate."""

    stage: str
    dtype: str
    rows: int
    config: Config | None
    microseconds: float  # NaN where the candidate did not run
    remark: str


def candidate_configs(stage: str, dtype: torch.dtype, architecture: str) -> list[Config | None]:
    """Return the configs to try for a stage; None stands for PyTorch's own product."""
    if STAGES[stage] is RowConfig:
        return [RowConfig(*choice) for choice in itertools.product(*ROW_CHOICES[stage])]
    if stage == "pointwise":
        return [
            TileConfig(m, n, 0, 8, warps, 1, max_registers=128)
            for m, n, warps in ((8, 128, 4), (16, 128, 4), (32, 64, 4), (16, 256, 8), (32, 128, 8))
        ]
    if dtype == torch.float32:  # IEEE products run on the CUDA cores, where cuBLAS is at home
        return [None]
    newest = int(architecture.removeprefix("sm_")) >= 90
    accumulators = 2 if stage == "gate_up" else 1
    configs: list[Config | None] = [None]
    for (m, n), k, stages, tma in itertools.product(
        ((64, 32), (64, 64), (128, 64), (64, 128), (128, 128), (128, 256), (256, 128)),
        (64, 128),
        (3, 4, 5),
        (False, True) if newest else (False,),
    ):
        warps = 8 if m * n * accumulators >= 128 * 128 else 4
        shared = stages * k * (m + accumulators * n) * dtype.itemsize
        registers = m * n * accumulators // (32 * warps)  # of the accumulators, for each thread
        if shared <= (220_000 if newest else 160_000) and registers <= 128:
            config = TileConfig(m, n, k, 8, warps, stages, tma)
            if stage == "gate_up" and tma:  # its programs walk over tiles
                config = config._replace(programs_per_sm=1 if shared > 113_000 else 2)
            configs.append(config)
            # With half of the registers, two blocks share a multiprocessor.
            if stage == "down_gradient" and warps == 8 and registers <= 64 and shared <= 113_000:
                configs.append(config._replace(max_registers=128))
    return configs


def measure(
    stage: str,
    rows: int,
    dtype: torch.dtype,
    call: Callable[..., Any],
    candidates: Sequence[Config | None],
    clock: Callable[[Callable[[], Any]], float],
) -> list[Timing]:
    """Time every candidate; one that fails or has another result gets a remark instead of a time.

    Args:
        call: runs the stage; takes ``config=``.
        clock: returns the microseconds of a function without arguments.
    """
    timings: list[Timing] = []
    expected: list[torch.Tensor] | None = None
    for config in candidates:
        taken, remark = float("nan"), ""
        try:
            results = _tensors(call(config=config))
            if expected is None:
                expected = results
            if _agree(results, expected):
                taken = clock(lambda config=config: call(config=config))  # type: ignore[misc]
            else:
                remark = "result differs from the first candidate's"
        except Exception as error:  # out of shared memory, or a compiler's limit: the next one
            remark = f"{type(error).__name__}: {error}".splitlines()[0]
        timings.append(Timing(stage, NAMES[dtype], rows, config, taken, remark))
    return timings


def _tensors(results: Any) -> list[torch.Tensor]:
    several = results if isinstance(results, tuple) else (results,)
    return [result for result in several if result is not None and result.numel()]


def _agree(results: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Return whether two orders of summing and rounding to 8 bits can explain the difference."""
    for result, other in zip(results, expected, strict=True):
        difference = (result.float() - other.float()).norm()
        if not difference <= 1e-2 * other.float().norm():  # NaN does not pass
            return False
    return True


def fastest(timings: Sequence[Timing], before: Config | None = None) -> Timing:
    """Return the quickest candidate, or that of ``before`` unless the quickest is clearly faster.

    ``before`` is the choice for the next smaller size.

    Raises:
        RuntimeError: no candidate ran.
    """
    ran = [timing for timing in timings if timing.microseconds > 0]
    if not ran:
        remarks = sorted({timing.remark for timing in timings})
        raise RuntimeError(f"no candidate of {timings[0].stage} ran: {'; '.join(remarks)}")
    best = min(ran, key=lambda timing: timing.microseconds)
    for timing in ran:
        if timing.config == before and best.microseconds > CLEARLY_FASTER * timing.microseconds:
            return timing
    return best


def buckets(choices: Sequence[tuple[int, Config | None]]) -> list[dict[str, Any]]:
    """Return buckets from (rows, config) by rising rows; equal neighbours become one."""
    merged: list[dict[str, Any]] = []
    for rows, config in choices:
        use = "library" if config is None else config._asdict()
        if merged and merged[-1]["use"] == use:
            merged[-1]["up_to"] = rows
        else:
            merged.append({"up_to": rows, "use": use})
    merged[-1]["up_to"] = None
    return merged


def write_table(path: Path, name: str, source: str, tuned: Tuned) -> None:
    """Put the tuned stages of one architecture into the table at ``path``; the rest stays.

    Raises:
        ValueError: the new table would not be valid.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    stages = deepcopy(table[nearest(name, tuple(table))]["stages"])
    for stage, by_dtype in tuned.items():
        kept = {
            dtype: stage_buckets
            for dtypes, stage_buckets in stages[stage].items()
            for dtype in dtypes.split(",")
        }
        stages[stage] = kept | by_dtype
        parse_stage(stages, stage)
    table[name] = {"source": source, "stages": stages}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _write_csv(path: Path, timings: Sequence[Timing]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Timing._fields)
        for timing in timings:
            config = "library" if timing.config is None else json.dumps(timing.config._asdict())
            writer.writerow(timing._replace(config=config))  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenflex_kernels.tune", description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES), help="of: %(default)s")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32", help="of: %(default)s")
    parser.add_argument("--table", type=Path, default=TABLE_PATH, help="table to write into")
    parser.add_argument("--csv", type=Path, help="where every time is written")
    options = parser.parse_args(arguments)
    stages, dtypes = options.stages.split(","), options.dtypes.split(",")
    for name, given, known in (("--stages", stages, STAGES), ("--dtypes", dtypes, DTYPES)):
        if unknown := [value for value in given if value not in known]:
            parser.error(f"{name} must be of {', '.join(known)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")

    import triton

    def clock(run: Callable[[], Any]) -> float:
        milliseconds: float = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
        return 1000 * milliseconds

    device = torch.device("cuda", torch.cuda.current_device())
    name = architecture(device)
    timings: list[Timing] = []
    tuned: Tuned = {}
    for stage, dtype in itertools.product(stages, dtypes):
        candidates = candidate_configs(stage, DTYPES[dtype], name)
        choices: list[tuple[int, Config | None]] = []
        for images, out_grid in SIZES:
            rows = rows_of_stage(stage, images, out_grid)
            _, call = next(stage_calls(stage, DTYPES[dtype], images, out_grid, device))
            fitting = [config for config in candidates if fits_rows(config, rows)]
            measured = measure(stage, rows, DTYPES[dtype], call, fitting, clock)
            best = fastest(measured, choices[-1][1] if choices else None)
            library = [
                f", library {timing.microseconds:.1f}"
                for timing in measured
                if timing.config is None
            ]
            print(
                f"{stage:19} {dtype:9} {rows:6} rows: {best.microseconds:8.1f} us{''.join(library)}"
                f"  {best.config or 'library'}",
                flush=True,
            )
            timings += measured
            choices.append((rows, best.config))
        tuned.setdefault(stage, {})[dtype] = buckets(choices)
    if options.csv:
        _write_csv(options.csv, timings)
    source = (
        f"measured on {torch.cuda.get_device_name(device)}, torch {torch.__version__}, "
        f"triton {triton.__version__}; stages that tune was not run for are estimates"
    )
    write_table(options.table, name, source, tuned)
    print(f"wrote {name} to {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
