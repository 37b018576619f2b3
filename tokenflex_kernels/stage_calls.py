"""Every stage as a model calls it: what ``aot`` compiles and ``tune`` times.

Importing this imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from tokenflex_kernels.checks import Grid
from tokenflex_kernels.launch_configs import TileConfig, architecture, launch_config
from tokenflex_kernels.pool_plan import PoolPlan, plan_uniform
from tokenflex_kernels.pooling_tables import pooling_tables
from tokenflex_kernels.triton_kernels import pooling
from tokenflex_kernels.triton_kernels.down_gradient import down_gradient
from tokenflex_kernels.triton_kernels.gate_up import gate_up, gated_product
from tokenflex_kernels.triton_kernels.input_gradient import input_gradient

IN_GRID = (27, 27)  # of SigLIP at 384 px


class Widths(NamedTuple):
    """Of a projector: C, H and D."""

    vision: int
    hidden: int
    text: int


REFERENCE = Widths(1152, 3456, 2048)  # SigLIP, the paper's factor of 3, Qwen2.5-3B
RAGGED = Widths(1104, 3248, 2064)  # multiples of 16, but not of tiles
ODD = Widths(1151, 3453, 2047)  # multiples of nothing: no wide loads, and the library's products

# The variant of a stage, and a function that runs it with a given config.
StageCall = tuple[str, Callable[..., object]]


def rows_of_stage(stage: str, images: int, out_grid: Grid) -> int:
    """The rows by which ``launch_config`` chooses for such a batch."""
    height, width = IN_GRID if stage == "pool_norm_backward" else out_grid
    return images * height * width


def stage_calls(
    stage: str,
    dtype: torch.dtype,
    images: int,
    out_grid: Grid,
    device: torch.device,
    widths: Widths = REFERENCE,
) -> Iterator[StageCall]:
    """The variants of ``stage``, the one that training runs first; each takes ``config=``.

    Args:
        stage: one of ``launch_configs.STAGES``.
        dtype: of rows and weights.
        images: each of 27 x 27 patches.
        out_grid: what each is pooled to.
        device: "meta" to compile only; elsewhere the tensors hold normal random numbers.
        widths: of the projector.
    """

    def rows(*shape: int, scale: float = 1.0) -> torch.Tensor:
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device) * scale

    if stage.startswith(("pool_norm", "norm", "scale")):
        plan = plan_uniform(images, IN_GRID, out_grid)
        yield from _row_stages(stage, dtype, plan, widths.vision, device, rows)
    else:
        yield from _tile_stages(stage, images * out_grid[0] * out_grid[1], widths, rows)


def _row_stages(
    stage: str,
    dtype: torch.dtype,
    plan: PoolPlan,
    width: int,
    device: torch.device,
    rows: Callable[..., torch.Tensor],
) -> Iterator[StageCall]:
    weight = rows(width)
    cells = rows(plan.num_cells, width)
    inverse_std = rows(len(cells)).float().abs()
    if stage == "norm_gradient":
        yield "", partial(pooling.norm_gradient, cells, cells, grad_weight=True, grad_bias=True)
        return
    if stage == "scale_shift":
        yield "", partial(pooling.scale_shift, cells, weight, weight)
        return
    for mode in ("adaptive", "resize"):
        assert plan.grids is not None
        tables = pooling_tables(plan.grids, mode, device)
        if stage == "pool_norm_forward":
            x = rows(plan.num_patches, width)
            forward = partial(pooling.pool_norm_forward, tables=tables, eps=1e-5, dtype=dtype)
            yield f"{mode} norm save", partial(forward, x, weight, weight, save=True)
            yield f"{mode} norm", partial(forward, x, weight, weight, save=False)
            yield f"{mode}", partial(forward, x, None, None, save=False)
        elif stage == "pool_norm_backward":
            backward = partial(pooling.pool_norm_backward, tables=tables, dtype=dtype)
            for wanted in (True, False):
                yield (
                    f"{mode} norm{' weight' * wanted}",
                    partial(
                        backward,
                        *(cells, cells, inverse_std, weight),
                        grad_weight=wanted,
                        grad_bias=wanted,
                    ),
                )
            no_norm = (cells, cells[:0], inverse_std[:0], None)
            yield f"{mode}", partial(backward, *no_norm, grad_weight=False, grad_bias=False)


def _tile_stages(
    stage: str, tokens: int, widths: Widths, rows: Callable[..., torch.Tensor]
) -> Iterator[StageCall]:
    weight = rows(widths.hidden, widths.vision, scale=widths.vision**-0.5)
    hidden = rows(tokens, widths.hidden)
    pointwise = launch_config("pointwise", tokens, hidden.dtype, architecture(hidden.device))
    assert isinstance(pointwise, TileConfig)
    outputs = ((True, True), (False, True), (False, False))  # the product, sums for the biases
    if stage == "gate_up":
        x, bias = rows(tokens, widths.vision), rows(widths.hidden)
        forward = partial(gate_up, x, weight, weight, pointwise=pointwise)
        for product, save in ((True, True), (True, False), (False, True)):
            yield (
                " ".join(["bias"] + ["product"] * product + ["save"] * save),
                partial(forward, bias, bias, product=product, save=save),
            )
        yield "product", partial(forward, None, None, product=True, save=False)
    elif stage == "down_gradient":
        dy = rows(tokens, widths.text)
        down_weight = rows(widths.text, widths.hidden, scale=widths.hidden**-0.5)
        for product, sums in outputs:
            yield (
                " ".join(["product"] * product + ["bias"] * sums),
                partial(
                    down_gradient,
                    *(dy, down_weight, hidden, hidden),
                    product=product,
                    bias=sums,
                    pointwise=pointwise,
                ),
            )
    elif stage == "input_gradient":
        yield "", partial(input_gradient, rows(tokens, 2 * widths.hidden), weight, weight)
    elif stage == "pointwise":
        yield "product", partial(gated_product, hidden, hidden)
        for product, sums in outputs:
            yield (
                " ".join(["gradients"] + ["product"] * product + ["bias"] * sums),
                _gate_gradient(hidden, product=product, bias=sums),
            )


def _gate_gradient(hidden: torch.Tensor, **wanted: bool) -> Callable[..., object]:
    def call(config: Any) -> object:
        return down_gradient(hidden, None, hidden, hidden, **wanted, config=None, pointwise=config)

    return call
