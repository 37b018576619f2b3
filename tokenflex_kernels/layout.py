"""What all kernels, of Triton and of the extension, ask of a tensor's layout."""

from __future__ import annotations

import torch


def neighbours(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the elements of its last dimension next to each other, a copy if need be.

    Rows may lie at any distance.
    """
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
