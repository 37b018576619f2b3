"""TokenFLEX kernels: patch grids to vision tokens, and tokens and text into one packed sequence.

A grid is a (height, width) pair of host ints. Flat features hold images one after another,
row-major. Every op has a plain-PyTorch reference that runs on the CPU; ``TOKENFLEX_BACKEND``
chooses between implementations (see ``tokenflex_kernels.backend``). Importing never touches CUDA.
"""

# ruff: noqa: E402  # an old release is named before a module misses what it lacks

from tokenflex_kernels.versions import require

require("torch", "2.11")
require("triton", "3.6")

from tokenflex_kernels.information import info
from tokenflex_kernels.packing import (
    PackPlan,
    balance_bins,
    bin_pack,
    merge_vision,
    pack_embeddings,
    plan_packing,
    unpack_vision,
)
from tokenflex_kernels.pool_norm.op import pool_norm
from tokenflex_kernels.pool_norm.plan import PoolPlan, plan_pooling
from tokenflex_kernels.project_and_pack.op import project_and_pack
from tokenflex_kernels.project_tokens.captured import CapturedProjection
from tokenflex_kernels.project_tokens.op import project_tokens
from tokenflex_kernels.swiglu.op import swiglu

__all__ = [
    "CapturedProjection",
    "PackPlan",
    "PoolPlan",
    "balance_bins",
    "bin_pack",
    "info",
    "merge_vision",
    "pack_embeddings",
    "plan_packing",
    "plan_pooling",
    "pool_norm",
    "project_and_pack",
    "project_tokens",
    "swiglu",
    "unpack_vision",
]
