"""The gated unit in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activation(gate: torch.Tensor) -> torch.Tensor:
    """Return SiLU of ``gate``; the kernels and csrc/activation.h have the same function."""
    return F.silu(gate)


def swiglu(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`tokenflex_kernels.swiglu`. The product is rounded once, after the activation."""
    gate = F.linear(x, gate_weight, gate_bias)
    up = F.linear(x, up_weight, up_bias)
    compute_dtype = torch.promote_types(gate.dtype, torch.float32)
    return (activation(gate.to(compute_dtype)) * up.to(compute_dtype)).to(gate.dtype)
