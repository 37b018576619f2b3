"""`swiglu`: the gated unit, two matrix products and their gate in one op.

out = silu(x Wg^T + bg) * (x Wu^T + bu)            x: [T, C], Wg and Wu: [H, C] -> [T, H]
"""

from __future__ import annotations

import torch

from tokenflex_kernels import _projector_ops as ops
from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.checks import (
    autocast_enabled,
    check_float,
    check_like,
    check_shape,
    check_tensor,
    match_weight,
)
from tokenflex_kernels.reference import gated_unit as reference


def swiglu(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(x Wg^T + bg) * (x Wu^T + bu); the weights are those of two plain Linears.

    The kernels have first derivatives only; the reference has all.

    Args:
        x: float [T, C].
        gate_weight: float [H, C], the branch that SiLU is applied to.
        up_weight: float [H, C].
        gate_bias: float [H] or None.
        up_bias: float [H] or None.

    Returns:
        [T, H] in the dtype that two Linears would give: that of ``x``, or autocast's.

    Raises:
        TypeError: an argument is not a tensor or of a dtype that does not go with ``x``.
        ValueError: shapes or devices do not fit together.
    """
    check_tensor("x", x, ndim=2)
    check_float("x", x)
    gate_weight, up_weight, gate_bias, up_bias = check_gated_unit(
        x, gate_weight, up_weight, gate_bias, up_bias
    )
    beyond = "float64" if x.dtype == torch.float64 else None
    if select_backend("swiglu", x.device, beyond_triton=beyond) == "triton":
        return ops.swiglu(*in_autocast_dtype(x, gate_weight, up_weight, gate_bias, up_bias))
    return reference.swiglu(x, gate_weight, up_weight, gate_bias, up_bias)


def in_autocast_dtype(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The first tensor and all others in the dtype that autocast gives a Linear, if it is on."""
    device = tensors[0].device if tensors[0] is not None else torch.device("cpu")
    if not autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def check_gated_unit(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The four parameters, checked against ``x`` [T, C] and in the dtype the products need."""
    check_tensor("gate_weight", gate_weight, ndim=2)
    hidden_width = gate_weight.shape[0]
    return (
        check_linear_weight("gate_weight", gate_weight, x, (hidden_width, x.shape[1]), "[H, C]"),
        check_linear_weight("up_weight", up_weight, x, (hidden_width, x.shape[1]), "[H, C]"),
        check_linear_bias("gate_bias", gate_bias, x, hidden_width, "[H]"),
        check_linear_bias("up_bias", up_bias, x, hidden_width, "[H]"),
    )


def check_linear_weight(
    name: str, weight: torch.Tensor, x: torch.Tensor, shape: tuple[int, int], meaning: str
) -> torch.Tensor:
    """A Linear's weight of the given shape, on the device of ``x``, in a dtype that fits it."""
    check_tensor(name, weight, ndim=2)
    check_shape(name, weight, shape, meaning)
    check_like(name, weight, "x", x)
    return match_weight(name, weight, x)


def check_linear_bias(
    name: str, bias: torch.Tensor | None, x: torch.Tensor, width: int, meaning: str
) -> torch.Tensor | None:
    """A Linear's bias of the given width, likewise; None stays None."""
    if bias is None:
        return None
    check_tensor(name, bias)
    check_shape(name, bias, (width,), meaning)
    check_like(name, bias, "x", x)
    return match_weight(name, bias, x)
