"""A short warm-up of the vision encoder, in place of the pretrained weights of a real model.

A pretrained encoder such as SigLIP recognises what it sees. A random one does not, and a language
model cannot teach it in a few minutes. So it first learns the digit and colour of each cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from tokenflex.digits.canvas import BLANK, CELL_PIXELS, COLOURS, Canvas, draw_canvas
from tokenflex.models.processing import TokenFlexProcessor

NUM_DIGITS = 10

Classifier = Callable[..., torch.Tensor]


def warm_up_encoder(
    vision_model: PreTrainedModel,
    processor: TokenFlexProcessor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[float], object] = lambda loss: None,
) -> None:
    """Train ``vision_model`` in place to tell the digit and colour of each cell.

    Args:
        vision_model: Returns ``last_hidden_state`` [B, patches, C] of a square grid of patches,
            whose side is a multiple of the cells per side.
        processor: Makes ``pixel_values`` of canvases; its image size gives their number of cells.
        steps: Optimiser steps, with a linear warm-up and a cosine to zero.
        batch_size: Canvases a step.
        learning_rate: The highest learning rate.
        seed: Seed of the canvases and of the classifying head, which is thrown away.
        on_step: Called with each step's loss.
    """
    cells = processor.image_processor.size["height"] // CELL_PIXELS

    def loss_of(step: int, classify: Classifier) -> torch.Tensor:
        canvases = [
            draw_canvas(np.random.default_rng((seed, step, i)), "train", cells)
            for i in range(batch_size)
        ]
        images = [Image.fromarray(canvas.pixels) for canvas in canvases]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return _cell_loss(classify(pixels, partial(_mean_of_cells, cells=cells)), canvases)

    train_encoder(
        vision_model,
        NUM_DIGITS + 1 + len(COLOURS) + 1,
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        on_step=on_step,
    )


def train_encoder(
    vision_model: PreTrainedModel,
    classes: int,
    loss_of: Callable[[int, Classifier], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[float], object],
) -> None:
    """Train an encoder in place with a linear classifier, which is thrown away.

    Args:
        vision_model: The encoder.
        classes: Outputs of the classifier.
        loss_of: Returns the loss of a step, from its index and a function of pixels [B, 3, H, W]
            and of the pooling between the encoder's patches [B, patches, C] and the classifier,
            which returns the classifier's outputs.
        steps: Optimiser steps, with a linear warm-up and a cosine to zero.
        learning_rate: The highest learning rate.
        seed: Seed of the classifier.
        on_step: Called with each step's loss.
    """
    device = next(vision_model.parameters()).device
    width = vision_model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=width**-0.5, generator=generator)
    nn.init.zeros_(head.bias)
    head.to(device)

    def classify(
        pixels: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor] = lambda patches: patches
    ) -> torch.Tensor:
        features = vision_model(pixel_values=pixels.to(device)).last_hidden_state
        return head(pool(features))

    parameters = [*vision_model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    vision_model.train()
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / 50) * cosine
        loss = loss_of(step, classify)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        on_step(loss.item())
    # Otherwise the training that follows would add to these gradients.
    vision_model.zero_grad(set_to_none=True)


def _mean_of_cells(features: torch.Tensor, cells: int) -> torch.Tensor:
    """Average each cell's patches: [B, patches, C] -> [B, cells^2, C]."""
    side = math.isqrt(features.shape[1])
    per_cell = side // cells
    grid = features.unflatten(1, (cells, per_cell, cells, per_cell))
    return grid.mean(dim=(2, 4)).flatten(1, 2)


def _cell_loss(logits: torch.Tensor, canvases: list[Canvas]) -> torch.Tensor:
    """Return the cross entropy of each cell's digit and colour, with a class for blank cells."""

    def classes(values: list[np.ndarray], blank: int) -> torch.Tensor:
        stacked = np.stack(values)
        return torch.from_numpy(np.where(stacked == BLANK, blank, stacked)).to(logits.device)

    digits = classes([canvas.digits for canvas in canvases], NUM_DIGITS)
    colours = classes([canvas.colours for canvas in canvases], len(COLOURS))
    digit_logits, colour_logits = logits.split([NUM_DIGITS + 1, len(COLOURS) + 1], dim=-1)
    return F.cross_entropy(digit_logits.flatten(0, 1), digits.flatten()) + F.cross_entropy(
        colour_logits.flatten(0, 1), colours.flatten()
    )
