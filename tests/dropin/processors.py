"""Each family's own processor around a tokenizer of a hundred words; no file is read.

Where transformers builds a processor only with torchvision, for videos, a stand-in takes the video
processor's place; where it has no image processor without torchvision, there is none here either.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from tests.dropin.tiny import IMAGE, PATCH, PIXELS, VOCABULARY

_SQUARE = {"height": PIXELS, "width": PIXELS}
_EDGE = {"shortest_edge": PIXELS}
_PINPOINTS = [[64, 64], [64, 128], [128, 64], [128, 128]]
_IDEFICS_TAGS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"] + [
    f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)
]
_AYA_TAGS = ["<video>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"] + [
    f"TILE{tile}" for tile in ("", "_GLOBAL", "_1", "_2", "_3", "_4")
]
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE_TEXT {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def tokenizer(placeholder: str, tags: list[str], **attributes: str) -> PreTrainedTokenizerFast:
    """Whole words; ``placeholder`` is token 50, as in the tiny models."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "a", "cat", "user", "assistant"]
    words += [f"w{i}" for i in range(len(words), IMAGE)]
    words += [placeholder, *tags]
    words += [f"w{i}" for i in range(len(words), VOCABULARY)]
    words_to_ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=attributes,
    )
    special = [AddedToken(tag, normalized=False, special=True) for tag in [placeholder, *tags]]
    fast.add_tokens(special, special_tokens=True)
    return fast


class _NoVideos:
    """Where a video processor would be."""

    model_input_names: list[str] = []
    num_frames = fps = size = None


@contextmanager
def _without_torchvision() -> Iterator[None]:
    from transformers.models.smolvlm import processing_smolvlm

    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"),
        mock.patch.object(processing_smolvlm, "num2words", object),
    ):
        yield


def _with_video_stand_in(name: str, cls: str, *parts: Any, **options: Any) -> Any:
    module = importlib.import_module(f"transformers.models.{name}.processing_{name}")
    with _without_torchvision():
        return getattr(module, cls)(*parts, _NoVideos(), **options)


def _qwen(name: str, cls: str) -> Any:
    tags = ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    return _with_video_stand_in(
        name,
        cls,
        transformers.Qwen2VLImageProcessor(
            patch_size=PATCH, merge_size=2, min_pixels=32 * 32, max_pixels=PIXELS * PIXELS
        ),
        tokenizer("<|image_pad|>", tags),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "llava": lambda: transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=_EDGE, crop_size=_SQUARE),
        tokenizer("<image>", [], image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "llava-siglip": lambda: transformers.LlavaProcessor(
        transformers.SiglipImageProcessor(size=_SQUARE),
        tokenizer("<image>", [], image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
    ),
    "vipllava": lambda: transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=_EDGE, crop_size=_SQUARE),
        tokenizer("<image>", [], image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "llava_next": lambda: transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size=_EDGE, crop_size=_SQUARE, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer("<image>", [], image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "llava_onevision": lambda: _with_video_stand_in(
        "llava_onevision",
        "LlavaOnevisionProcessor",
        transformers.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=_PINPOINTS),
        tokenizer("<image>", ["<video>"]),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
    ),
    "internvl": lambda: _with_video_stand_in(
        "internvl",
        "InternVLProcessor",
        transformers.GotOcr2ImageProcessor(
            size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer(
            "<IMG_CONTEXT>",
            ["<video>", "<img>", "</img>"],
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_seq_length=16,
    ),
    "gemma3": lambda: transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=_SQUARE),
        tokenizer(
            "<image_soft_token>",
            ["<video>", "<start_of_image>", "<end_of_image>"],
            boi_token="<start_of_image>",
            image_token="<image_soft_token>",
            eoi_token="<end_of_image>",
        ),
        image_seq_length=16,
    ),
    "paligemma": lambda: transformers.PaliGemmaProcessor(
        _paligemma_images(), tokenizer("<image>", [], image_token="<image>")
    ),
    "idefics3": lambda: transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(
            size={"longest_edge": 2 * PIXELS}, max_image_size={"longest_edge": PIXELS}
        ),
        tokenizer("<image>", _IDEFICS_TAGS),
        image_seq_len=16,
    ),
    "smolvlm": lambda: _with_video_stand_in(
        "smolvlm",
        "SmolVLMProcessor",
        transformers.SmolVLMImageProcessor(
            size={"longest_edge": 2 * PIXELS}, max_image_size={"longest_edge": PIXELS}
        ),
        tokenizer("<image>", ["<video>", *_IDEFICS_TAGS]),
        image_seq_len=16,
    ),
    "qwen2_vl": lambda: _qwen("qwen2_vl", "Qwen2VLProcessor"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor"),
    "qwen3_vl": lambda: _qwen("qwen3_vl", "Qwen3VLProcessor"),
    "aya_vision": lambda: transformers.AyaVisionProcessor(
        transformers.GotOcr2ImageProcessor(
            size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer(
            "<|IMG_PATCH|>",
            _AYA_TAGS,
        ),
        patch_size=PATCH,
        img_size=PIXELS,
        downsample_factor=2,
    ),
    "janus": lambda: transformers.JanusProcessor(
        transformers.JanusImageProcessor(size=_SQUARE),
        tokenizer(
            "<image_placeholder>",
            ["<video>", "<begin_of_image>", "<end_of_image>"],
            image_token="<image_placeholder>",
            boi_token="<begin_of_image>",
            eoi_token="<end_of_image>",
        ),
        num_image_tokens=64,
    ),
    "deepseek_vl": lambda: transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessor(size=_SQUARE),
        tokenizer("<image_placeholder>", [], image_token="<image_placeholder>"),
        num_image_tokens=64,
    ),
    "got_ocr2": lambda: transformers.GotOcr2Processor(
        transformers.GotOcr2ImageProcessor(size=_SQUARE),
        tokenizer("<imgpad>", ["<img>", "</img>"]),
    ),
}

# Families whose images transformers 5.23 processes with torchvision alone.
_WITH_TORCHVISION: dict[str, Callable[[], Any]] = {
    "mistral3": lambda: transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(
            size={"longest_edge": PIXELS}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer("[IMG]", ["[IMG_BREAK]", "[IMG_END]"]),
        patch_size=PATCH,
        spatial_merge_size=2,
    ),
    "llava-pixtral": lambda: transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(
            size={"longest_edge": PIXELS}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer("[IMG]", ["[IMG_BREAK]", "[IMG_END]"]),
        patch_size=PATCH,
    ),
    "cohere2_vision": lambda: transformers.Cohere2VisionProcessor(
        transformers.Cohere2VisionImageProcessor(
            size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, patch_size=4
        ),
        tokenizer(
            "<image>",
            ["<video>", "<boi>", "<eoi>", "<break>"],
            boi_token="<boi>",
            eoi_token="<eoi>",
            image_token="<image>",
            img_line_break_token="<break>",
        ),
    ),
    "lfm2_vl": lambda: transformers.Lfm2VlProcessor(
        transformers.Lfm2VlImageProcessor(
            encoder_patch_size=PATCH,
            tile_size=PIXELS,
            min_image_tokens=4,
            max_image_tokens=16,
            max_pixels_tolerance=1.0,
        ),
        tokenizer(
            "<image>",
            ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
            + [f"<|img_row_{row}_col_{column}|>" for row in (1, 2, 3) for column in (1, 2, 3)],
        ),
    ),
}
_BUILDERS |= _WITH_TORCHVISION

# What stands for an image in a prompt, where it is not the placeholder itself.
_IN_PROMPTS = {
    "gemma3": "<start_of_image>",
    "aya_vision": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
PROCESSORS = sorted(_BUILDERS)
NEED_TORCHVISION = sorted(_WITH_TORCHVISION)


def _paligemma_images() -> Any:
    images = transformers.SiglipImageProcessor(size=_SQUARE)
    images.image_seq_length = 64
    return images


def stock_processor(name: str) -> Any:
    processor = _BUILDERS[name]()
    processor.chat_template = _TEMPLATE.replace("IMAGE_TEXT", image_text(name))
    return processor


def image_text(name: str) -> str:
    """What a user writes into a prompt for an image."""
    tokens = {
        "internvl": "<IMG_CONTEXT>",
        "janus": "<image_placeholder>",
        "deepseek_vl": "<image_placeholder>",
        "got_ocr2": "<imgpad>",
        "mistral3": "[IMG]",
        "llava-pixtral": "[IMG]",
    }
    return _IN_PROMPTS.get(name, tokens.get(name, "<image>"))


def picture(seed: int, height: int = PIXELS, width: int = PIXELS) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
