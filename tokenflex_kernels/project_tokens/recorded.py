"""`project_tokens` on a GPU, as eager calls of a kind that came before compute it.

Both stages are recorded (``call_records``); the last product is PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenflex_kernels.call_records import RecordedStage, needs_grad, record_stage
from tokenflex_kernels.pool_norm.op import record_pooling
from tokenflex_kernels.pool_norm.plan import PoolPlan
from tokenflex_kernels.project_tokens.weights import ProjectorWeights
from tokenflex_kernels.swiglu.stages import launch_gate_up

Kept = tuple[torch.Tensor | None, ...]


class RecordedProjection:
    """Calls of one kind.

    Attributes:
        is_differentiated: whether they record a backward.
    """

    def __init__(
        self,
        pooling: RecordedStage,
        gated_unit: RecordedStage,
        is_differentiated: bool,
        keeps_product: bool,
    ) -> None:
        self._pooling, self._gated_unit = pooling, gated_unit
        self.is_differentiated = is_differentiated
        self._keeps_product = keeps_product

    def __call__(self, x: torch.Tensor, weights: ProjectorWeights) -> tuple[torch.Tensor, Kept]:
        """Return the tokens; and normalised, inverse_std, gate, up and product for backward."""
        norm_weight, norm_bias, gate, gate_bias, up, up_bias, _, _ = weights
        rows = self._pooling(x, norm_weight, norm_bias)
        products = self._gated_unit(rows[0], gate, up, gate_bias, up_bias)
        return self.finish(weights, rows, products)

    def finish(
        self,
        weights: ProjectorWeights,
        rows: tuple[torch.Tensor, ...],
        products: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, Kept]:
        """Return the same from the results of both stages."""
        product = products[0]
        with torch._C._AutoDispatchBelowAutograd():
            out = F.linear(product, weights[6], weights[7])
        if not self.is_differentiated:
            return out, ()
        return out, (*rows[1:], *products[1:], product if self._keeps_product else None)


def record(
    x: torch.Tensor, weights: ProjectorWeights, plan: PoolPlan, mode: str, eps: float, save: str
) -> tuple[torch.Tensor, Kept, RecordedProjection]:
    """Compute the tokens and what is kept, and record the call; its arguments are checked."""
    needs = needs_grad((x, *weights))
    through_gate, trains_down = any(needs[:7]), any(needs[7:8])
    keeps_rows = through_gate or (trains_down and save == "input")
    keeps_gate_up = through_gate and save == "preactivation"
    keeps_product = trains_down and not through_gate and save == "preactivation"
    norm, dtype = (weights.norm_weight, weights.norm_bias), weights.gate_weight.dtype
    rows, pooling = record_pooling((x, *norm), plan, mode, eps, dtype, keeps_rows)
    products, gated_unit = record_stage(
        launch_gate_up, (rows[0], *weights.gated_unit), (True, keeps_gate_up)
    )
    call = RecordedProjection(pooling, gated_unit, bool(needs), keeps_product)
    out, kept = call.finish(weights, rows, products)
    return out, kept, call
