"""Cross entropy of a language model's head in chunks, without the logits of all targets at once.

At a vocabulary of 150 000 a target's logits take 0.6 MB, and their softmax and gradient as much
again: more than all other activations of a token in a small language model. Forward goes through
the targets in chunks and computes the gradients of each chunk with its logits, so that logits are
neither kept nor computed again. Backward only multiplies by the incoming gradient. (The idea is
Liger-Kernel's, arXiv 2410.10989; this is plain PyTorch.)

Memory: a few copies of a chunk of logits, the gradient of the hidden rows, and that of the weight
in float32 if it learns. Arithmetic: the head's three products, as without chunks; a teacher's
logits are one more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**26
"""Logits of a chunk, with a teacher's: 256 MiB in float32."""

Transform = Callable[[torch.Tensor], torch.Tensor]


def head_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    transform: Transform = lambda logits: logits,
) -> torch.Tensor:
    """Return the weighted sum of ``-log softmax(transform(hidden @ weight.T + bias))[target]``.

    Products are in the type that autocast gives, else in that of ``hidden``; the rest in float32
    (float64 for float64).

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
        targets: int64 [N], each from 0 to V - 1.
        target_weights: [N], the weight of each target; without a gradient.
        transform: the family's transform of logits, elementwise.

    Returns:
        A scalar, 0 without targets; differentiable once, in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_shapes(hidden, targets, target_weights)
    loss: torch.Tensor
    loss, _ = _HeadLoss.apply(hidden, weight, bias, targets, target_weights, transform, None, 0.0)
    return loss


def head_distillation(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    teacher_hidden: torch.Tensor,
    distillation: float,
    transform: Transform = lambda logits: logits,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return :func:`head_cross_entropy` plus ``distillation`` times the divergence from a teacher.

    The divergence is the sum of KL(p_teacher || p_student), weighted as the cross entropy is.
    Teacher and student share the head; the teacher's side has no gradient.

    Args:
        hidden, weight, bias, targets, target_weights, transform: as for
            :func:`head_cross_entropy`.
        teacher_hidden: [N, D], of the same targets.
        distillation: the weight of the divergence.

    Returns:
        Two scalars: the loss, differentiable as :func:`head_cross_entropy`'s, and the divergence in
        it, without a gradient.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_shapes(hidden, targets, target_weights)
    if teacher_hidden.shape != hidden.shape:
        raise ValueError(
            f"teacher_hidden must be {list(hidden.shape)} as hidden, got "
            f"{list(teacher_hidden.shape)}"
        )
    losses: tuple[torch.Tensor, torch.Tensor] = _HeadLoss.apply(
        hidden, weight, bias, targets, target_weights, transform, teacher_hidden, distillation
    )
    return losses


def _check_shapes(
    hidden: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
) -> None:
    rows = len(hidden)
    if targets.shape != (rows,) or target_weights.shape != (rows,):
        raise ValueError(
            f"targets and target_weights must be [{rows}] for {rows} rows of hidden, got "
            f"{list(targets.shape)} and {list(target_weights.shape)}"
        )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        target_weights: torch.Tensor,
        transform: Transform,
        teacher_hidden: torch.Tensor | None,
        distillation: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        divergence = torch.zeros_like(total)
        logits_a_row = len(weight) * (1 if teacher_hidden is None else 2)
        rows = max(1, CHUNK_LOGITS // logits_a_row)
        with torch.autocast(device, enabled=False):
            cast = weight.to(dtype)
            cast_bias = None if bias is None else bias.to(dtype)
            for first in range(0, len(hidden), rows):
                chunk = slice(first, first + rows)
                inputs = hidden[chunk].to(dtype)
                logits = F.linear(inputs, cast, cast_bias).to(wide)
                teacher = None
                if teacher_hidden is not None:
                    teacher_logits = F.linear(teacher_hidden[chunk].to(dtype), cast, cast_bias).to(
                        wide
                    )
                    teacher = F.log_softmax(transform(teacher_logits), -1)
                    del teacher_logits
                with torch.enable_grad():
                    logits.requires_grad_()
                    student = F.log_softmax(transform(logits), -1)
                    losses = F.nll_loss(student, targets[chunk], reduction="none")
                    if teacher is not None:
                        kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
                        divergence += (kl.detach() * target_weights[chunk]).sum()
                        losses = losses + distillation * kl
                    loss = (losses * target_weights[chunk]).sum()
                total += loss.detach()
                if not any(ctx.needs_input_grad[:3]):
                    continue
                (grad,) = torch.autograd.grad(loss, logits)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    torch.mm(grad, cast, out=grad_hidden[chunk])
                if grad_weight is not None:
                    grad_weight += grad.T @ inputs
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.mark_non_differentiable(divergence)
        return total, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        if not hasattr(ctx, "gradients"):
            raise RuntimeError(
                "the model's loss keeps its gradients for one backward pass, to save memory: call "
                "the model again instead of going backward twice with retain_graph"
            )
        gradients = ctx.gradients
        del ctx.gradients  # they are scaled in place
        scaled = (None if g is None else g.mul_(grad) for g in gradients)
        return (*scaled, None, None, None, None, None)
