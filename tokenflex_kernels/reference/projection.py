"""The whole projector in plain PyTorch: the other references in a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenflex_kernels.library import is_transformed
from tokenflex_kernels.pool_plan import PoolPlan
from tokenflex_kernels.reference.gated_unit import swiglu
from tokenflex_kernels.reference.pooling import pool_norm


def project_tokens(
    x: torch.Tensor,
    plan: PoolPlan,
    *,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    mode: str,
    eps: float,
    save: str,
) -> torch.Tensor:
    """See :func:`tokenflex_kernels.project_tokens`."""
    tokens = pool_norm(x, plan, mode=mode, weight=norm_weight, bias=norm_bias, eps=eps)
    weights = (gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    if save == "input" and not is_transformed():  # torch.func has no checkpoints
        # Recompute gate and up in backward; nothing here draws random numbers.
        return checkpoint(
            _feed_forward, tokens, *weights, use_reentrant=False, preserve_rng_state=False
        )
    return _feed_forward(tokens, *weights)


def _feed_forward(
    tokens: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> torch.Tensor:
    product = swiglu(tokens, gate_weight, up_weight, gate_bias, up_bias)
    return F.linear(product, down_weight, down_bias)
