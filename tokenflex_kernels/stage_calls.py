"""Every stage as a model calls it: what ``aot`` compiles and ``tune`` times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from tokenflex_kernels.checks import Grid
from tokenflex_kernels.launch_configs import Config, overriding
from tokenflex_kernels.pool_norm import native
from tokenflex_kernels.pool_norm.axis_weights import MODES
from tokenflex_kernels.pool_norm.native import sum_dtype
from tokenflex_kernels.pool_norm.plan import grids_of, plan_uniform
from tokenflex_kernels.pool_norm.stages import (
    launch_norm_gradient,
    launch_pool_norm_forward,
    launch_scale_shift,
    launch_unpool,
)
from tokenflex_kernels.project_and_pack.stages import launch_packed_down
from tokenflex_kernels.swiglu.stages import (
    gated_product,
    launch_down_gradient,
    launch_gate_up,
    launch_input_gradient,
)

IN_GRID = (27, 27)  # of SigLIP at 384 px
# Variants of down_gradient: whether it makes the product, and sums for the biases.
GRADIENTS = {"product bias": (True, True), "bias": (False, True), "": (False, False)}

# The name of a variant of a stage, and a function that runs it.
Variant = tuple[str, Callable[..., Any]]


class Widths(NamedTuple):
    """Widths of a projector: C, H and D."""

    vision: int
    hidden: int
    text: int


REFERENCE = Widths(1152, 3456, 2048)  # SigLIP, the paper's factor of 3, Qwen2.5-3B
RAGGED = Widths(1104, 3248, 2064)  # multiples of 16, but not of tiles
ODD = Widths(1151, 3453, 2047)  # multiples of nothing: no wide loads, and the library's products


def rows_of_stage(stage: str, images: int, out_grid: Grid) -> int:
    """Return the rows by which ``launch_config`` chooses for such a batch."""
    height, width = IN_GRID if stage == "pool_norm_backward" else out_grid
    return images * height * width


def stage_calls(
    stage: str,
    dtype: torch.dtype,
    images: int,
    out_grid: Grid,
    device: torch.device,
    widths: Widths = REFERENCE,
    draw: Callable[..., torch.Tensor] | None = None,
) -> Iterator[Variant]:
    """Yield the variants of ``stage``, the one that training runs first; each takes ``config=``.

    Args:
        stage: one of ``launch_configs.STAGES``.
        dtype: of rows and weights.
        images: each of 27 x 27 patches.
        out_grid: the grid that each is pooled to.
        device: "meta" to compile only; elsewhere the tensors hold normal random numbers.
        widths: of the projector.
        draw: makes a tensor from its sizes and ``scale``, the factor of its numbers, instead.
    """

    def rows(*shape: int, scale: float = 1.0) -> torch.Tensor:
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device) * scale

    make = draw or rows
    if stage in ("pool_norm_forward", "pool_norm_backward", "norm_gradient", "scale_shift"):
        variants = _row_stages(stage, images, out_grid, widths.vision, dtype, make)
    else:
        variants = _tile_stages(stage, images * out_grid[0] * out_grid[1], widths, make)
    for name, run in variants:
        yield name, partial(_with_config, stage, run)


def _with_config(stage: str, run: Callable[[], Any], config: Config | None) -> Any:
    with overriding(**{stage: config}):
        return run()


def _row_stages(
    stage: str,
    images: int,
    out_grid: Grid,
    width: int,
    dtype: torch.dtype,
    rows: Callable[..., torch.Tensor],
) -> Iterator[Variant]:
    plan = plan_uniform(images, IN_GRID, out_grid)
    weight, cells = rows(width), rows(plan.num_cells, width)
    inverse_std = rows(plan.num_cells).to(sum_dtype(dtype)).abs()
    patches, grids = plan.num_patches, grids_of(plan)
    means, _, _ = native.norm_gradient(cells, cells, weight, True, False, False)
    with_norm = cells, cells, inverse_std, means, weight
    without_norm = cells, cells[:0], inverse_std[:0], means[:0], None

    if stage == "norm_gradient":
        reduce = partial(launch_norm_gradient, cells, cells, weight)
        yield "means weight bias", partial(reduce, True, True, True)
        yield "means", partial(reduce, True, False, False)
        yield "weight bias", partial(reduce, False, True, True)
    elif stage == "scale_shift":
        yield "", partial(launch_scale_shift, cells, weight, weight)
    elif stage == "pool_norm_backward":
        for mode in MODES:
            result = grids, patches, mode, dtype
            yield f"{mode} norm", partial(launch_unpool, *with_norm, *result)
            yield mode, partial(launch_unpool, *without_norm, *result)
    else:
        x = rows(patches, width)
        for mode in MODES:
            batch = grids, plan.num_cells, mode, 1e-5, dtype
            yield (
                f"{mode} norm save",
                partial(launch_pool_norm_forward, x, weight, weight, *batch, True),
            )
            yield (
                f"{mode} norm",
                partial(launch_pool_norm_forward, x, weight, weight, *batch, False),
            )
            yield mode, partial(launch_pool_norm_forward, x, None, None, *batch, False)


def _tile_stages(
    stage: str, tokens: int, widths: Widths, rows: Callable[..., torch.Tensor]
) -> Iterator[Variant]:
    weights = rows(2, widths.hidden, widths.vision, scale=widths.vision**-0.5)
    gate_weight, up_weight = weights.unbind()
    hidden = rows(tokens, widths.hidden)
    if stage == "gate_up":
        x, bias = rows(tokens, widths.vision), rows(widths.hidden)
        forward = partial(launch_gate_up, x, gate_weight, up_weight)
        yield "bias product save", partial(forward, bias, bias, True, True)
        yield "bias product", partial(forward, bias, bias, True, False)
        yield "bias save", partial(forward, bias, bias, False, True)
        yield "product", partial(forward, None, None, True, False)
    elif stage == "input_gradient":
        grads = rows(tokens, 2 * widths.hidden)
        yield "", partial(launch_input_gradient, grads, gate_weight, up_weight)
    elif stage == "down_gradient":
        down_weight = rows(widths.text, widths.hidden, scale=widths.hidden**-0.5)
        dy = rows(tokens, widths.text)
        for name, flags in GRADIENTS.items():
            yield name, partial(launch_down_gradient, dy, down_weight, hidden, hidden, *flags)
    elif stage == "packed_down":
        down_weight = rows(widths.text, widths.hidden, scale=widths.hidden**-0.5)
        # A batch without text: text rows take as long in all variants.
        place = torch.arange(tokens, dtype=torch.int32, device=hidden.device)
        row = rows(1, widths.text), ~place, place, -1
        yield "bias", partial(launch_packed_down, hidden, down_weight, rows(widths.text), *row)
        yield "", partial(launch_packed_down, hidden, down_weight, None, *row)
    else:  # pointwise: the rest of a stage whose product is the library's
        yield "product", partial(gated_product, hidden, hidden)
        for name, flags in GRADIENTS.items():
            gradients = partial(launch_down_gradient, hidden, None, hidden, hidden, *flags)
            yield f"gradients {name}".rstrip(), gradients
