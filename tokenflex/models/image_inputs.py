"""Images of a call: one, a list, or a list per prompt, of anything that holds a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenflex.images import channels_last, load_image


@dataclass(frozen=True)
class NamedImage:
    """An image as the caller gave it, and its name in errors."""

    source: Any
    name: str


def name_images(images: Any, name: str = "images") -> tuple[list[NamedImage], list[int] | None]:
    """Bring the images of a call into one list, in order of appearance.

    Args:
        images: an image, a list of images, or a list of those per prompt. An array or tensor of
            four dimensions is a list of images.
        name: their name in errors.

    Returns:
        The images; and the number of each prompt's images where they come as a list per prompt,
        else None.

    Raises:
        ValueError: lists are nested more deeply.
    """
    if not _is_list(images):
        return [_named(images, name)], None
    if not any(_is_list(entry) for entry in images):
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


def read_images(
    images: Sequence[NamedImage], image_processor: Any, options: Mapping[str, Any]
) -> list[Image.Image | np.ndarray]:
    """Read the images of a call as upright RGB pixels, as the image processor's options say.

    ``input_data_format`` is the layout of arrays and tensors, guessed from their shape by default.
    With ``do_rescale=False`` floats are not brought to 8 bits, and become arrays [3, H, W].

    Raises:
        FileNotFoundError, OSError, TypeError, ValueError: an image cannot be read.
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
    read = []
    for image in images:
        source = image.source
        if layout is not None and isinstance(source, (np.ndarray, torch.Tensor)):
            # load_image takes tensors for channels first, and arrays for channels last.
            first = layout == "channels_first"
            source = torch.as_tensor(source) if first else np.asarray(source)
        keeps_floats = do_rescale is False and _holds_floats(source)
        read.append((_float_pixels if keeps_floats else load_image)(source, image.name))
    return read


def _holds_floats(source: Any) -> bool:
    if isinstance(source, torch.Tensor):
        return source.is_floating_point()
    return isinstance(source, np.ndarray) and source.dtype.kind == "f"


def _float_pixels(source: torch.Tensor | np.ndarray, name: str) -> np.ndarray:
    """Return floats as they are, as [3, H, W]."""
    if isinstance(source, torch.Tensor):
        source = source.float()
    try:
        pixels = np.atleast_3d(channels_last(source, channels=(1, 3)))
    except ValueError:
        raise ValueError(
            f"{name} must have 1 or 3 channels where do_rescale=False keeps floats as they are, "
            f"got shape {list(source.shape)}"
        ) from None
    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))
