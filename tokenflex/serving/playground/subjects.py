"""The two kinds of models that a playground asks: TokenFLEX models and converted stock models.

Both encode a picture once. For every count a model then gets ``generate``'s inputs, made of the
same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers.image_transforms import to_channel_dimension_format

from tokenflex.counts import AUTO, Grid, TokenCount, token_grid
from tokenflex.models.chat import parts_of
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.vision import on_device
from tokenflex.routing.ladder import known_counts
from tokenflex.routing.storage import has_router


@dataclass(frozen=True)
class Panel:
    """A picture as the encoder sees it.

    Attributes:
        picture: RGB, at any size.
        tiles: (rows, columns) of equal tiles that cover the picture, each an input of the encoder.
        patches: (H, W) of the patch grid of each tile.
    """

    picture: Image.Image
    tiles: Grid
    patches: Grid


class EncodedPicture(Protocol):
    """A picture after its one pass of the encoder."""

    @property
    def panels(self) -> list[Panel]:
        """The picture as the encoder sees it."""

    @property
    def tiles(self) -> int:
        """Inputs of the encoder that the picture became."""

    def read(self, question: str, count: TokenCount | str) -> dict[str, Any]:
        """Return the prompt as inputs of ``generate`` that still lack the picture."""

    def with_picture(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs of ``generate``, with a count for each tile in ``num_image_tokens``."""


class Subject(Protocol):
    """A model that can be asked.

    Attributes:
        trained_counts: Counts that the model was trained with, from the fewest tokens; empty if
            it does not record them.
        offered_counts: Counts that suit the model: those of its training and its router, or its
            default and those that a conversion is fitted at.
        has_auto: Whether a router chooses counts.
        pooling: The projector's pooling, "adaptive" or "resize".
    """

    trained_counts: list[TokenCount]
    offered_counts: list[TokenCount]
    has_auto: bool
    pooling: str

    def prepare(self, picture: Image.Image, max_tiles: int | None) -> Any:
        """Return the encoder's inputs."""

    def encode(self, picture: Image.Image, prepared: Any) -> EncodedPicture:
        """Run the encoder."""


def subject_of(model: Any, processor: Any) -> Subject:
    """Return the subject of a TokenFLEX model, or of a converted stock model.

    Raises:
        TypeError: The model is neither.
    """
    if isinstance(model, TokenFlexForConditionalGeneration):
        return TokenFlexSubject(model, processor)
    from tokenflex.dropin.variants import is_converted

    if is_converted(model):
        return ConvertedSubject(model, processor)
    raise TypeError(
        "model must be a TokenFLEX model or one with a token-adaptive projector "
        f"(tokenflex.replace_projector), got {type(model).__name__}"
    )


def by_size(counts: Sequence[TokenCount]) -> list[TokenCount]:
    """Return different counts, from the fewest tokens to the most; squares as ints."""
    grids = {token_grid(count) for count in counts}
    ordered = sorted(grids, key=lambda grid: (grid[0] * grid[1], grid))
    return [height * width if height == width else (height, width) for height, width in ordered]


def prompt_of(processor: Any, question: str) -> str:
    """Return the prompt of a question about one picture, in the processor's chat template.

    The picture stands before the question, or where the question names it (``<image>``).
    """
    image, content = {"type": "image"}, parts_of(question)
    if image not in content:
        content = [image, *content]
    messages = [{"role": "user", "content": content}]
    try:
        prompt: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"chat_template cannot be rendered: {error}") from error
    return prompt


# ---- TokenFLEX models


class TokenFlexSubject:
    """A TokenFLEX model. A picture cut into tiles is one panel, and its thumbnail another."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        config = model.config
        self.trained_counts = by_size(config.trained_num_image_tokens or ())
        self.has_auto = has_router(model)
        if self.has_auto or self.trained_counts:
            self.offered_counts = by_size([*self.trained_counts, *known_counts(model)])
        else:
            self.offered_counts = [processor.num_image_tokens]
        self.pooling: str = config.pooling

    def prepare(self, picture: Image.Image, max_tiles: int | None) -> Any:
        """Return the outputs of the image processor, and (rows, columns) of tiles."""
        data, (tiles,) = self.processor.process_images([picture], max_tiles=max_tiles)
        grid = self.processor.tile_grid((picture.height, picture.width), max_tiles)
        return data, tiles, grid

    def encode(self, picture: Image.Image, prepared: Any) -> EncodedPicture:
        """Run the encoder on the outputs of :meth:`prepare`."""
        data, tiles, grid = prepared
        pixels = data["pixel_values"]
        encoded = self.model.encode_images(**on_device(data, self.model.device))
        image_processor = self.processor.image_processor
        if tiles == 1 and getattr(image_processor, "do_center_crop", False):
            picture = seen_picture(pixels[0], image_processor)  # its edges are cut off
        panels = [Panel(picture, grid, encoded.grids[0])]
        if tiles > grid[0] * grid[1]:
            panels.append(Panel(picture, (1, 1), encoded.grids[-1]))  # the thumbnail
        return _Picture(self, encoded, tiles, panels)


@dataclass(frozen=True)
class _Picture:
    subject: TokenFlexSubject | ConvertedSubject
    encoded: Any
    tiles: int
    panels: list[Panel]

    def read(self, question: str, count: TokenCount | str) -> dict[str, Any]:
        model, processor = self.subject.model, self.subject.processor
        prompt = prompt_of(processor, question)
        inputs = processor.encode_text(
            [[prompt]],
            [self.tiles],
            add_special_tokens=processor.adds_special_tokens(prompt),
            num_image_tokens=count,
        )
        return dict(inputs.to(model.device))

    def with_picture(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = {**inputs, "encoded_images": self.encoded}
        if inputs["num_image_tokens"] == AUTO:
            inputs = self.subject.model.choose_counts(**inputs)
        return inputs


# ---- converted stock models


class ConvertedSubject:
    """A converted stock model. Each input of its encoder is a panel, drawn from its pixels."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.trained_counts: list[TokenCount] = []  # a conversion does not record them
        self.has_auto = has_router(model)
        routed = known_counts(model) if self.has_auto else ()
        self.offered_counts = by_size([*model.fitted_num_image_tokens, *routed])
        self.pooling: str = model.config.tokenflex["pooling"]

    def prepare(self, picture: Image.Image, max_tiles: int | None) -> Any:
        """Return the outputs of the processor for the picture, and its tiles."""
        if max_tiles is not None:
            raise ValueError(
                f"max_tiles is for TokenFLEX models, got {max_tiles} for a converted "
                f"{self.model.config.model_type}"
            )
        data, (tiles,) = self.processor.process_images([picture])
        return data, tiles

    def encode(self, picture: Image.Image, prepared: Any) -> EncodedPicture:
        """Run the encoder on the outputs of :meth:`prepare`."""
        data, tiles = prepared
        encoded = self.model.encode_images(**on_device(data, self.model.device))
        pixels = data["pixel_values"]
        shown = pixels.flatten(0, -4) if pixels.ndim > 3 else []
        whole = [(1, 1)] * len(encoded)
        if len(shown) == len(encoded) and len({*encoded.grids}) == 1:
            seen = [seen_picture(tile, self.processor.image_processor) for tile in shown]
        else:  # patches in a row, or padded pixels: the whole picture, resized
            seen = [picture] * len(encoded)
        panels = [Panel(*pair) for pair in zip(seen, whole, encoded.grids, strict=True)]
        return _Picture(self, encoded, tiles, panels)


def seen_picture(pixels: torch.Tensor, image_processor: Any) -> Image.Image:
    """Return the picture of an encoder's normalised pixels, float [3, height, width]."""
    values = to_channel_dimension_format(pixels.float().cpu().numpy(), "channels_last")
    if getattr(image_processor, "do_normalize", False):
        values = values * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    if getattr(image_processor, "do_rescale", True):
        values = values * 255
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
