"""Floating-point operations of each part of a model, forward and backward.

A matrix product of n weights takes 2n operations a row. Pooling, norms and activations are left
out (below 1 % together), as is attention inside the language model: below 1 % of a 7B model at 512
tokens a conversation, more for longer ones.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tokenflex_kernels.gpus import data_sheet


@dataclass(frozen=True)
class Flops:
    """Operations for one tile, vision token, row of the language model, and answer token."""

    tile: float  # through the vision encoder
    vision_token: float  # through the projector
    token: float  # through the language model's layers
    target: float  # through its head, which sees answer tokens only

    @property
    def tile_cost(self) -> float:
        """Cost of encoding a tile, in rows of the language model."""
        return self.tile / self.token

    def total(self, *, tiles: float, vision_tokens: float, tokens: float, targets: float) -> float:
        """Return the operations for these numbers of each."""
        return (
            tiles * self.tile
            + vision_tokens * self.vision_token
            + tokens * self.token
            + targets * self.target
        )


def training_flops(
    model: Any, learning: Collection[str], learned: Collection[nn.Parameter] | None = None
) -> Flops:
    """Return the operations of a forward and backward pass.

    The gradient of a module's inputs costs as much as its forward pass, and so does that of its
    weights; each is computed only where something that learns needs it.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration`, also on the meta device.
        learning: Those of "vision", "projector" and "text" that learn.
        learned: Weights that learn, where adapters learn in their place; None for all of a module.
    """
    vision, projector = (float(name in learning) for name in ("vision", "projector"))
    text = float("text" in learning)
    forward, inner = forward_flops(model), model.model
    to_text = 1 + max(vision, projector, text)
    tile_weights = vision * _learned_share(inner.vision_model, learned)
    return Flops(
        tile=forward.tile * (1 + vision + tile_weights),
        vision_token=forward.vision_token * (1 + max(vision, projector) + projector),
        token=forward.token * (to_text + text * _learned_share(inner.language_model, learned)),
        target=forward.target * (to_text + text * _learned_share(model.lm_head, learned)),
    )


def _learned_share(module: nn.Module, learned: Collection[nn.Parameter] | None) -> float:
    """Return the share of a module's linear weights that are among those that learn."""
    layers = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    if learned is None or not layers:
        return 1.0
    return sum(w.numel() for w in layers if w in learned) / sum(w.numel() for w in layers)


def teacher_flops(model: Any) -> Flops:
    """Return the operations of a teacher's forward pass over encoded images."""
    return replace(forward_flops(model), tile=0.0)


def tile_cost(
    model: Any,
    learning: Collection[str],
    teacher_vision_tokens: int = 0,
    learned: Collection[nn.Parameter] | None = None,
) -> float:
    """Return the cost of a tile in rows of the language model, with its rows in a teacher's pass.

    Rows of text in the teacher's pass are left out: every sample has about as many.

    Args:
        model: As for :func:`training_flops`.
        learning: As for :func:`training_flops`.
        teacher_vision_tokens: Vision tokens of a tile in the teacher's pass; 0 without a teacher.
        learned: As for :func:`training_flops`.
    """
    training, teacher = training_flops(model, learning, learned), teacher_flops(model)
    seen = teacher_vision_tokens * (teacher.vision_token + teacher.token)
    return training.tile_cost + seen / training.token


def forward_flops(model: Any) -> Flops:
    """Return the operations of a forward pass; ``model`` as for :func:`training_flops`."""
    inner, config = model.model, model.config.vision_config
    encoder = inner.vision_model
    patches = getattr(config, "num_patches", None) or _grid_cells(config)
    # Each patch looks at every patch: scores and their weighted sum.
    attention = 4 * patches**2 * config.hidden_size * config.num_hidden_layers
    pixels = config.patch_size**2 * config.num_channels
    return Flops(
        tile=2.0 * patches * (_linear_weights(encoder) + pixels * config.hidden_size) + attention,
        vision_token=2.0 * _linear_weights(inner.projector),
        token=2.0 * _linear_weights(inner.language_model),
        target=2.0 * model.lm_head.weight.numel(),
    )


def _grid_cells(config: Any) -> int:
    sides = config.image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return (height // config.patch_size) * (width // config.patch_size)


def _linear_weights(module: nn.Module) -> int:
    """Count the weights of linear layers, without a pooling head, which no patch goes through."""
    return sum(
        layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith("head.")
    )


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the operations a second in a GPU's data sheet; None without a sheet.

    Args:
        device_name: What ``torch.cuda.get_device_name`` returns.
        precision: "bf16", "fp16" or "no", as in a configuration.
    """
    sheet = data_sheet(device_name)
    if sheet is None:
        return None
    if precision != "no":
        return 1e12 * sheet.half
    return 1e12 * (
        sheet.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else sheet.single
    )
