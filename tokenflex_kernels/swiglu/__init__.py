"""The op `swiglu`: silu(x Wg^T + bg) * (x Wu^T + bu)."""

from tokenflex_kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
