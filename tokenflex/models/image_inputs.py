"""Images of a call: one, a list, or a list per prompt, of anything that holds a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenflex.counts import Grid
from tokenflex.images import load_image


@dataclass(frozen=True)
class NamedImage:
    """An image as the caller gave it, and what errors call it."""

    source: Any
    name: str


def name_images(images: Any, name: str = "images") -> tuple[list[NamedImage], list[int] | None]:
    """Bring the images of a call into one list, in order of appearance.

    Args:
        images: An image, a list of images, or a list of those per prompt. An array or tensor of
            four dimensions is a list of images.
        name: What errors call them.

    Returns:
        The images; and how many each prompt has, where they come as a list per prompt, else None.

    Raises:
        ValueError: Lists are nested more deeply.
    """
    if not _is_list(images):
        return [_named(images, name)], None
    nested = any(_is_list(entry) for entry in images)
    if not nested:
        return [_named(image, f"{name}[{i}]") for i, image in enumerate(images)], None
    flat, per_prompt = [], []
    for i, entry in enumerate(images):
        group = entry if _is_list(entry) else [entry]
        if any(_is_list(image) for image in group):
            raise ValueError(
                f"{name} must be an image, a list of images or a list of those per prompt, got "
                f"further lists in {name}[{i}]"
            )
        flat += [_named(image, f"{name}[{i}][{j}]") for j, image in enumerate(group)]
        per_prompt.append(len(group))
    return flat, per_prompt


def _is_list(images: Any) -> bool:
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim == 4
    return isinstance(images, (list, tuple))


def _named(image: Any, name: str) -> NamedImage:
    return image if isinstance(image, NamedImage) else NamedImage(image, name)


def read_image(
    image: NamedImage, *, keep_floats: bool, channels_first: bool | None = None
) -> Image.Image | np.ndarray:
    """Read an image as upright RGB pixels.

    Args:
        image: Whatever :func:`tokenflex.images.load_image` takes.
        keep_floats: Leave an array or tensor of floats as it is, [3, H, W].
        channels_first: The layout of arrays and tensors; None guesses it from their shape.

    Raises:
        FileNotFoundError, OSError, TypeError, ValueError: It cannot be read.
    """
    source, name = image.source, image.name
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        return load_image(source, name)
    if channels_first is None:
        channels_first = isinstance(source, torch.Tensor)
    else:  # load_image takes tensors for channels first, arrays for channels last
        source = torch.as_tensor(source) if channels_first else np.asarray(source)
    is_float = (
        source.is_floating_point() if isinstance(source, torch.Tensor) else source.dtype.kind == "f"
    )
    if not (keep_floats and is_float):
        return load_image(source, name)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().float().numpy()
    if source.ndim == 2:
        pixels = source[None]
    elif source.shape[-1] in (1, 3) and not (channels_first and source.shape[0] in (1, 3)):
        pixels = np.moveaxis(source, -1, 0)
    else:
        pixels = source
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.size:
        raise ValueError(
            f"{name} must have 1 or 3 channels where do_rescale=False keeps floats as they are, "
            f"got shape {list(source.shape)}"
        )
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])))


def read_images(
    images: Sequence[NamedImage], image_processor: Any, options: Mapping[str, Any]
) -> list[Any]:
    """Read the images of a call, as the options of the image processor say.

    Args:
        images: The images.
        image_processor: A transformers image processor.
        options: Of the call. ``input_data_format`` is the layout of arrays and tensors; the images
            that are read no longer need it.
    """
    layout = options.get("input_data_format")
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(
            "input_data_format must be 'channels_first' or 'channels_last', got "
            f"{str(layout)[:40]!r}"
        )
    do_rescale = options.get("do_rescale")
    if do_rescale is None:
        do_rescale = getattr(image_processor, "do_rescale", True)
    return [
        read_image(
            image,
            keep_floats=do_rescale is False,
            channels_first=None if layout is None else layout == "channels_first",
        )
        for image in images
    ]


def pixel_size(image: Any, name: str) -> Grid:
    """Return (height, width) of an image as it is cut, or of a (height, width) pair itself."""
    if isinstance(image, (tuple, list)):
        height, width = image
        return int(height), int(width)
    width, height = load_image(image, name).size
    return height, width


def stack_sizes(pixel_values: Sequence[Any]) -> list[Grid]:
    """Return (height, width) in pixels of each processed image."""
    return [(int(np.shape(one)[-2]), int(np.shape(one)[-1])) for one in pixel_values]
