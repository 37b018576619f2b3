"""A short warm-up of the vision encoder, in place of the pretrained weights of a real model.

The encoder learns what document encoders know: the text of each patch, and its place on the
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
from tokenflex.reading.content import (
    LETTERS,
    MOST_COLUMNS,
    MOST_ROWS,
    NUMBERS,
    VALUES,
    WORDS,
    choose,
    draw_page,
)
from tokenflex.reading.drawing import Box, Drawing, draw
from tokenflex.reading.fonts import FONTS

_TEXTS = {text: 1 + i for i, text in enumerate((*WORDS, *NUMBERS, *LETTERS, "note"))}
_LINES, _COLUMNS = 5, 5
_ROLES = ("headline", "line", "note", "footnote", "cell", "letter", "bar", "point")
_CHARACTERS = {c: 1 + i for i, c in enumerate(sorted(set("".join(_TEXTS))))}
_PLACES = {
    (role, line, column): 1 + i
    for i, (role, line, column) in enumerate(
        [("headline", -1, -1), ("footnote", -1, -1)]
        + [("line", line, column) for line in range(_LINES) for column in range(_COLUMNS)]
        + [("cell", row, column) for row in range(MOST_ROWS) for column in range(MOST_COLUMNS)]
    )
}
# Classes of each question about a patch. Class 0 is "none".
CLASSES = {
    "text": 1 + len(_TEXTS),
    "first character": 1 + len(_CHARACTERS),
    "last character": 1 + len(_CHARACTERS),
    "line": 1 + _LINES,
    "column": 1 + _COLUMNS,
    "role": 1 + len(_ROLES),
    "place": 1 + len(_PLACES),
    "value": 1 + len(VALUES),
}
# Of pages whose picture is one tile. A table or chart has fewer texts than a page.
_ODDS = {"page": 0.45, "wide": 0.13, "table": 0.2, "chart": 0.22}
_LONGEST_WAVE = 30.0  # of position embeddings, over 2 pi patches
_BLANK_WEIGHT = 0.2
_LEAST_SHARE = 0.25  # of a patch that a text must cover, or of the text if it is smaller


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
    """Train ``vision_model`` in place to tell the text and the place of each patch.

    A patch of a bar or point learns its value, and so does one of the letter below it. Pages are
    those of the standard task, in its fonts.

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
    _set_positions(vision_model, side)
    weights = [torch.ones(classes) for classes in CLASSES.values()]
    for weight in weights:
        weight[0] = _BLANK_WEIGHT

    def loss_of(step: int, classify: Classifier) -> torch.Tensor:
        drawings = [_drawing(seed, step, i) for i in range(batch_size)]
        images = [drawing.image for drawing in drawings]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        logits = classify(pixels).flatten(0, 1)
        labels = torch.from_numpy(np.stack([patch_labels(each, side) for each in drawings]))
        labels = labels.flatten(0, 1).to(logits.device)
        parts = logits.split([*CLASSES.values()], dim=-1)
        losses = [
            F.cross_entropy(part, labels[:, i], weights[i].to(logits.device))
            for i, part in enumerate(parts)
        ]
        return torch.stack(losses).sum()

    train_encoder(
        vision_model,
        sum(CLASSES.values()),
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        on_step=on_step,
    )


def _set_positions(vision_model: PreTrainedModel, side: int) -> None:
    """Let a table of position embeddings begin with sines and cosines of row and column.

    From random ones an encoder has to learn for each patch by itself which others are its
    neighbours. With waves it tells lines and columns in fewer steps.
    """
    table = getattr(getattr(vision_model, "embeddings", None), "position_embedding", None)
    if not isinstance(table, torch.nn.Embedding) or table.num_embeddings != side * side:
        return
    width = table.embedding_dim // 4
    angles = torch.arange(side)[:, None] * _LONGEST_WAVE ** (-torch.arange(width) / width)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, C / 2]
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None, :].expand(side, side, -1)
    with torch.no_grad():
        table.weight[:, : 4 * width] = torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _drawing(seed: int, step: int, index: int) -> Drawing:
    rng = np.random.default_rng((3, seed, step, index))
    return draw(rng, draw_page(rng, choose(rng, _ODDS), "train"), FONTS)


def patch_labels(drawing: Drawing, side: int) -> NDArray[np.int64]:
    """Return the classes of each patch.

    Args:
        drawing: The picture of a page of one tile.
        side: Patches along a side.

    Returns:
        int64 [side^2, 8] in the order of :data:`CLASSES`, 0 for none. A patch has the classes
        of the text that covers most of it.
    """
    covers = np.stack([_covered(box, drawing, side) for box in drawing.boxes])  # [boxes, patches]
    most = covers.argmax(axis=0)
    classes = np.array([_classes(box, drawing.boxes) for box in drawing.boxes])
    return np.where((covers.max(axis=0) >= _LEAST_SHARE)[:, None], classes[most], 0)


def _covered(box: Box, drawing: Drawing, side: int) -> NDArray[np.float64]:
    """Return the share of each patch that a box covers, or of the box if it is smaller."""
    width, height = drawing.image.size
    left, top, right, bottom = np.array(box.edges) * side / np.array([width, height] * 2)
    first = np.arange(side)
    along_x = (np.minimum(right, first + 1) - np.maximum(left, first)).clip(0)
    along_y = (np.minimum(bottom, first + 1) - np.maximum(top, first)).clip(0)
    return np.outer(along_y, along_x).ravel() / min(1.0, (right - left) * (bottom - top))


def _classes(box: Box, boxes: Sequence[Box]) -> tuple[int, ...]:
    place = (
        *(box.line + 1, box.column + 1, 1 + _ROLES.index(box.role)),
        _PLACES.get((box.role, box.line, box.column), 0),
    )
    if box.role in ("bar", "point"):
        return 0, 0, 0, *place, int(box.text)
    value = 0
    if box.role == "letter":
        shown = next(b for b in boxes if b.role in ("bar", "point") and b.column == box.column)
        value = int(shown.text)
    return _TEXTS[box.text], _CHARACTERS[box.text[0]], _CHARACTERS[box.text[-1]], *place, value
