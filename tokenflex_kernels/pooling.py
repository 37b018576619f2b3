"""`pool_norm`: pool patch grids to any other grids and normalise, a mixed batch in one call.

Maths, per image and with one small map per axis (see ``axis_weights``):

    pooled = P_h X P_w^T                  X: [H, W, C] patches -> [h, w, C] cells
    out = (pooled - mean) / sqrt(var + eps) * weight + bias          over C, if weight is given
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenflex_kernels import _projector_ops as ops
from tokenflex_kernels.axis_weights import check_mode
from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.checks import (
    Grid,
    check_eps,
    check_float,
    check_like,
    check_shape,
    check_tensor,
)
from tokenflex_kernels.pool_plan import PoolPlan, grids_of, plan_pooling
from tokenflex_kernels.reference import pooling as reference

MAX_WIDTH = 8192  # a program of the kernels holds whole rows in registers


def pool_norm(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None = None,
    *,
    mode: str = "adaptive",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Pool each image's patch grid to its own output grid, then LayerNorm if ``weight`` is given.

    Images may differ in both grids. Pooling and normalisation are computed in float32 (float64
    for float64 inputs) and rounded once, to the dtype of ``x``. The kernels have first derivatives
    only; the reference has all. A NaN or infinite patch spoils the cells whose window holds it.

    Args:
        x: float [sum of H*W, C], the images' patches one image after another, row-major.
        in_grids: one (H, W) per image, host ints; or the batch's :func:`plan_pooling`.
        out_grids: one (h, w) per image, host ints; nothing beside a plan.
        mode: "adaptive" is PyTorch's adaptive average pooling (the paper, arXiv 2504.03154);
            "resize" is the released model's: bilinear with aligned corners to the next multiple,
            then average.
        weight: LayerNorm scale, float [C]; None skips the normalisation.
        bias: LayerNorm shift, float [C]; needs ``weight``.
        eps: added to the variance.

    Returns:
        [sum of h*w, C] in the dtype of ``x``, one image after another, row-major.

    Raises:
        TypeError: an argument is not a tensor, not of a float dtype, or not (height, width) pairs.
        ValueError: shapes, devices, grids or ``mode`` do not fit together.
    """
    plan = check_plan(x, in_grids, out_grids)
    mode = check_mode(mode)
    eps = check_eps(eps)
    check_norm(x, weight, bias, prefix="")
    if select_backend("pool_norm", x.device, beyond_triton=beyond_triton(x)) == "triton":
        return ops.pool_norm(x, weight, bias, grids_of(plan), plan.num_cells, mode, eps)
    return reference.pool_norm(x, plan, mode=mode, weight=weight, bias=bias, eps=eps)


def beyond_triton(x: torch.Tensor) -> str | None:
    """What about ``x`` the kernels are not made for, None if nothing."""
    if x.dtype == torch.float64:
        return "float64"
    if x.shape[1] > MAX_WIDTH:
        return f"rows of more than {MAX_WIDTH} features"
    return None


def check_plan(
    x: torch.Tensor, in_grids: Sequence[Grid] | PoolPlan, out_grids: Sequence[Grid] | None
) -> PoolPlan:
    """``x`` checked, and the plan of the batch: made of both lists, or given; it fits ``x``."""
    check_tensor("x", x, ndim=2)
    check_float("x", x)
    if isinstance(in_grids, PoolPlan):
        if out_grids is not None:
            raise TypeError(
                "out_grids must not be given beside a PoolPlan, which has them, got "
                f"{type(out_grids).__name__}"
            )
        plan = in_grids
    elif out_grids is None:
        raise TypeError(
            "out_grids must be a sequence of (height, width) pairs where in_grids is not a "
            "PoolPlan, got NoneType"
        )
    else:
        plan = plan_pooling(in_grids, out_grids)
    if x.shape[0] != plan.num_patches:
        raise ValueError(
            f"x must have one row per patch: in_grids of {plan.num_images} images hold "
            f"{plan.num_patches} patches, but x has {x.shape[0]} rows"
        )
    return plan


def check_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, prefix: str
) -> None:
    """Check LayerNorm's parameters against the width of ``x``."""
    if weight is None and bias is not None:
        raise ValueError(f"{prefix}bias needs {prefix}weight: got a bias and no weight")
    for name, parameter in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if parameter is not None:
            check_tensor(name, parameter)
            check_float(name, parameter)
            check_shape(name, parameter, (x.shape[1],), "[C]")
            check_like(name, parameter, "x", x)
