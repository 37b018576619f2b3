"""Packing: padding-free batches of text and vision tokens, planned on the host."""

from tokenflex_kernels.packing.bins import balance_bins, bin_pack
from tokenflex_kernels.packing.embeddings import merge_vision, pack_embeddings, unpack_vision
from tokenflex_kernels.packing.plan import PackPlan, plan_packing

__all__ = [
    "PackPlan",
    "balance_bins",
    "bin_pack",
    "merge_vision",
    "pack_embeddings",
    "plan_packing",
    "unpack_vision",
]
