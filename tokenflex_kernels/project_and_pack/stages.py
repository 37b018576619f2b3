"""The stage of `project_and_pack` that is its own: the down projection into the packed buffer."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.launch import (
    can_describe,
    launch,
    num_tiles,
    product_options,
    takes,
    tileable,
)
from tokenflex_kernels.launch import source as tiles_of
from tokenflex_kernels.launch_configs import TileConfig, config_for
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.library import define_stage
from tokenflex_kernels.packing import ops
from tokenflex_kernels.swiglu.native import linear_into
from tokenflex_kernels.swiglu.stages import beyond_triton, linear


@cache
def _kernels() -> ModuleType:
    """Import the kernel with the first launch, because that imports Triton."""
    from tokenflex_kernels.project_and_pack import kernels

    return kernels


def _is_native(x: torch.Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    backend = select_backend("project_and_pack", "cpu", beyond_triton=beyond_triton(x))
    return backend != "triton"


def launch_packed_down(
    product: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    embedding: torch.Tensor,
    source: torch.Tensor,
    vision_rows: torch.Tensor,
    vision_start: int,
) -> torch.Tensor:
    """Project the vision tokens to their rows of the packed buffer, and write the text rows.

    Vision rows that follow one another, as those of one image do, are a matrix of their own inside
    of the buffer, and PyTorch's product writes to it. Other rows are the kernel's, or, where the
    table of configs says so, those of a product and a packing. On the CPU that is always so: a
    product for each run of rows would read the weights as often.

    Args:
        product: [T, H], any strides.
        down_weight: [D, H] in the dtype of ``product``.
        down_bias: [D] in the dtype of ``product``, or None.
        embedding: [V, D] in the dtype of ``product``, the table of the text rows.
        source: contiguous int32 [total], as a plan has it.
        vision_rows: contiguous int32 [T], likewise; each token has one row.
        vision_start: that of a plan with these maps; -1 is right for any.

    Returns:
        [total, D] in the dtype of ``product``.
    """
    rows = len(product)
    if vision_start >= 0:
        if vision_start + rows > len(source):
            raise ValueError(
                f"vision_start must leave {rows} rows of the {len(source)}, got {vision_start}"
            )
        packed = embedding.new_empty(len(source), len(down_weight))
        ops.write_text(packed, embedding, source, rows)
        vision = packed.narrow(0, vision_start, rows)
        linear_into(vision, product, down_weight, down_bias)
        return packed
    config: TileConfig | None = None
    if rows > 0 and not _is_native(product):
        config = config_for("packed_down", product, rows)
    if config is None or not takes(config, product, down_weight):
        tokens = linear(product, down_weight, down_bias)
        return ops.pack_embeddings(embedding, tokens, source, vision_rows)
    packed = embedding.new_empty(len(source), len(down_weight))
    if not packed.is_meta:  # where kernels are only compiled
        ops.write_text(packed, embedding, source, rows)
    product, down_weight = tileable(product), tileable(down_weight)
    down_bias = None if down_bias is None else neighbours(down_bias)
    width, hidden = down_weight.shape
    tma = config.tma and can_describe(product, down_weight)
    launch(
        _kernels().packed_down_kernel,
        num_tiles(rows, width, config),
        product,
        tiles_of(product, [config.block_m, config.block_k], tma),
        tiles_of(down_weight, [config.block_n, config.block_k], tma),
        *(down_bias, vision_rows, packed, rows, width, hidden),
        *(product.stride(0), down_weight.stride(0)),
        BIAS=down_bias is not None,
        WHOLE_K=hidden % config.block_k == 0,
        TMA=tma,
        **product_options(config, product.dtype),
    )
    return packed


packed_down = define_stage(
    "packed_down",
    lambda product, down_weight, down_bias, embedding, source, *_: embedding.new_empty(
        source.shape[0], down_weight.shape[0]
    ),
    launch_packed_down,
)
