"""`project_tokens` on host memory, as eager calls of ordinary tensors compute it: without ops.

The extension checks the tensors, and allocates what it computes. The matrix products are PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tokenflex_kernels.backend import compiled_extension
from tokenflex_kernels.pool_norm.native import HostTables, gradients_at_once, pool_norm_at_once
from tokenflex_kernels.pool_norm.plan import PoolPlan
from tokenflex_kernels.project_tokens.weights import ProjectorWeights
from tokenflex_kernels.swiglu.native import (
    gate_gradients_at_once,
    gate_up_at_once,
    input_gradient,
    linear,
    transposed_product,
    weight_gradients_at_once,
)


class Batch(NamedTuple):
    """The arguments of a call beside its tensors."""

    plan: PoolPlan
    tables: HostTables
    mode: str
    eps: float
    save: str


class Kept(NamedTuple):
    """The tensors that backward reads beside the weights; None where no gradient needs one."""

    normalised: torch.Tensor | None = None
    inverse_std: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    up: torch.Tensor | None = None
    product: torch.Tensor | None = None


def fit(x: torch.Tensor, weights: ProjectorWeights) -> bool:
    """Return whether the tensors of the Linears are ordinary, of one dtype, and fit together."""
    fits: bool = compiled_extension().fit_tensors(x, *weights[2:])
    return fits


def gated_product(
    x: torch.Tensor, weights: ProjectorWeights, batch: Batch, records: bool
) -> tuple[torch.Tensor, Kept] | None:
    """Return the input of the down projection, [T, H], and the tensors that backward needs.

    None where x or the norm's parameters do not fit. To be called below autograd.
    """
    through_gate = keep_rows = keep_gate_up = keep_product = False
    if records:
        through_gate = torch._C._any_requires_grad(x, *weights[:6])
        trains_down, whole = weights.down_weight.requires_grad, batch.save == "preactivation"
        keep_rows = through_gate or (trains_down and not whole)
        keep_gate_up = through_gate and whole
        keep_product = trains_down and not through_gate and whole
    norm = weights.norm_weight, weights.norm_bias, batch.eps
    rows = pool_norm_at_once(x, *norm, batch.tables, batch.plan.num_cells, keep_rows)
    if rows is None:
        return None
    tokens, normalised, inverse_std = rows if keep_rows else (rows, None, None)
    product, gate, up = gate_up_at_once(tokens, *weights.gated_unit, save=keep_gate_up)
    return product, Kept(normalised, inverse_std, gate, up, product if keep_product else None)


def forward(
    x: torch.Tensor, weights: ProjectorWeights, batch: Batch, records: bool
) -> tuple[torch.Tensor, Kept] | None:
    """Return the tokens and what is kept; None where x or the norm's parameters do not fit."""
    with torch._C._AutoDispatchBelowAutograd():
        results = gated_product(x, weights, batch, records)
        if results is None:
            return None
        product, kept = results
        return linear(product, weights.down_weight, weights.down_bias), kept


def backward(
    grad: torch.Tensor,
    kept: Kept,
    weights: ProjectorWeights,
    tables: HostTables,
    needs_input_grad: tuple[bool, ...],
) -> list[torch.Tensor | None] | None:
    """Return the gradients of x and the weights; None where ``grad`` is not ordinary."""
    needs_x, *needs_norm = needs_input_grad[:3]
    needs: Any = ProjectorWeights(*needs_input_grad[1:9])  # type: ignore[arg-type]
    through_gate = any(needs_input_grad[:7])
    gate, up, product = kept.gate, kept.up, kept.product
    recompute = gate is None and product is None and (through_gate or needs.down_weight)

    tokens: Any = None
    if needs.gate_weight or needs.up_weight or recompute:
        tokens = compiled_extension().scale_shift_tensors(
            kept.normalised, weights.norm_weight, weights.norm_bias, torch.get_num_threads()
        )
        if tokens is None:  # a hook of saved tensors gave other strides back
            return None
    if recompute:
        recomputed, gate, up = gate_up_at_once(tokens, *weights.gated_unit, save=through_gate)
        product = None if through_gate else recomputed

    results: list[torch.Tensor | None] = [None] * 9
    if through_gate and gate is not None and up is not None:
        gradients = gate_gradients_at_once(
            grad @ weights.down_weight,
            gate,
            up,
            product=needs.down_weight,
            sums=needs.gate_bias or needs.up_bias,
        )
        if gradients is None:
            return None
        grads, product, sums = gradients
        # The order of the gated unit is both weights, both biases.
        results[3], results[5], results[4], results[6] = weight_gradients_at_once(
            grads, sums, tokens, needs.gated_unit
        )
        if any(needs_input_grad[:3]):
            d_inputs = gradients_at_once(
                input_gradient(grads, weights.gate_weight, weights.up_weight),
                *(kept.normalised, kept.inverse_std, weights.norm_weight, tables),
                (needs_x, *needs_norm),  # type: ignore[arg-type]
            )
            if d_inputs is None:
                return None
            results[:3] = d_inputs
    if needs.down_weight and product is not None:
        results[7] = transposed_product(grad, product)
    if needs.down_bias:
        results[8] = grad.sum(0)
    return results
