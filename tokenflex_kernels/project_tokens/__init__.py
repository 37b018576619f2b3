"""The op `project_tokens`: `pool_norm`, `swiglu` and the down projection as one op."""

from tokenflex_kernels.project_tokens.op import project_tokens

__all__ = ["project_tokens"]
