"""The op `pool_norm`: pool each image's patch grid to its own output grid, then LayerNorm."""

from tokenflex_kernels.pool_norm.op import pool_norm

__all__ = ["pool_norm"]
