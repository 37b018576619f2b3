"""GELU by its tanh formula on host memory, several times as fast as PyTorch's on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tokenflex_kernels.backend import compiled_extension


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return ``torch.nn.functional.gelu(x, approximate="tanh")``, differentiable once.

    Args:
        x: float, of any shape, on the CPU.

    Raises:
        RuntimeError: the extension is not built.
    """
    out: torch.Tensor = _Gelu.apply(x)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        compiled_extension().gelu(x.data_ptr(), out.data_ptr(), *_options(x))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        compiled_extension().gelu_gradient(
            x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), *_options(x)
        )
        return grad_x


def _options(x: torch.Tensor) -> tuple[int, str, int]:
    return x.numel(), str(x.dtype).removeprefix("torch."), torch.get_num_threads()
