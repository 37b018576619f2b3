"""The down projection into the packed buffer on host memory, as eager calls compute it."""

from __future__ import annotations

import torch

from tokenflex_kernels.backend import compiled_extension
from tokenflex_kernels.packing.ops import on_host
from tokenflex_kernels.packing.plan import PackPlan
from tokenflex_kernels.swiglu.native import linear, linear_into

DIRECT_BYTES = 2**18  # of vision rows; to move fewer, in the cache, takes less time than a call


def packed_down_at_once(
    product: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor,
    plan: PackPlan,
) -> torch.Tensor | None:
    """Return the packed rows, [total, D]; None where the table or the plan is not ordinary.

    ``plan`` shows each image once. To be called below autograd.
    """
    if plan.bounds is None:
        return None
    num_vision, table_rows, num_rows = plan.bounds
    row_bytes = weight.shape[0] * weight.element_size()
    if plan.vision_start < 0 or num_vision * row_bytes < DIRECT_BYTES:
        tokens = linear(product, weight, bias)
        return on_host(embedding, tokens, plan.source, False, num_vision, table_rows)
    packed = product.new_empty(num_rows, weight.shape[0])
    is_written = compiled_extension().write_text(
        *(packed, embedding, plan.source, num_vision, table_rows, torch.get_num_threads())
    )
    if not is_written:
        return None
    linear_into(packed.narrow(0, plan.vision_start, num_vision), product, weight, bias)
    return packed
