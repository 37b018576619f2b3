"""The tracers of PyTorch that an op may be called under."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Return whether ``torch.export`` traces, and not ``torch.compile``.

    Before torch 2.13 Dynamo takes ``torch.compiler.is_exporting`` for true in any compilation, so
    this is evaluated as it traces.
    """
    return torch.compiler.is_exporting()


is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
