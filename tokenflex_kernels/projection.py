"""`project_tokens`: the token-adaptive projector as one differentiable op.

    tokens = LayerNorm(pool(x))                                   [sum h*w, C]
    out = (silu(tokens Wg^T + bg) * (tokens Wu^T + bu)) Wd^T + bd     [sum h*w, D]

Source: TokenFLEX, arXiv 2504.03154; the projector of the released LiAutoAD/Ristretto-3B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenflex_kernels import _projector_ops as ops
from tokenflex_kernels.axis_weights import check_mode
from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.checks import Grid, check_eps, check_tensor
from tokenflex_kernels.gated_unit import (
    check_gated_unit,
    check_linear_bias,
    check_linear_weight,
    in_autocast_dtype,
)
from tokenflex_kernels.pool_plan import PoolPlan, grids_of
from tokenflex_kernels.pooling import beyond_triton, check_norm, check_plan
from tokenflex_kernels.reference import projection as reference

SAVE_CHOICES = ("preactivation", "input")


def project_tokens(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None = None,
    *,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    mode: str = "adaptive",
    eps: float = 1e-5,
    save: str = "preactivation",
) -> torch.Tensor:
    """Pool, normalise and project patches into vision tokens, each image to its own grid.

    The kernels have first derivatives only; the reference has all.

    Args:
        x: float [sum of H*W, C], the images' patches one image after another, row-major.
        in_grids: one (H, W) per image, host ints; or the batch's :func:`plan_pooling`.
        out_grids: one (h, w) per image, host ints: image i becomes h*w tokens; nothing beside a
            plan.
        norm_weight: float [C].
        norm_bias: float [C] or None.
        gate_weight: float [H, C].
        gate_bias: float [H] or None.
        up_weight: float [H, C].
        up_bias: float [H] or None.
        down_weight: float [D, H].
        down_bias: float [D] or None.
        mode: "adaptive" or "resize", see :func:`tokenflex_kernels.pool_norm`.
        eps: of the LayerNorm.
        save: what training keeps for backward: "preactivation" keeps gate and up, "input" keeps
            the pooled rows and computes gate and up again (one more matrix product, less memory).

    Returns:
        [sum of h*w, D] in the dtype that the last Linear would give: that of ``x``, or autocast's.

    Raises:
        TypeError: an argument is not a tensor or of a dtype that does not go with ``x``.
        ValueError: shapes, devices, grids, ``mode`` or ``save`` do not fit together.
    """
    plan = check_plan(x, in_grids, out_grids)
    mode = check_mode(mode)
    eps = check_eps(eps)
    check_save(save)
    check_tensor("norm_weight", norm_weight)
    check_norm(x, norm_weight, norm_bias, prefix="norm_")
    gate_weight, up_weight, gate_bias, up_bias = check_gated_unit(
        x, gate_weight, up_weight, gate_bias, up_bias
    )
    check_tensor("down_weight", down_weight, ndim=2)
    text_width, hidden_width = down_weight.shape[0], gate_weight.shape[0]
    down_weight = check_linear_weight(
        "down_weight", down_weight, x, (text_width, hidden_width), "[D, H]"
    )
    down_bias = check_linear_bias("down_bias", down_bias, x, text_width, "[D]")
    if select_backend("project_tokens", x.device, beyond_triton=beyond_triton(x)) == "triton":
        return ops.project_tokens(
            x,
            norm_weight,
            norm_bias,
            *in_autocast_dtype(gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias),
            grids_of(plan),
            plan.num_cells,
            mode,
            eps,
            save,
        )
    return reference.project_tokens(
        x,
        plan,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        up_weight=up_weight,
        up_bias=up_bias,
        down_weight=down_weight,
        down_bias=down_bias,
        mode=mode,
        eps=eps,
        save=save,
    )


def check_save(save: object) -> str:
    """``save`` itself, once it is known to be one of ``SAVE_CHOICES``."""
    if save not in SAVE_CHOICES:
        raise ValueError(f"save must be one of {', '.join(SAVE_CHOICES)}, got {save!r}")
    return str(save)
