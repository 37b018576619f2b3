"""Clips for the families that take videos, and video processors for them.

transformers has video processors only with torchvision. Beside it the tests use the family's own;
without it a stand-in that cuts clips into the same patches, and neither resizes nor normalises as
the family does.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import VideosKwargs
from transformers.video_utils import make_batched_metadata

from tests.dropin.configs import CONFIGS, model_type
from tests.dropin.configs.common import PATCH, PIXELS
from tests.dropin.processors import PROCESSORS, picture, stock_processor
from tokenflex.dropin.families import family_of

_SQUARE = {"height": PIXELS, "width": PIXELS}
_QWEN_PIXELS = {"shortest_edge": 32 * 32, "longest_edge": PIXELS * PIXELS}
_QWEN = ("Qwen2VLVideoProcessor", {"patch_size": PATCH, "merge_size": 2, "size": _QWEN_PIXELS})
_STACKED = {"llava_onevision": "LlavaOnevision", "internvl": "InternVL"}
VIDEO_PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    **{name: (f"{family}VideoProcessor", {"size": _SQUARE}) for name, family in _STACKED.items()},
}
"""The class of each family's video processor, and its options."""

_QWEN_TEXT = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_TEXTS = {"qwen2_vl": _QWEN_TEXT, "qwen2_5_vl": _QWEN_TEXT}
"""The text for a video in a prompt, unless it is "<video>"."""

MODELS = [
    name
    for name in sorted(CONFIGS)
    if family_of(SimpleNamespace(model_type=model_type(name))).takes_videos
]
NAMES = [name for name in PROCESSORS if name in VIDEO_PROCESSORS]
HAS_TORCHVISION = find_spec("torchvision") is not None


def clip(seed: int, pictures: int, height: int = PIXELS, width: int = PIXELS) -> list[Image.Image]:
    """Return the pictures of a clip."""
    return [picture(100 * seed + i, height, width) for i in range(pictures)]


def video_text(name: str) -> str:
    """Return the text for a video in a prompt."""
    return VIDEO_TEXTS.get(name, "<video>")


def processor_with_videos(name: str) -> Any:
    """Return a stock processor with a video processor, and a chat template that shows videos."""
    processor = stock_processor(name)
    cls, options = VIDEO_PROCESSORS[name]
    if HAS_TORCHVISION:
        processor.video_processor = getattr(transformers, cls)(**options)
    else:
        processor.video_processor = StandIn("merge_size" in options)
    processor.chat_template = processor.chat_template.replace(
        "{% else %}", "{% elif c['type'] == 'video' %}" + video_text(name) + " {% else %}"
    )
    return processor


class StandIn:
    """A video processor without torchvision."""

    valid_kwargs = VideosKwargs
    num_frames = fps = size = None
    merge_size = 2

    def __init__(self, cuts_patches: bool) -> None:
        self.cuts_patches = cuts_patches
        self.temporal_patch_size = 2 if cuts_patches else None
        self.model_input_names = ["pixel_values_videos"]
        self.model_input_names += ["video_grid_thw"] if cuts_patches else []

    def __call__(self, videos: Sequence[torch.Tensor], **options: Any) -> dict[str, Any]:
        clips = [video.float() / 127.5 - 1 for video in videos]
        metadata = make_batched_metadata(clips, options.get("video_metadata"))
        if not self.cuts_patches:
            return {"pixel_values_videos": torch.stack(clips), "video_metadata": metadata}
        clips = [
            torch.cat([pixels, pixels[-1:]]) if len(pixels) % 2 else pixels for pixels in clips
        ]
        grids = [
            [len(pixels) // 2, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH]
            for pixels in clips
        ]
        return {
            "pixel_values_videos": torch.cat([_patches(pixels) for pixels in clips]),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": metadata,
        }


def _patches(pixels: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] -> the patches of pairs of pictures, those of a merged cell together."""
    cells = pixels.unflatten(3, (-1, 2, PATCH)).unflatten(2, (-1, 2, PATCH)).unflatten(0, (-1, 2))
    # [t, 2, 3, h, 2, PATCH, w, 2, PATCH] -> [t, h, w, 2, 2, 3, 2, PATCH, PATCH]
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)
