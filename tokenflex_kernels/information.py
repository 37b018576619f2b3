"""`info`: the installed versions and the implementation that each op will run."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from tokenflex_kernels.backend import (
    IMPLEMENTATIONS,
    extension,
    requested_backend,
    select_backend,
)

HOST_OPS = ("plan_packing", "bin_pack", "balance_bins")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Return versions, the extension, the device, and the backend that each op will use on it.

    This needs neither a GPU nor a driver.

    Returns:
        ``versions`` (package -> version or None), ``extension`` (``built``, ``cuda``,
        ``cuda_architectures``), ``device`` (``type``, ``name``), ``backend`` (the value of
        ``TOKENFLEX_BACKEND``) and ``ops`` (op -> "triton", "cuda", "native" or "reference").

    Raises:
        ValueError: ``TOKENFLEX_BACKEND`` cannot be honoured.
    """
    packages = ("tokenflex", "torch", "triton", "numpy", "transformers", "accelerate")
    compiled = extension()
    if torch.cuda.is_available():
        device = {"type": "cuda", "name": torch.cuda.get_device_name()}
    else:
        device = {"type": "cpu", "name": platform.processor() or platform.machine()}
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "extension": {
            "built": compiled is not None,
            "cuda": compiled is not None and compiled.has_cuda,
            "cuda_architectures": [] if compiled is None else list(compiled.cuda_architectures),
        },
        "device": device,
        "backend": requested_backend(),
        "ops": {
            op: select_backend(op, "cpu" if op in HOST_OPS else device["type"])
            for op in IMPLEMENTATIONS
        },
    }
