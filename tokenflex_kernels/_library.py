"""The ops' namespace in torch.library, ``torch.ops.tokenflex``, and how an op gets into it.

``Library.define`` and ``impl``, and one ``autograd.Function`` where an op has a gradient:
``torch.library.custom_op`` adds several times their cost to every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("tokenflex", "FRAGMENT")


def define(
    schema: str,
    shapes: Callable[..., Any],
    kernel: Callable[..., Any],
    *,
    returns: str = "Tensor",
    keys: Sequence[str] = ("CPU", "CUDA"),
) -> Callable[..., Any]:
    """Define the op ``tokenflex::<schema> -> returns``.

    Args:
        schema: "name(Tensor x, ..)".
        shapes: what a compiler is told the op does: results of the right shapes.
        kernel: what it does, on tensors of either device.
        returns: the results' types.
        keys: what the kernel is registered for.

    Returns:
        The op.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(f"{schema} -> {returns}")
    for key in keys:
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"tokenflex::{name}", shapes, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.tokenflex, name).default
    return op


def differentiate(name: str, autograd: Callable[..., Any]) -> None:
    """Call ``autograd`` instead of the op's kernel, whether or not a tensor requires grad."""
    _LIBRARY.impl(name, autograd, "Autograd")
