"""The prompts of a processor's call, and the images that they show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def read_prompts(
    text: Any, image_token: str, num_images: int, per_group: Sequence[int] | None = None
) -> tuple[list[str], list[int] | None]:
    """Check the prompts of a call and return them as one list.

    Args:
        text: None, a prompt, a list of prompts, or a list of lists: prompts in an inner list share
            their images.
        image_token: stands in a prompt once for each of its images.
        num_images: images of the call; shared ones count once.
        per_group: images of each prompt or inner list, where they are given so.

    Returns:
        The prompts; and for inner lists the image that each placeholder shows, else None.

    Raises:
        TypeError: a prompt is no string.
        ValueError: there are none, or placeholders and images do not fit together.
    """
    if text is None:
        return [], None
    if not isinstance(text, (str, list, tuple)):
        raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
    entries = [text] if isinstance(text, str) else list(text)
    if not entries:
        raise ValueError("text must hold at least one prompt, got an empty list")
    are_shared = any(isinstance(entry, (list, tuple)) for entry in entries)
    prompts: list[str] = []
    placeholders: list[int] = []
    image_index: list[int] = []
    for i, entry in enumerate(entries):
        name = f"text[{i}]"
        if are_shared and not isinstance(entry, (list, tuple)):
            raise TypeError(f"{name} must be a list as others are, got {type(entry).__name__}")
        group = list(entry) if are_shared else [entry]
        if not group:
            raise ValueError(f"{name} must hold at least one prompt, got an empty list")
        for j, prompt in enumerate(group):
            if not isinstance(prompt, str):
                prompt_name = f"{name}[{j}]" if are_shared else name
                raise TypeError(f"{prompt_name} must be a string, got {type(prompt).__name__}")
        counts = [prompt.count(image_token) for prompt in group]
        if len({*counts}) > 1:
            raise ValueError(
                f"{name}: prompts that share their images must each hold one {image_token} per "
                f"image, got {counts}"
            )
        first = sum(placeholders)
        image_index += [*range(first, first + counts[0])] * len(group)
        placeholders.append(counts[0])
        prompts += group
    if per_group is not None and [*per_group] != placeholders:
        # Equal totals would show a prompt the image of another.
        raise ValueError(
            f"text: the number of {image_token} tokens in the prompts should be the same "
            f"as the number of images of each, got {placeholders} for {per_group} images"
        )
    if sum(placeholders) != num_images:
        raise ValueError(
            f"text: the number of {image_token} tokens in the prompts should be the same "
            f"as the number of images, got {sum(placeholders)} (per prompt {placeholders}) for "
            f"{num_images} images"
        )
    return prompts, image_index if are_shared else None


def tiles_of_images(images: Sequence[int], tiles_per_image: Sequence[int]) -> list[int]:
    """Return the tiles of some images, in their order."""
    ends = [*accumulate(tiles_per_image)]
    return [
        tile
        for image in images
        for tile in range(ends[image] - tiles_per_image[image], ends[image])
    ]
