"""The whole projector in plain PyTorch: the other references in a row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenflex_kernels.library import is_transformed
from tokenflex_kernels.pool_norm.plan import PoolPlan
from tokenflex_kernels.pool_norm.reference import pool_norm
from tokenflex_kernels.project_tokens.weights import ProjectorWeights
from tokenflex_kernels.swiglu.reference import swiglu


def project_tokens(
    x: torch.Tensor, plan: PoolPlan, weights: ProjectorWeights, *, mode: str, eps: float, save: str
) -> torch.Tensor:
    """See :func:`tokenflex_kernels.project_tokens`."""
    tokens = pool_norm(
        x, plan, mode=mode, weight=weights.norm_weight, bias=weights.norm_bias, eps=eps
    )
    feed_forward = *weights.gated_unit, weights.down_weight, weights.down_bias
    if save == "input" and not is_transformed():  # torch.func has no checkpoints
        # Recompute gate and up in backward; nothing here draws random numbers.
        return checkpoint(
            _feed_forward, tokens, *feed_forward, use_reentrant=False, preserve_rng_state=False
        )
    return _feed_forward(tokens, *feed_forward)


def _feed_forward(tokens: torch.Tensor, *weights: Any) -> torch.Tensor:
    *gated_unit, down_weight, down_bias = weights
    return F.linear(swiglu(tokens, *gated_unit), down_weight, down_bias)
