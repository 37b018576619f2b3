"""``python -m tokenflex_kernels.smoke``: run every kernel and variant once on this GPU.

Each stage runs in every variant, dtype and config of the table for this GPU, and packing with both
of its memory accesses. Results are compared with float64, which the compiled extension computes on
the host from the same numbers; rows that are only moved must agree bit by bit. This takes seconds,
after all kernels were compiled in parallel.

A line of ``--csv`` is written after each check. Another call with that file, on the same GPU with
the same versions and kernels, leaves out the checks that are in it. A kernel that ends all use of
the GPU costs its own check: the command starts again without it. The exit status is 1 if a check
failed, and 75 if ``--seconds`` ended before all were done.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple

import torch

from tokenflex_kernels.aot import WIDTHS
from tokenflex_kernels.checks import Grid
from tokenflex_kernels.information import info
from tokenflex_kernels.journal import (
    LOST,
    UNFINISHED,
    DeviceLost,
    Journal,
    device_is_lost,
    restart,
    setting_of_gpu,
)
from tokenflex_kernels.launch_configs import (
    DTYPES,
    STAGES,
    Config,
    architecture,
    nearest,
    parse_stage,
    read_table,
)
from tokenflex_kernels.options import output_file, time_limit
from tokenflex_kernels.packing.embeddings import merge_vision, pack_embeddings, unpack_vision
from tokenflex_kernels.packing.plan import plan_packing
from tokenflex_kernels.precompile import Launch, build, reason_of
from tokenflex_kernels.stage_calls import Widths, stage_calls

# The largest relative error (2-norm) of a result against float64.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
COLUMNS = ("check", "status", "error", "seconds")
IMAGES, OUT_GRID = 2, (16, 16)
PLACEHOLDER = 0


class Check(NamedTuple):
    """A launch with its name, and the function that returns its error or raises."""

    name: str
    error: Callable[[], float]


class Draws:
    """Normal random numbers, the same in any dtype and on any device.

    Args:
        rounded: The dtype that the numbers are rounded to.
        dtype, device: Of the tensors that hold them.
    """

    def __init__(
        self, rounded: torch.dtype, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._rounded, self._dtype, self._device = rounded, dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        numbers = scale * torch.randn(shape, generator=self._generator)
        return numbers.to(self._rounded).to(self._device, self._dtype)


def shipped_launches(architecture: str) -> list[Launch]:
    """Return a launch for each stage, dtype and config in the table, widths included.

    Widths that are no multiples of tiles, or of anything, are for bfloat16 alone.
    """
    table = read_table()
    stages = table[nearest(architecture, tuple(table))]["stages"]
    return [
        Launch(stage, dtype, config, widths, every_variant=True)
        for stage in STAGES
        for dtype, buckets in parse_stage(stages, stage).items()
        for widths in (WIDTHS if dtype == "bfloat16" else ("",))
        for config in dict.fromkeys(config for _, config in buckets)
    ]


class Inputs:
    """The calls of a stage on the same numbers: on a device, and in float64 on the host.

    Args:
        launch: Whose stage, dtype and widths to take.
        widths: Those by name.
        images, out_grid: Of the batch.
    """

    def __init__(
        self,
        launch: Launch,
        widths: Mapping[str, Widths] = WIDTHS,
        images: int = IMAGES,
        out_grid: Grid = OUT_GRID,
    ) -> None:
        self._stage, self.dtype = launch.stage, DTYPES[launch.dtype]
        self._widths, self._batch = widths[launch.widths], (images, out_grid)
        self._truths: dict[str, Any] = {}

    def calls(self, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[..., Any]]:
        """Return the variants by name, on tensors of ``dtype`` that hold rounded numbers."""
        draws = Draws(self.dtype, dtype, device)
        return dict(stage_calls(self._stage, dtype, *self._batch, device, self._widths, draws))

    def truth(self, variant: str) -> Any:
        """Return the results of a variant in float64; all variants are computed at once."""
        if not self._truths:
            exact = self.calls(torch.float64, torch.device("cpu"))
            self._truths = {name: call(config=None) for name, call in exact.items()}
        return self._truths[variant]


def stage_checks(launches: Sequence[Launch], device: torch.device, **batch: Any) -> Iterator[Check]:
    """Yield a check for each launch and variant.

    Args:
        launches: What to check; launches that differ in the config alone follow one another.
        device: To launch on.
        **batch: Further arguments of :class:`Inputs`.
    """
    for inputs_of, group in groupby(launches, lambda launch: launch._replace(config=None)):
        inputs = Inputs(inputs_of, **batch)
        calls = inputs.calls(inputs.dtype, device)
        for launch, (variant, call) in product(group, calls.items()):
            words = (launch.stage, launch.dtype, launch.widths, variant, config_name(launch.config))
            run, truth = partial(call, config=launch.config), partial(inputs.truth, variant)
            yield Check(" ".join(filter(None, words)), partial(_error, run, truth, inputs.dtype))


def config_name(config: Config | None) -> str:
    """Return the fields of a config in one word."""
    return "library" if config is None else "/".join(str(int(field or 0)) for field in config)


def _error(run: Callable[[], Any], truth: Callable[[], Any], dtype: torch.dtype) -> float:
    """Return the largest relative error of the results.

    Raises:
        ValueError: it is above the limit of ``dtype``, or not a number.
    """
    worst = 0.0
    pairs = zip(_several(run()), _several(truth()), strict=True)
    for position, (result, exact) in enumerate(pairs):
        if result.shape != exact.shape:
            shapes = tuple(result.shape), tuple(exact.shape)
            raise ValueError("result {} has shape {}, expected {}".format(position, *shapes))
        if result.numel() == 0:
            continue
        difference = (result.cpu().double() - exact).norm().item()
        error = difference / exact.norm().item()
        if not error <= LIMITS[dtype]:
            raise ValueError(
                f"result {position} is off by {error:.2g} (2-norm, relative to float64), expected "
                f"at most {LIMITS[dtype]:.2g}"
            )
        worst = max(worst, error)
    return worst


def _several(results: Any) -> Sequence[torch.Tensor]:
    return results if isinstance(results, tuple) else (results,)


def packing_checks(device: torch.device) -> Iterator[Check]:
    """Yield checks of packing: rows of whole 16-byte pieces, and rows that are not."""
    backends = info()["ops"]
    for dtype, width in ((torch.bfloat16, 2048), (torch.bfloat16, 2047), (torch.float32, 1024)):
        for op in (_pack, _merge, _unpack):
            op_name = op.__name__.removeprefix("_")
            backend = next(v for name, v in backends.items() if name.startswith(op_name))
            name = f"{op_name} {str(dtype).removeprefix('torch.')} D={width} {backend}"
            yield Check(name, partial(_packing_error, op, dtype, width, device))


def _packing_error(
    op: Callable[..., tuple[torch.Tensor, ...]],
    dtype: torch.dtype,
    width: int,
    device: torch.device,
) -> float:
    """Return the error of the table's gradient, whose rows are sums; moved rows must be equal."""
    ours = op(Draws(dtype, dtype, device), width, device)
    exact = op(Draws(dtype, torch.float64, "cpu"), width, torch.device("cpu"))
    worst = 0.0
    for position, (result, truth) in enumerate(zip(ours, exact, strict=True)):
        is_sum = op is _pack and position == 1
        difference = (result.cpu().double() - truth).norm().item()
        error = difference / truth.norm().item()
        if not error <= (LIMITS[dtype] if is_sum else 0.0):
            raise ValueError(
                f"result {position} is off by {error:.2g} (2-norm, relative to float64)"
            )
        worst = max(worst, error)
    return worst


def _plan() -> Any:
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for length in (37, 5, 64):
        ids = torch.randint(1, 50, (length,), generator=generator)
        ids[length // 2] = PLACEHOLDER
        prompts.append(ids)
    return plan_packing(prompts, [64, 144, 9], PLACEHOLDER)


def _pack(draws: Draws, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    plan = _plan().to(device)
    table, vision = draws(50, width).requires_grad_(), draws(217, width).requires_grad_()
    packed = pack_embeddings(table, vision, plan)
    return packed.detach(), *torch.autograd.grad(packed, (table, vision), draws(*packed.shape))


def _merge(draws: Draws, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    plan = _plan().to(device)
    rows = draws(plan.num_tokens, width).requires_grad_()
    vision = draws(217, width).requires_grad_()
    merged = merge_vision(rows, vision, plan.vision_rows)
    return merged.detach(), *torch.autograd.grad(merged, (rows, vision), draws(*merged.shape))


def _unpack(draws: Draws, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    plan = _plan().to(device)
    packed = draws(plan.num_tokens, width).requires_grad_()
    vision = unpack_vision(packed, plan)
    return vision.detach(), *torch.autograd.grad(vision, (packed,), draws(*vision.shape))


def run_checks(
    checks: Iterator[Check], journal: Journal, end: float, is_lost: Callable[[], bool]
) -> int:
    """Run the checks that the journal lacks; return the exit status.

    Raises:
        DeviceLost: a kernel ended all use of the GPU by this process.
    """
    if journal.lost:
        journal.add(journal.lost, f"failed: {LOST}", "", "")
    statuses = {row["check"]: row["status"] for row in journal.rows}
    for check in checks:
        if check.name in statuses:
            continue
        if time.monotonic() > end:
            print("time ended: run it again for the rest")
            return UNFINISHED
        start, status, error = time.monotonic(), "ok", math.nan
        with journal.measuring(check.name):
            try:
                error = check.error()
            except Exception as reason:
                status = f"failed: {reason_of(reason)}"
        statuses[check.name] = status
        journal.add(check.name, status, f"{error:.2g}", f"{time.monotonic() - start:.2f}")
        if status != "ok":
            print(f"{check.name}: {status}", flush=True)
            if is_lost():
                raise DeviceLost
    failures = sum(status != "ok" for status in statuses.values())
    print(f"{len(statuses)} checks, {failures} failed")
    return int(failures > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenflex_kernels.smoke", description=__doc__)
    parser.add_argument("--csv", type=output_file, help="where results are kept")
    parser.add_argument("--seconds", type=time_limit, default=math.inf, help="default: no limit")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to run on")
    start = time.monotonic()
    end = start + options.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        journal = Journal(options.csv, COLUMNS, setting_of_gpu())
    except (OSError, ValueError) as error:
        parser.error(f"--csv must be a file that smoke wrote: {error}")
    launches = shipped_launches(architecture(device))
    if not journal.rows:
        for launch, built in build(architecture(device), launches, seconds=0.7 * options.seconds):
            if built.error:
                print(f"{launch} does not compile: {built.error}", flush=True)
        print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)

    def checks() -> Iterator[Check]:
        yield from packing_checks(device)
        yield from stage_checks(launches, device)

    try:
        return run_checks(checks(), journal, end, device_is_lost)
    except DeviceLost:
        if options.csv is None:  # nothing would remember what to leave out
            raise
        print("a kernel ended the use of the GPU: starting again without it", flush=True)
        given = sys.argv[1:] if arguments is None else arguments
        left = str(max(1.0, end - time.monotonic()))
        restart("tokenflex_kernels.smoke", [*given, "--seconds", left])  # the last one counts
        raise AssertionError("execv does not return") from None


if __name__ == "__main__":
    sys.exit(main())
