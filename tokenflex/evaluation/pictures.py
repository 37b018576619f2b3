"""The pictures in the inputs of an encoder, to be read, resized and put back.

Inputs hold whole pictures, or patches that a processor has cut already: these are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tokenflex.counts import Grid

# Image processors that cut pictures to blocks of patches: [C, frames, patch, patch] of each, row by
# row within a block, and the blocks row by row. Their names go on with that of the backend.
BLOCK_PROCESSORS = ("Qwen2VLImageProcessor", "Glm4vImageProcessor")


def resize(pixels: torch.Tensor, size: Grid) -> torch.Tensor:
    """Resize pictures [.., C, H, W] to (height, width), without aliasing where they get smaller."""
    pictures = pixels.reshape(-1, *pixels.shape[-3:]).float()
    resized = F.interpolate(pictures, size, mode="bilinear", antialias=True, align_corners=False)
    return resized.to(pixels.dtype).view(*pixels.shape[:-2], *size)


def with_detail_of(pixels: torch.Tensor, size: Grid) -> torch.Tensor:
    """Return pictures [.., C, H, W] with the detail of ``size``: made so small, and large again."""
    return resize(resize(pixels, size), (pixels.shape[-2], pixels.shape[-1]))


@dataclass(frozen=True)
class EncoderPictures:
    """The pictures of a batch.

    Attributes:
        pictures: [.., C, H, W] each, as the encoder gets them: normalised.
        unit: (height, width) in pixels that sides are multiples of; None where the encoder takes
            pictures of these sizes only.
        inputs_of: Returns the encoder's inputs with other pictures in the place of these. Their
            sides may only differ in multiples of ``unit``.
    """

    pictures: list[torch.Tensor]
    unit: Grid | None
    inputs_of: Callable[[Sequence[torch.Tensor]], dict[str, Any]]


def read_pictures(
    image_inputs: Mapping[str, Any], image_processor: Any, patch: Grid | None
) -> EncoderPictures | None:
    """Return the pictures of a batch; None where the inputs are patches of an unknown order.

    Args:
        image_inputs: What the processor's ``process_images`` returned, for at least one tile.
        image_processor: The processor's image processor.
        patch: (height, width) in pixels of a patch of a TokenFLEX model; None for converted models.
    """
    pixels = image_inputs["pixel_values"]
    if not isinstance(pixels, torch.Tensor):
        return None
    if patch is not None:
        return (
            _pictures_of_patches(image_inputs, patch)
            if pixels.ndim == 3
            else (_whole_pictures(image_inputs, patch))
        )
    if type(image_processor).__name__.startswith(BLOCK_PROCESSORS):
        return _pictures_of_blocks(image_inputs, image_processor)
    if pixels.ndim < 4 or "image_grid_thw" in image_inputs:
        return None
    return _whole_pictures(image_inputs, None)


def _whole_pictures(image_inputs: Mapping[str, Any], patch: Grid | None) -> EncoderPictures:
    pixels = image_inputs["pixel_values"]

    def inputs_of(pictures: Sequence[torch.Tensor]) -> dict[str, Any]:
        (changed,) = pictures
        inputs = {**image_inputs, "pixel_values": changed}
        if patch is not None and changed.shape != pixels.shape:
            grid = changed.shape[-2] // patch[0], changed.shape[-1] // patch[1]
            inputs["grids"] = [grid] * len(changed)
        return inputs

    return EncoderPictures([pixels], patch, inputs_of)


def _pictures_of_patches(image_inputs: Mapping[str, Any], patch: Grid) -> EncoderPictures:
    """Read the inputs of NaFlex encoders: [images, patches, height * width * C] and padding."""
    pixels, grids = image_inputs["pixel_values"], image_inputs["grids"]
    height, width = patch
    pictures = [
        rows[: h * w].view(h, w, height, width, -1).permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
        for rows, (h, w) in zip(pixels, grids, strict=True)
    ]

    def inputs_of(pictures: Sequence[torch.Tensor]) -> dict[str, Any]:
        packed, new_grids = torch.zeros_like(pixels), []
        for rows, picture in zip(packed, pictures, strict=True):
            h, w = picture.shape[1] // height, picture.shape[2] // width
            cut = picture.reshape(-1, h, height, w, width).permute(1, 3, 2, 4, 0)
            rows[: h * w] = cut.reshape(h * w, -1)
            new_grids.append((h, w))
        return {**image_inputs, "pixel_values": packed, "grids": new_grids}

    return EncoderPictures(pictures, patch, inputs_of)


def _pictures_of_blocks(
    image_inputs: Mapping[str, Any], image_processor: Any
) -> EncoderPictures | None:
    """Read the inputs of ``BLOCK_PROCESSORS``: [patches, C * frames * patch**2] of all images."""
    pixels, shapes = image_inputs["pixel_values"], image_inputs["image_grid_thw"].tolist()
    patch, merge = image_processor.patch_size, image_processor.merge_size
    frames = image_processor.temporal_patch_size
    if any(number != 1 for number, *_ in shapes):
        return None
    parts = pixels.split([h * w for _, h, w in shapes])
    pictures = [
        rows.view(h // merge, w // merge, merge, merge, -1, frames, patch, patch)
        .permute(5, 4, 0, 2, 6, 1, 3, 7)
        .reshape(frames, -1, h * patch, w * patch)
        for rows, (_, h, w) in zip(parts, shapes, strict=True)
    ]

    def inputs_of(pictures: Sequence[torch.Tensor]) -> dict[str, Any]:
        parts, new_shapes = [], []
        for picture in pictures:
            h, w = picture.shape[-2] // patch, picture.shape[-1] // patch
            cut = picture.reshape(frames, -1, h // merge, merge, patch, w // merge, merge, patch)
            parts.append(cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(h * w, -1))
            new_shapes.append((1, h, w))
        grid = image_inputs["image_grid_thw"].new_tensor(new_shapes)
        return {**image_inputs, "pixel_values": torch.cat(parts), "image_grid_thw": grid}

    unit = merge * patch
    return EncoderPictures(pictures, (unit, unit), inputs_of)
