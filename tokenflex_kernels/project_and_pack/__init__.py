"""The op `project_and_pack`: `project_tokens` whose last product writes into the packed buffer."""

from tokenflex_kernels.project_and_pack.op import project_and_pack

__all__ = ["project_and_pack"]
