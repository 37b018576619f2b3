"""The projector on a GPU, as eager calls of a kind that came before compute it.

Its first two stages are recorded (``call_records``) and repeated as one where both can be. The down
projection is left to the op.
"""

from __future__ import annotations

import torch

from tokenflex_kernels.call_records import (
    RecordedStage,
    Tensors,
    chain_launches,
    record_stage,
)
from tokenflex_kernels.pool_norm.op import record_pooling
from tokenflex_kernels.pool_norm.plan import PoolPlan
from tokenflex_kernels.project_tokens.weights import ProjectorWeights
from tokenflex_kernels.swiglu.stages import launch_gate_up

Kept = tuple[torch.Tensor | None, ...]

# The tensors of both stages, as places among x and the weights, followed by the results of the
# first stage.
_NUM_TENSORS = 9
_POOLING, _GATED_UNIT = (0, 1, 2), (_NUM_TENSORS, 3, 5, 4, 6)


class RecordedProduct:
    """The input of the down projection for calls of one kind.

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
        stages = (pooling, _POOLING), (gated_unit, _GATED_UNIT)
        self._launches = chain_launches(stages, _NUM_TENSORS)

    def repeat(self, tensors: Tensors) -> tuple[torch.Tensor, Kept]:
        """Return the product, [T, H]; and normalised, inverse_std, gate, up and product to keep.

        ``tensors`` are x and the weights.
        """
        if self._launches is not None:
            results = self._launches.repeat(tensors)
            if results is not None:
                if not self.is_differentiated:
                    return results[3], ()
                return self.results(results[:3], results[3:])
        gate, gate_bias, up, up_bias = tensors[3:7]
        rows = self._pooling.repeat(tensors[:3])
        products = self._gated_unit.repeat((rows[0], gate, up, gate_bias, up_bias))
        return self.results(rows, products)

    def results(
        self, rows: tuple[torch.Tensor, ...], products: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, Kept]:
        """Return the same from the results of both stages."""
        product = products[0]
        if not self.is_differentiated:
            return product, ()
        return product, (*rows[1:], *products[1:], product if self._keeps_product else None)


def record(
    x: torch.Tensor,
    weights: ProjectorWeights,
    plan: PoolPlan,
    mode: str,
    eps: float,
    save: str,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor, Kept, RecordedProduct]:
    """Compute the product and what is kept, and record the call; its arguments are checked.

    ``needs`` has the tensors that the call is differentiated by: x, the weights, and others.
    """
    through_gate, trains_down = any(needs[:7]), any(needs[7:8])
    keeps_rows = through_gate or (trains_down and save == "input")
    keeps_gate_up = through_gate and save == "preactivation"
    keeps_product = trains_down and not through_gate and save == "preactivation"
    norm, dtype = (weights.norm_weight, weights.norm_bias), weights.gate_weight.dtype
    rows, pooling = record_pooling((x, *norm), plan, mode, eps, dtype, keeps_rows)
    products, gated_unit = record_stage(
        launch_gate_up, (rows[0], *weights.gated_unit), (True, keeps_gate_up)
    )
    call = RecordedProduct(pooling, gated_unit, bool(needs), keeps_product)
    product, kept = call.results(rows, products)
    return product, kept, call
