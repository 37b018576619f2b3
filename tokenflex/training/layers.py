"""How the layers of encoder and language model run in a stage: recomputed, compiled, or neither.

A layer is what transformers marks as one that may be recomputed. Its ``forward`` is replaced on
the instance and put back after the stage, so names of weights, hooks (FSDP's stay outside) and
modes are those of the model. transformers' own switch would not do: it recomputes in training mode
only, and frozen layers, which gradients go through on their way to the projector, are in
evaluation mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tokenflex.training.config import TrainConfig

BACKEND = "inductor"
"""torch.compile's."""


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of an encoder or a language model, in order."""
    return [one for one in module.modules() if isinstance(one, GradientCheckpointingLayer)]


@contextmanager
def adapted_layers(model: Any, config: TrainConfig, learning: Collection[str]) -> Iterator[None]:
    """Inside, the layers of ``model`` run as ``config`` says.

    With ``gradient_checkpointing`` a layer that gradients go through keeps its input alone, and so
    does the projector between its norm and its last product. With ``compile`` each layer is
    compiled by itself, for any number of rows: layers of one kind share the code, and the packed
    rows' lengths make no new one.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`.
        config: the run's.
        learning: which of "vision", "projector" and "text" learn.
    """
    inner = model.model
    text, vision = layers_of(inner.language_model), layers_of(inner.vision_model)
    recomputed = text + vision * ("vision" in learning) if config.gradient_checkpointing else []
    saved = inner.projector.save
    try:
        for layer in text + vision:
            forward = layer.forward
            if config.compile:
                # Of the class: each instance has one of its own only inside this block.
                plain = inspect.unwrap(type(layer).forward).__get__(layer)
                forward = torch.compile(plain, dynamic=True, backend=BACKEND)
            if layer in recomputed:
                forward = partial(checkpoint, forward, use_reentrant=False)
            layer.forward = forward
        if config.gradient_checkpointing:
            inner.projector.save = "input"
        yield
    finally:
        for layer in text + vision:
            vars(layer).pop("forward", None)
        inner.projector.save = saved
