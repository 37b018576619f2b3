"""Cross entropy of a language model's head in chunks: never the logits of all targets at once.

At 150 000 words of vocabulary a target's logits take 0.6 MB, their softmax and gradient as much
again: more than everything else a small language model keeps of a token. Here forward goes through
the targets chunk by chunk and computes the gradients of each while its logits are at hand, so that
the logits are neither kept nor computed again; backward only multiplies by what comes from above.
(The idea is Liger-Kernel's, arXiv 2410.10989; this is plain PyTorch.)

Memory: a chunk of logits a few times over, a gradient of the hidden rows, and one of the weight in
float32 where it learns. Arithmetic: the head's three products, as without chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**26
"""Logits of a chunk: 256 MiB in float32."""

Transform = Callable[[torch.Tensor], torch.Tensor]


def head_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    transform: Transform = lambda logits: logits,
) -> torch.Tensor:
    """The weighted sum of ``-log softmax(transform(hidden @ weight.T + bias))[target]``.

    Products are in the type that autocast gives, else in that of ``hidden``; the rest in float32
    (float64 for float64).

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
        targets: int64 [N], each from 0 to V - 1.
        target_weights: [N], how much each target counts; no gradient.
        transform: what the family does to its logits, element by element of a row.

    Returns:
        A scalar, 0 for no targets; differentiable once, in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: the shapes do not fit together.
    """
    rows = len(hidden)
    if targets.shape != (rows,) or target_weights.shape != (rows,):
        raise ValueError(
            f"targets and target_weights must be [{rows}] for {rows} rows of hidden, got "
            f"{list(targets.shape)} and {list(target_weights.shape)}"
        )
    loss: torch.Tensor = _HeadCrossEntropy.apply(
        hidden, weight, bias, targets, target_weights, transform
    )
    return loss


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        target_weights: torch.Tensor,
        transform: Transform,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide = torch.promote_types(dtype, torch.float32)
        learns_hidden, learns_weight, learns_bias = ctx.needs_input_grad[:3]
        grad_hidden = hidden.new_empty(hidden.shape, dtype=dtype) if learns_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=wide) if learns_weight else None
        grad_bias = weight.new_zeros(len(weight), dtype=wide) if learns_bias else None
        total = hidden.new_zeros((), dtype=wide)
        rows = max(1, CHUNK_LOGITS // len(weight))
        with torch.autocast(device, enabled=False):
            cast = weight.to(dtype)
            cast_bias = None if bias is None else bias.to(dtype)
            for first in range(0, len(hidden), rows):
                here = slice(first, first + rows)
                inputs = hidden[here].to(dtype)
                logits = F.linear(inputs, cast, cast_bias).to(wide)
                with torch.enable_grad():
                    logits.requires_grad_()
                    each = F.cross_entropy(transform(logits), targets[here], reduction="none")
                    loss = (each * target_weights[here]).sum()
                total += loss.detach()
                if not any(ctx.needs_input_grad[:3]):
                    continue
                (grad,) = torch.autograd.grad(loss, logits)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    torch.mm(grad, cast, out=grad_hidden[here])
                if grad_weight is not None:
                    grad_weight += grad.T @ inputs
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # nobody needs them twice
        scaled = (None if one is None else one.mul_(grad) for one in gradients)
        return (*scaled, None, None, None)
