"""The weights of the projector as one tuple."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class ProjectorWeights(NamedTuple):
    """The parameters of the projector's LayerNorm and Linears, in the order of the op's schema."""

    norm_weight: torch.Tensor
    """[C]"""
    norm_bias: torch.Tensor | None
    """[C]"""
    gate_weight: torch.Tensor
    """[H, C]"""
    gate_bias: torch.Tensor | None
    """[H]"""
    up_weight: torch.Tensor
    """[H, C]"""
    up_bias: torch.Tensor | None
    """[H]"""
    down_weight: torch.Tensor
    """[D, H]"""
    down_bias: torch.Tensor | None
    """[D]"""

    @property
    def gated_unit(self) -> tuple[Any, Any, Any, Any]:
        """The arguments of ``swiglu`` after x: both weights, then both biases."""
        return self.gate_weight, self.up_weight, self.gate_bias, self.up_bias
