"""A short warm-up of the vision encoder, in place of the pretrained weights of a real model.

The encoder learns what document encoders know: the text below each patch, and its place on the
page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tokenflex.digits.encoder import Classifier, train_encoder
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.reading.content import LAYOUT_ODDS, LETTERS, NUMBERS, VALUES, WORDS, choose, draw_page
from tokenflex.reading.drawing import Box, Drawing, draw
from tokenflex.reading.fonts import FONTS

_TEXTS = {text: 1 + i for i, text in enumerate((*WORDS, *NUMBERS, *LETTERS, "note"))}
_LINES, _COLUMNS, _ROLES = 5, 5, ("headline", "line", "note", "footnote", "cell", "letter")
# Classes of each question about a patch. Class 0 is "none": text, line, column, role, value.
CLASSES = (1 + len(_TEXTS), 1 + _LINES, 1 + _COLUMNS, 1 + len(_ROLES), 1 + len(VALUES))
_LAYOUTS = ("page", "wide", "table", "chart")  # whose picture is one tile
_BLANK_WEIGHT = 0.2
_LEAST_SHARE = 0.2  # of a patch that a text must cover


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
    """Train ``vision_model`` in place to tell the text, line, column and role of each patch.

    A patch of a letter below a chart also learns the value of its bar or point.

    Args:
        vision_model: Returns ``last_hidden_state`` [B, patches, C] of a square grid of patches.
        processor: Makes ``pixel_values`` of pages.
        steps: Optimiser steps, with a linear warm-up and a cosine to zero.
        batch_size: Pages a step.
        learning_rate: The highest learning rate.
        seed: Seed of the pages and of the classifier, which is thrown away.
        on_step: Called with each step's loss.
    """
    side = vision_model.config.image_size // vision_model.config.patch_size
    weights = [torch.ones(classes) for classes in CLASSES]
    for weight in weights:
        weight[0] = _BLANK_WEIGHT

    def loss_of(step: int, classify: Classifier) -> torch.Tensor:
        drawings = [_drawing(np.random.default_rng((3, seed, step, i))) for i in range(batch_size)]
        images = [drawing.image for drawing in drawings]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        logits = classify(pixels).flatten(0, 1)
        labels = torch.from_numpy(np.stack([patch_labels(each, side) for each in drawings]))
        labels = labels.flatten(0, 1).to(logits.device)
        parts = logits.split(CLASSES, dim=-1)
        losses = [
            F.cross_entropy(part, labels[:, i], weights[i].to(logits.device))
            for i, part in enumerate(parts)
        ]
        return torch.stack(losses).sum()

    train_encoder(
        vision_model,
        sum(CLASSES),
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        on_step=on_step,
    )


def _drawing(rng: np.random.Generator) -> Drawing:
    layout = choose(rng, {layout: LAYOUT_ODDS[layout] for layout in _LAYOUTS})
    return draw(rng, draw_page(rng, layout, "train"), FONTS)


def patch_labels(drawing: Drawing, side: int) -> NDArray[np.int64]:
    """Return the classes of each patch.

    Args:
        drawing: The picture of a page of one tile.
        side: Patches along a side.

    Returns:
        int64 [side^2, 5]: text, line, column, role and value, 0 for none. A patch has the classes
        of the text that covers most of it.
    """
    boxes = [box for box in drawing.boxes if box.role in _ROLES]
    covers = np.stack([_covered(box, drawing, side) for box in boxes])  # [boxes, patches]
    most = covers.argmax(axis=0)
    classes = np.array([_classes(box, drawing.boxes) for box in boxes])
    return np.where((covers.max(axis=0) >= _LEAST_SHARE)[:, None], classes[most], 0)


def _covered(box: Box, drawing: Drawing, side: int) -> NDArray[np.float64]:
    """Return the share of each patch that a box covers, [patches]."""
    width, height = drawing.image.size
    left, top, right, bottom = np.array(box.edges) * side / np.array([width, height] * 2)
    first = np.arange(side)
    along_x = (np.minimum(right, first + 1) - np.maximum(left, first)).clip(0)
    along_y = (np.minimum(bottom, first + 1) - np.maximum(top, first)).clip(0)
    return np.outer(along_y, along_x).ravel()


def _classes(box: Box, boxes: Sequence[Box]) -> tuple[int, ...]:
    value = 0
    if box.role == "letter":
        shown = next(b for b in boxes if b.role in ("bar", "point") and b.column == box.column)
        value = int(shown.text)
    return _TEXTS[box.text], box.line + 1, box.column + 1, 1 + _ROLES.index(box.role), value
