"""The table of families for the tests: image inputs, and a processor where one can be built.

A family needs an entry in ``CONFIGS`` of :mod:`tests.dropin.configs`, and one in ``BUILDERS`` if no
other family has its processor; further entries where it differs from the others. Names may add a
vision tower or a language model to a model type: "llava-pixtral" is a llava.

Token ids have no meaning. Processors have a tokenizer of a hundred words; no file is read. Where
transformers builds a processor only with torchvision, for videos, a stand-in replaces the video
processor; where it has no image processor without torchvision, neither have the tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from tests.dropin.configs import CONFIGS, GRIDS
from tests.dropin.configs.common import (  # noqa: F401  # the other files import them from here
    END,
    IMAGE,
    PATCH,
    PINPOINTS,
    PIXELS,
    START,
    VISION_WIDTH,
    VOCABULARY,
)
from tokenflex_kernels.versions import is_older

# ---- image inputs of the models


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_inputs(name: str, images: Sequence[int]) -> dict[str, Any]:
    """Return the outputs of the family's image processor for square images; an int seeds each."""
    number, side = len(images), PIXELS // PATCH

    def stacked(*shape: int) -> torch.Tensor:
        return torch.stack([pixels(*shape, seed=seed) for seed in images])

    if name in GRIDS:
        return grid_inputs(name, images, [(side, side)] * number)
    if name == "inkling2":
        return cell_inputs(images, [(side // 2, side // 2)] * number)
    if name in MINICPM:
        return minicpm_inputs(images, [(side, side)] * number)
    if name == "granite_docling":
        mask = torch.ones(number, 1, dtype=torch.bool)
        return {
            "pixel_values": stacked(3, PIXELS, PIXELS)[:, None],
            "pixel_attention_mask": mask,
        }
    if name in ("idefics3", "smolvlm", "perception_lm"):
        return {"pixel_values": stacked(3, PIXELS, PIXELS)[:, None]}
    if name in ANYRES:
        # One tile and the whole image: the smallest grid is one tile.
        sizes = torch.tensor([[PIXELS, PIXELS]] * number)
        return {"pixel_values": stacked(2, 3, PIXELS, PIXELS), "image_sizes": sizes}
    if name in PIXTRALS:
        sizes = torch.tensor([[PIXELS, PIXELS]] * number)
        return {"pixel_values": stacked(3, PIXELS, PIXELS), "image_sizes": sizes}
    if name == "lfm2_vl":
        return {
            "pixel_values": stacked(side * side, 3 * PATCH * PATCH),
            "spatial_shapes": torch.tensor([[side, side]] * number),
            "pixel_attention_mask": torch.ones(number, side * side, dtype=torch.long),
        }
    if name == "gemma4":
        return {
            "pixel_values": stacked(side * side, 3 * PATCH * PATCH),
            "image_position_ids": places(side, side).repeat(number, 1, 1),
        }
    return {"pixel_values": stacked(3, PIXELS, PIXELS)}


ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
MINICPM = ("minicpmv4_6", "minicpm_ocr")
PIXTRALS = ("llava-pixtral", "mistral3", "mistral3-mistral4", "mistral_large4", "lighton_ocr")

# The pixels of a patch, where these are not of two frames.
_PATCHES = {
    **dict.fromkeys(
        ("cosmos3_edge", "dots3_note", "ernie4_5_vl_moe", "video_llama_3"), (3 * PATCH * PATCH,)
    ),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), (3, PATCH, PATCH)),
}


def grid_inputs(
    name: str, images: Sequence[int], grids: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return the patches of images of (height, width) patches each; an int seeds each."""
    shape = _PATCHES.get(name, (3 * 2 * PATCH * PATCH,))
    patches = [pixels(h * w, *shape, seed=seed) for seed, (h, w) in zip(images, grids, strict=True)]
    inputs = {
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
    }
    if name == "video_llama_3":
        inputs["image_merge_sizes"] = torch.ones(len(grids), dtype=torch.long)
    return inputs


def cell_inputs(images: Sequence[int], cells: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return images as cells of 2 x 2 patches, (height, width) of them each."""
    side = 2 * PATCH
    return {
        "pixel_values": torch.cat(
            [
                pixels(h * w, side, side, 3, seed=seed)
                for seed, (h, w) in zip(images, cells, strict=True)
            ]
        ),
        "image_grid_thw": torch.tensor([[1, *grid] for grid in cells]),
    }


def minicpm_inputs(images: Sequence[int], grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return images as one row of patches."""
    patches = [
        pixels(3, PATCH, h * w * PATCH, seed=seed)
        for seed, (h, w) in zip(images, grids, strict=True)
    ]
    sizes = torch.tensor(grids, dtype=torch.int32)
    return {"pixel_values": torch.cat(patches, dim=-1)[None], "target_sizes": sizes}


def places(height: int, width: int) -> torch.Tensor:
    """Return the (column, row) of each patch: int64 [height * width, 2]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1)


def tiles_per_image(name: str) -> int:
    """Vision-encoder inputs that ``image_inputs`` makes of an image."""
    return 2 if name in ANYRES else 1


# ---- processors

_SQUARE = {"height": PIXELS, "width": PIXELS}
_EDGE = {"shortest_edge": PIXELS}
_IDEFICS_TAGS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"] + [
    f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)
]
_MORE_ROWS = [f"<row_{row}_col_{column}>" for row, column in ((1, 3), (3, 1), (1, 4), (4, 1))]
_AYA_TAGS = ["<video>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"] + [
    f"TILE{tile}" for tile in ("", "_GLOBAL", "_1", "_2", "_3", "_4")
]


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
    """Stand-in for a video processor."""

    model_input_names: list[str] = []
    num_frames = fps = size = None


@contextmanager
def _without_torchvision() -> Iterator[None]:
    from transformers.models.smolvlm import processing_smolvlm

    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"),
        mock.patch.object(processing_smolvlm, "num2words", str),
    ):
        yield


class _NoSound(_NoVideos):
    """Stand-in for a feature extractor."""


def _with_stand_in(cls: Any, *parts: Any, **options: Any) -> Any:
    with _without_torchvision():
        return cls(*parts, **options)


def _with_video_stand_in(name: str, cls: str, *parts: Any, **options: Any) -> Any:
    module = importlib.import_module(f"transformers.models.{name}.processing_{name}")
    with _without_torchvision():
        return getattr(module, cls)(*parts, _NoVideos(), **options)


def _qwen_images() -> Any:
    return transformers.Qwen2VLImageProcessor(
        patch_size=PATCH, merge_size=2, min_pixels=32 * 32, max_pixels=PIXELS * PIXELS
    )


_QWEN_WORDS = ("<|image_pad|>", ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
_GLM_WORDS = ("<|image|>", ["<|video|>", "<|begin_of_video|>", "<|end_of_video|>"])


def _qwen(name: str, cls: str) -> Any:
    return _with_video_stand_in(name, cls, _qwen_images(), tokenizer(*_QWEN_WORDS))


def _patches(name: str, frames: int = 1) -> Any:
    """The family's own image processor, where it cuts images into patches as Qwen's."""
    cls = getattr(transformers, f"{name}ImageProcessor")
    pixels = {"shortest_edge": 32 * 32, "longest_edge": frames * PIXELS * PIXELS}
    return cls(patch_size=PATCH, size=pixels)


def _paligemma_images() -> Any:
    images = transformers.SiglipImageProcessor(size=_SQUARE)
    images.image_seq_length = 64
    return images


BUILDERS: dict[str, Callable[[], Any]] = {
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
            size=_EDGE, crop_size=_SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer("<image>", [], image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "llava_onevision": lambda: _with_video_stand_in(
        "llava_onevision",
        "LlavaOnevisionProcessor",
        transformers.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=PINPOINTS),
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
    "granite_docling": lambda: transformers.GraniteDoclingProcessor(
        transformers.GraniteDoclingImageProcessor(size=_SQUARE, max_patches=4),
        tokenizer("<image>", [*_IDEFICS_TAGS, *_MORE_ROWS], image_token="<image>"),
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

BUILDERS |= {
    "fast_vlm": lambda: transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=_EDGE, crop_size=_SQUARE),
        tokenizer("<image>", [], image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
    ),
    "llava_next_video": lambda: _with_stand_in(
        transformers.LlavaNextVideoProcessor,
        _NoVideos(),
        transformers.LlavaNextImageProcessor(
            size=_EDGE, crop_size=_SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer("<image>", ["<video>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "video_llava": lambda: _with_stand_in(
        transformers.VideoLlavaProcessor,
        transformers.CLIPImageProcessor(size=_EDGE, crop_size=_SQUARE),
        _NoVideos(),
        tokenizer("<image>", ["<video>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "qianfan_ocr": lambda: transformers.QianfanOCRProcessor(
        transformers.GotOcr2ImageProcessor(
            size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer(
            "<IMG_CONTEXT>",
            ["<image>", "<img>", "</img>"],
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
        ),
        image_seq_length=16,
    ),
    "glm4v": lambda: _with_video_stand_in(
        "glm4v", "Glm4vProcessor", _patches("Glm4v", frames=2), tokenizer(*_GLM_WORDS)
    ),
    "glm46v": lambda: _with_video_stand_in(
        "glm46v", "Glm46VProcessor", _patches("Glm46V", frames=2), tokenizer(*_GLM_WORDS)
    ),
    "exaone4_5": lambda: _qwen("exaone4_5", "Exaone4_5_Processor"),
    "hyperclovax_vision_v2": lambda: _qwen("hyperclovax_vision_v2", "HyperCLOVAXVisionV2Processor"),
    "lfm3_vl": lambda: _qwen("lfm3_vl", "Lfm3VlProcessor"),
    "video_llama_3": lambda: _with_video_stand_in(
        "video_llama_3", "VideoLlama3Processor", _patches("VideoLlama3"), tokenizer(*_QWEN_WORDS)
    ),
    "cohere_compass": lambda: _with_video_stand_in(
        "cohere_compass",
        "CohereCompassProcessor",
        _patches("CohereCompass"),
        tokenizer("<|IMAGE_PAD|>", ["<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"]),
    ),
    "paddleocr_vl": lambda: transformers.PaddleOCRVLProcessor(
        _patches("PaddleOCRVL"), tokenizer("<image>", [], image_token="<image>")
    ),
    "ernie4_5_vl_moe": lambda: _with_video_stand_in(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeProcessor",
        _patches("Ernie4_5_VLMoe"),
        tokenizer(
            "<image>",
            ["<video>", "<is>", "<ie>", "<vs>", "<ve>"],
            image_token="<image>",
            video_token="<video>",
            image_start_token="<is>",
            image_end_token="<ie>",
            video_start_token="<vs>",
            video_end_token="<ve>",
        ),
    ),
    "gemma4": lambda: _with_stand_in(
        transformers.Gemma4Processor,
        _NoSound(),
        transformers.Gemma4ImageProcessor(
            patch_size=PATCH, pooling_kernel_size=2, max_soft_tokens=70
        ),
        tokenizer(
            "<image>",
            ["<|video|>", "<boi>", "<eoi>", "<audio>", "<boa>", "<eoa>"],
            image_token="<image>",
            boi_token="<boi>",
            eoi_token="<eoi>",
            audio_token="<audio>",
            boa_token="<boa>",
            eoa_token="<eoa>",
        ),
        _NoVideos(),
    ),
}

# Families that transformers 5.23 has a processor of images for with torchvision alone.
WITH_TORCHVISION: dict[str, Callable[[], Any]] = {
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
if is_older("transformers", "5.21"):  # importing the module of its processor needs torchvision
    WITH_TORCHVISION["gemma4"] = BUILDERS["gemma4"]
BUILDERS |= WITH_TORCHVISION
BUILDERS = {name: builder for name, builder in BUILDERS.items() if name in CONFIGS}

# The text for an image in a prompt, unless it is "<image>".
IMAGE_TEXTS = {
    "aya_vision": "<image>",
    "deepseek_vl": "<image_placeholder>",
    "gemma3": "<start_of_image>",
    "got_ocr2": "<imgpad>",
    "internvl": "<IMG_CONTEXT>",
    "janus": "<image_placeholder>",
    "llava-pixtral": "[IMG]",
    "mistral3": "[IMG]",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    **dict.fromkeys(
        ("exaone4_5", "hyperclovax_vision_v2", "lfm3_vl", "video_llama_3"),
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    # Their positions tell images apart by what stands between them.
    **dict.fromkeys(("glm4v", "glm46v"), "this <|image|>"),
    "paddleocr_vl": "this <image>",
    "cohere_compass": "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
    "ernie4_5_vl_moe": "<is><image><ie>",
}
