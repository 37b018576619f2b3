"""The two kinds of models that a playground asks: TokenFLEX models and converted stock models.

Both encode a picture once. For every count a model then gets ``generate``'s inputs, made of the
same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

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

Shown: TypeAlias = "Image.Image | list[Image.Image]"
"""A picture, or the frames of a clip."""


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
        takes_clips: Whether the frames of a clip may stand in the place of a picture.
        pooling: The projector's pooling, "adaptive" or "resize".
    """

    trained_counts: list[TokenCount]
    offered_counts: list[TokenCount]
    has_auto: bool
    takes_clips: bool
    pooling: str

    def prepare(self, picture: Shown, max_tiles: int | None) -> Any:
        """Return the encoder's inputs."""

    def encode(self, picture: Shown, prepared: Any) -> EncodedPicture:
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


def prompt_of(processor: Any, question: str, frames: int | None = None) -> str:
    """Return the prompt of a question about one picture or clip, in the processor's chat template.

    It stands before the question, or where the question names it (``<image>``, ``<video>``).

    Args:
        processor: The processor.
        question: The question.
        frames: Frames of the clip; None for a picture.
    """
    shown = {"type": "image" if frames is None else "video"}
    content = parts_of(question, with_videos=frames is not None)
    if shown not in content:
        content = [shown, *content]
    messages = [{"role": "user", "content": content}]
    try:
        prompt: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"chat_template cannot be rendered: {error}") from error
    return prompt if frames is None else processor.show_frames(prompt, [frames])


# ---- TokenFLEX models


class TokenFlexSubject:
    """A TokenFLEX model. A picture cut into tiles is one panel, and its thumbnail another.

    Each frame of a clip is a panel.
    """

    takes_clips = True

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

    def prepare(self, picture: Shown, max_tiles: int | None) -> Any:
        """Return the outputs of the image processor, tiles of each image, (rows, columns) of them.

        The frames of a clip are one tile each.
        """
        if isinstance(picture, list):
            data, tiles = self.processor.process_images(picture, max_tiles=1)
            return data, tiles, (1, 1)
        data, tiles = self.processor.process_images([picture], max_tiles=max_tiles)
        grid = self.processor.tile_grid((picture.height, picture.width), max_tiles)
        return data, tiles, grid

    def encode(self, picture: Shown, prepared: Any) -> EncodedPicture:
        """Run the encoder on the outputs of :meth:`prepare`."""
        data, tiles, grid = prepared
        pixels = data["pixel_values"]
        encoded = self.model.encode_images(**on_device(data, self.model.device))
        image_processor = self.processor.image_processor
        is_cropped = getattr(image_processor, "do_center_crop", False)
        is_clip = isinstance(picture, list)
        pictures = picture if isinstance(picture, list) else [picture]
        if is_cropped and len(tiles) == sum(tiles):  # its edges are cut off
            pictures = [seen_picture(tile, image_processor) for tile in pixels]
        panels = [
            Panel(*panel)
            for panel in zip(pictures, [grid] * len(pictures), encoded.grids, strict=False)
        ]
        if sum(tiles) > len(tiles) * grid[0] * grid[1]:
            panels.append(Panel(pictures[0], (1, 1), encoded.grids[-1]))  # the thumbnail
        return _Picture(self, encoded, tiles, panels, is_clip)


@dataclass(frozen=True)
class _Picture:
    subject: TokenFlexSubject | ConvertedSubject
    encoded: Any
    tiles_per_image: list[int]
    panels: list[Panel]
    is_clip: bool

    @property
    def tiles(self) -> int:
        return sum(self.tiles_per_image)

    def read(self, question: str, count: TokenCount | str) -> dict[str, Any]:
        model, processor = self.subject.model, self.subject.processor
        if self.is_clip and isinstance(count, str):
            raise ValueError(f"counts must be numbers or grids for a clip, got {count!r}")
        frames = len(self.tiles_per_image) if self.is_clip else None
        prompt = prompt_of(processor, question, frames)
        inputs = processor.encode_text(
            [[prompt]],
            self.tiles_per_image,
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

    takes_clips = False

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        trained = getattr(model.config, "trained_num_image_tokens", None)
        self.trained_counts = by_size(trained or ())
        self.has_auto = has_router(model)
        routed = known_counts(model) if self.has_auto else ()
        self.offered_counts = by_size([*model.fitted_num_image_tokens, *routed])
        self.pooling: str = model.config.tokenflex["pooling"]

    def prepare(self, picture: Any, max_tiles: int | None) -> Any:
        """Return the outputs of the processor for the picture, and its tiles."""
        if max_tiles is not None:
            raise ValueError(
                f"max_tiles is for TokenFLEX models, got {max_tiles} for a converted "
                f"{self.model.config.model_type}"
            )
        return self.processor.process_images([picture])

    def encode(self, picture: Any, prepared: Any) -> EncodedPicture:
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
        return _Picture(self, encoded, tiles, panels, is_clip=False)


def seen_picture(pixels: torch.Tensor, image_processor: Any) -> Image.Image:
    """Return the picture of an encoder's normalised pixels, float [3, height, width]."""
    values = to_channel_dimension_format(pixels.float().cpu().numpy(), "channels_last")
    if getattr(image_processor, "do_normalize", False):
        values = values * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    if getattr(image_processor, "do_rescale", True):
        values = values * 255
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
