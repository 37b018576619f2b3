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
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import make_batched_metadata

from tests.dropin.configs import CONFIGS, model_type
from tests.dropin.configs.common import PATCH, PIXELS
from tests.dropin.processors import picture, stock_processor
from tokenflex.dropin.families import family_of

_SQUARE = {"height": PIXELS, "width": PIXELS}
_EDGE = {"size": {"shortest_edge": PIXELS}, "crop_size": _SQUARE}


def _patches(family: str, frames: int = 1) -> tuple[str, dict[str, Any]]:
    pixels = {"shortest_edge": 32 * 32, "longest_edge": frames * PIXELS * PIXELS}
    return f"{family}VideoProcessor", {"patch_size": PATCH, "merge_size": 2, "size": pixels}


VIDEO_PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "exaone4_5"), _patches("Qwen2VL")),
    **dict.fromkeys(("hyperclovax_vision_v2",), _patches("Qwen2VL")),
    **dict.fromkeys(("qwen3_vl", "lfm3_vl"), _patches("Qwen3VL", frames=8)),
    "cohere_compass": _patches("CohereCompass", frames=8),
    "glm4v": _patches("Glm4v", frames=8),
    "glm46v": _patches("Glm46V", frames=8),
    "llava_onevision": ("LlavaOnevisionVideoProcessor", {"size": _SQUARE}),
    "internvl": ("InternVLVideoProcessor", {"size": _SQUARE}),
    "llava_next_video": ("LlavaNextVideoVideoProcessor", _EDGE),
    "video_llava": ("VideoLlavaVideoProcessor", _EDGE),
    "smolvlm": (
        "SmolVLMVideoProcessor",
        {"size": {"longest_edge": PIXELS}, "max_image_size": {"longest_edge": PIXELS}},
    ),
}
"""The class of each family's video processor, and its options."""

PROCESSOR_OF = {
    **dict.fromkeys(
        ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "cosmos3_omni"), "qwen3_vl"
    ),
    **dict.fromkeys(("glm4v_moe",), "glm4v"),
    **dict.fromkeys(("glm_ocr", "glmga"), "glm46v"),
}
"""The family whose processor a model's videos go through, where that has none in the tests."""

_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_TEXTS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "exaone4_5", "lfm3_vl"), _VIDEO),
    "hyperclovax_vision_v2": _VIDEO,
    "cohere_compass": "<|VISION_START|><|VIDEO_PAD|><|VISION_END|>",
    **dict.fromkeys(("glm4v", "glm46v"), "<|begin_of_video|><|video|><|end_of_video|>"),
}
"""The text for a video in a prompt, unless it is "<video>"."""

MODELS = [
    name
    for name in sorted(CONFIGS)
    if family_of(SimpleNamespace(model_type=model_type(name))).takes_videos
]
NAMES = [name for name in MODELS if PROCESSOR_OF.get(name, name) in VIDEO_PROCESSORS]
HAS_TORCHVISION = find_spec("torchvision") is not None


def clip(seed: int, pictures: int, height: int = PIXELS, width: int = PIXELS) -> list[Image.Image]:
    """Return the pictures of a clip."""
    return [picture(100 * seed + i, height, width) for i in range(pictures)]


def video_text(name: str) -> str:
    """Return the text for a video in a prompt."""
    return VIDEO_TEXTS.get(PROCESSOR_OF.get(name, name), "<video>")


def processor_with_videos(name: str) -> Any:
    """Return a stock processor with a video processor, and a chat template that shows videos."""
    name = PROCESSOR_OF.get(name, name)
    processor = stock_processor(name)
    cls, options = VIDEO_PROCESSORS[name]
    if HAS_TORCHVISION:
        processor.video_processor = getattr(transformers, cls)(**options)
    else:
        processor.video_processor = StandIn("merge_size" in options, name == "smolvlm")
    if name == "smolvlm" and processing_smolvlm.num2words is None:  # of a package of this name
        processing_smolvlm.num2words = str
    processor.chat_template = processor.chat_template.replace(
        "{% else %}", "{% elif c['type'] == 'video' %}" + video_text(name) + " {% else %}"
    )
    return processor


class StandIn:
    """A video processor without torchvision."""

    valid_kwargs = VideosKwargs
    num_frames = fps = size = None
    merge_size = 2

    def __init__(self, cuts_patches: bool, do_pad: bool) -> None:
        self.cuts_patches, self.do_pad = cuts_patches, do_pad
        self.temporal_patch_size = 2 if cuts_patches else None
        self.model_input_names = ["pixel_values" if do_pad else "pixel_values_videos"]
        self.model_input_names += ["video_grid_thw"] if cuts_patches else []

    def __call__(self, videos: Sequence[torch.Tensor], **options: Any) -> dict[str, Any]:
        clips = [video.float() / 127.5 - 1 for video in videos]
        metadata = {"video_metadata": make_batched_metadata(clips, options.get("video_metadata"))}
        if self.do_pad:
            most = max(map(len, clips))
            clips = [torch.cat([c, c.new_zeros(most - len(c), *c.shape[1:])]) for c in clips]
            mask = torch.stack(clips).any(2).long()
            return {"pixel_values": torch.stack(clips), "pixel_attention_mask": mask, **metadata}
        if not self.cuts_patches:
            return {"pixel_values_videos": torch.stack(clips), **metadata}
        if any(len(c) < 2 for c in clips):  # as those of Qwen3-VL and GLM
            raise ValueError("t:1 must be larger than temporal_factor:2")
        clips = [torch.cat([c, c[-1:]]) if len(c) % 2 else c for c in clips]
        grids = [[len(c) // 2, c.shape[2] // PATCH, c.shape[3] // PATCH] for c in clips]
        return {
            "pixel_values_videos": torch.cat([_cells(pixels) for pixels in clips]),
            "video_grid_thw": torch.tensor(grids),
            **metadata,
        }


def _cells(pixels: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] -> the patches of pairs of pictures, those of a merged cell together."""
    cells = pixels.unflatten(3, (-1, 2, PATCH)).unflatten(2, (-1, 2, PATCH)).unflatten(0, (-1, 2))
    # [t, 2, 3, h, 2, PATCH, w, 2, PATCH] -> [t, h, w, 2, 2, 3, 2, PATCH, PATCH]
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)
