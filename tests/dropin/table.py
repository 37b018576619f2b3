"""The table of families for the tests: a tiny config, image inputs and a processor for each.

A family needs an entry in ``CONFIGS`` and one in ``BUILDERS``; further entries where it differs
from the others. Names may add a vision tower to a model type: "llava-pixtral" is a llava.

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

IMAGE, VIDEO, PAD = 50, 51, 0
START, END = 52, 53  # around an image
PIXELS, PATCH = 64, 8  # 8 x 8 patches
VISION_WIDTH, TEXT_WIDTH, VOCABULARY = 24, 32, 100

_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGE_SIZE = {"image_size": PIXELS, "patch_size": PATCH}
_SMALL = {"hidden_size": VISION_WIDTH, "intermediate_size": 48, **_LAYERS}
_IDS = {"image_token_id": IMAGE}
_QWEN_IDS = {
    **_IDS,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_PIXTRAL = {
    "model_type": "pixtral",
    **_SMALL,
    "num_attention_heads": 2,
    "head_dim": 12,
    **_IMAGE_SIZE,
}


def _text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        **_LAYERS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,  # large enough that a wrong image could not hide
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
        **changes,
    }


def _siglip(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        **_SMALL,
        **_IMAGE_SIZE,
        "vision_use_head": False,
        **changes,
    }


def _clip() -> dict[str, Any]:
    return {"model_type": "clip_vision_model", **_SMALL, **_IMAGE_SIZE, "projection_dim": 16}


def _gemma(model_type: str, **changes: Any) -> dict[str, Any]:
    text = _text(model_type, head_dim=8, **changes)
    return {k: v for k, v in text.items() if k != "bos_token_id"}


def _mrope(section: list[int], **changes: Any) -> dict[str, Any]:
    text = _text("", **changes)
    text.pop("model_type")
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e4}
    return {**text, "rope_parameters": rope}


def _cohere() -> dict[str, Any]:
    return _text("cohere2", sliding_window=16)


def _qwen_vision(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **changes,
    }


_PINPOINTS = [[64, 64], [64, 128], [128, 64], [128, 128]]
CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": lambda: transformers.LlavaConfig(
        vision_config=_clip(),
        text_config=_text("llama"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **_IDS,
    ),
    "llava-siglip": lambda: transformers.LlavaConfig(
        vision_config=_siglip(),
        text_config=_text("qwen2"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **_IDS,
    ),
    "llava-pixtral": lambda: transformers.LlavaConfig(
        vision_config=_PIXTRAL,
        text_config=_text("llama"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **_IDS,
    ),
    "llava_next": lambda: transformers.LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text("llama"),
        vision_feature_layer=-2,
        image_grid_pinpoints=_PINPOINTS,
        **_IDS,
    ),
    "llava_onevision": lambda: transformers.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_text("qwen2"),
        vision_feature_layer=-1,
        image_grid_pinpoints=_PINPOINTS,
        video_token_id=VIDEO,
        **_IDS,
    ),
    "vipllava": lambda: transformers.VipLlavaConfig(
        vision_config=_clip(), text_config=_text("llama"), vision_feature_layers=[-1, -2], **_IDS
    ),
    "internvl": lambda: transformers.InternVLConfig(
        vision_config={**_SMALL, "image_size": [PIXELS] * 2, "patch_size": [PATCH] * 2},
        text_config=_text("qwen2"),
        image_seq_length=16,
        downsample_ratio=0.5,
        **_IDS,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        vision_config=_siglip(),
        text_config=_gemma("gemma3_text", sliding_window=16),
        mm_tokens_per_image=16,
        boi_token_index=START,
        eoi_token_index=END,
        **_IDS,
    ),
    "paligemma": lambda: transformers.PaliGemmaConfig(
        vision_config=_siglip(projection_dim=TEXT_WIDTH),
        text_config=_gemma("gemma", num_key_value_heads=1),
        projection_dim=TEXT_WIDTH,
        image_token_index=IMAGE,
    ),
    "idefics3": lambda: transformers.Idefics3Config(
        vision_config={**_SMALL, **_IMAGE_SIZE},
        text_config=_text("llama"),
        scale_factor=2,
        pad_token_id=PAD,
        **_IDS,
    ),
    "smolvlm": lambda: transformers.SmolVLMConfig(
        vision_config={**_SMALL, **_IMAGE_SIZE},
        text_config=_text("llama"),
        scale_factor=2,
        pad_token_id=PAD,
        **_IDS,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        vision_config=_PIXTRAL,
        text_config=_text("mistral", head_dim=8),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **_IDS,
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        vision_config=_qwen_vision(embed_dim=VISION_WIDTH, hidden_size=TEXT_WIDTH, mlp_ratio=2),
        text_config=_mrope([1, 1, 2]),
        **_QWEN_IDS,
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        vision_config=_qwen_vision(
            hidden_size=VISION_WIDTH,
            intermediate_size=48,
            out_hidden_size=TEXT_WIDTH,
            window_size=32,
            fullatt_block_indexes=[1],
        ),
        text_config=_mrope([1, 1, 2]),
        **_QWEN_IDS,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        vision_config=_qwen_vision(
            depth=3,
            hidden_size=VISION_WIDTH,
            intermediate_size=48,
            out_hidden_size=TEXT_WIDTH,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        text_config=_mrope([2, 1, 1], head_dim=8),
        **_QWEN_IDS,
    ),
    "aya_vision": lambda: transformers.AyaVisionConfig(
        vision_config=_siglip(),
        text_config=_cohere(),
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=IMAGE,
    ),
    "cohere2_vision": lambda: transformers.Cohere2VisionConfig(
        vision_config=_siglip(),
        text_config=_cohere(),
        downsample_factor=2,
        alignment_intermediate_size=64,
        **_IDS,
    ),
    "lfm2_vl": lambda: transformers.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            **_SMALL,
            "num_patches": 64,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config=_text(
            "lfm2",
            layer_types=["full_attention", "conv"],
            block_multiple_of=8,
            conv_L_cache=3,
        ),
        downsample_factor=2,
        projector_hidden_size=32,
        **_IDS,
    ),
    "janus": lambda: transformers.JanusConfig(
        vision_config={
            "model_type": "janus_vision_model",
            "hidden_size": VISION_WIDTH,
            **_LAYERS,
            **_IMAGE_SIZE,
            "mlp_ratio": 2,
            "projection_dim": TEXT_WIDTH,
        },
        text_config=_text("llama"),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 32,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "num_patches": 8,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 2,
        },
        **_IDS,
    ),
    "deepseek_vl": lambda: transformers.DeepseekVLConfig(
        vision_config=_siglip(), text_config=_text("llama"), **_IDS
    ),
    "got_ocr2": lambda: transformers.GotOcr2Config(
        vision_config={
            "hidden_size": VISION_WIDTH,
            "output_channels": 16,
            "initializer_range": 0.15,  # 1e-10 otherwise
            **_LAYERS,
            **_IMAGE_SIZE,
            "mlp_dim": 48,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
        text_config=_text("qwen2"),
        image_seq_length=4,
        **_IDS,
    ),
}


# ---- image inputs of the models


def model_type(name: str) -> str:
    return name.split("-")[0]


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_inputs(name: str, images: Sequence[int]) -> dict[str, Any]:
    """Return the outputs of the family's image processor for square images; an int seeds each."""
    number = len(images)

    def stacked(*shape: int) -> torch.Tensor:
        return torch.stack([pixels(*shape, seed=seed) for seed in images])

    if model_type(name) in ("idefics3", "smolvlm"):
        return {"pixel_values": stacked(3, PIXELS, PIXELS)[:, None]}
    if name == "llava_next":
        # One tile and the whole image: the smallest grid is one tile.
        sizes = torch.tensor([[PIXELS, PIXELS]] * number)
        return {"pixel_values": stacked(2, 3, PIXELS, PIXELS), "image_sizes": sizes}
    if name == "llava_onevision":
        sizes = torch.tensor([[PIXELS, PIXELS]] * number)
        return {"pixel_values": stacked(2, 3, PIXELS, PIXELS), "image_sizes": sizes}
    if name in ("mistral3", "llava-pixtral"):
        sizes = torch.tensor([[PIXELS, PIXELS]] * number)
        return {"pixel_values": stacked(3, PIXELS, PIXELS), "image_sizes": sizes}
    if name.startswith("qwen"):
        patches = stacked((PIXELS // PATCH) ** 2, 3 * 2 * PATCH * PATCH).flatten(0, 1)
        grid = torch.tensor([[1, PIXELS // PATCH, PIXELS // PATCH]] * number)
        return {"pixel_values": patches, "image_grid_thw": grid}
    if name == "lfm2_vl":
        side = PIXELS // PATCH
        return {
            "pixel_values": stacked(side * side, 3 * PATCH * PATCH),
            "spatial_shapes": torch.tensor([[side, side]] * number),
            "pixel_attention_mask": torch.ones(number, side * side, dtype=torch.long),
        }
    return {"pixel_values": stacked(3, PIXELS, PIXELS)}


def tiles_per_image(name: str) -> int:
    """Vision-encoder inputs that ``image_inputs`` makes of an image."""
    return 2 if name in ("llava_next", "llava_onevision") else 1


# ---- processors

_SQUARE = {"height": PIXELS, "width": PIXELS}
_EDGE = {"shortest_edge": PIXELS}
_IDEFICS_TAGS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"] + [
    f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)
]
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
BUILDERS |= WITH_TORCHVISION

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
}
