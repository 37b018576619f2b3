"""Recompute or compile the layers of encoder and language model during a stage.

A layer is what transformers marks as one that may be recomputed. Its ``forward`` is replaced on
the instance and put back after the stage, so names of weights, hooks (FSDP's stay outside) and
modes do not change. transformers' own switch recomputes in training mode only; frozen layers, which
gradients pass on their way to the projector, are in evaluation mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tokenflex.training.config import TrainConfig

BACKEND = "inductor"
"""Backend of ``torch.compile``."""


@dataclass(frozen=True)
class Parts:
    """The parts of a model whose layers are recomputed or compiled, and its projector.

    Attributes:
        vision: The vision encoder.
        projector: The token-adaptive projector.
        text: The language model.
    """

    vision: nn.Module
    projector: Any
    text: nn.Module


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of an encoder or a language model, in order."""
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def sharded_units(model: Any) -> list[nn.Module]:
    """Return the parts of a model whose weights are gathered together; the rest is one more."""
    inner = model.model
    return [*layers_of(inner.vision_model), *layers_of(inner.language_model), inner.projector]


@contextmanager
def adapted_layers(parts: Parts, config: TrainConfig, learning: Collection[str]) -> Iterator[None]:
    """Run the layers of a model's ``parts`` as ``config`` says, inside a ``with`` block.

    With ``gradient_checkpointing`` a layer that gradients pass (``learning`` names what learns)
    keeps only its input, and so does the projector between its norm and its last product. With
    ``compile`` each layer is compiled by itself for any number of rows: layers of one kind share
    the code, and new lengths of packed rows need no new code.
    """
    text, vision = layers_of(parts.text), layers_of(parts.vision)
    recomputed = text + vision * ("vision" in learning) if config.gradient_checkpointing else []
    saved = parts.projector.save
    try:
        for layer in text + vision:
            forward = layer.forward
            if config.compile:
                # The method of the class: only inside this block does an instance have its own.
                plain = inspect.unwrap(type(layer).forward).__get__(layer)
                forward = torch.compile(plain, dynamic=True, backend=BACKEND)
            if layer in recomputed:
                forward = partial(checkpoint, forward, use_reentrant=False)
            if layer in vision[:1]:
                forward = partial(_from_contiguous, forward)
            layer.forward = forward
        if config.gradient_checkpointing:
            parts.projector.save = "input"
        yield
    finally:
        for layer in text + vision:
            vars(layer).pop("forward", None)
        parts.projector.save = saved


def _from_contiguous(forward: Any, /, *args: Any, **kwargs: Any) -> Any:
    # A patch embedding leaves channels before patches in memory, and sums keep the layout of their
    # first term: all layers would copy their inputs for every norm.
    return forward(*(x.contiguous() for x in args[:1]), *args[1:], **kwargs)
