"""A random-weight model of each family, a few thousand parameters, and inputs for it.

The token ids stand for themselves: the models are tested without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers

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
_CONFIGS: dict[str, Callable[[], Any]] = {
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

# Variants of a family's vision tower, too: "llava-pixtral" is a llava.
MODELS = sorted(_CONFIGS)


def model_type(name: str) -> str:
    return name.split("-")[0]


def stock_model(name: str, seed: int = 0) -> Any:
    """The same weights at every call with the same arguments, in evaluation mode."""
    config = _CONFIGS[name]()
    mapping = transformers.AutoModelForImageTextToText._model_mapping
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mapping[type(config)](config).eval()
    model.generation_config.eos_token_id = None  # a fixed number of new tokens
    return model


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_inputs(name: str, images: Sequence[int]) -> dict[str, Any]:
    """What the family's image processor gives for square images; an int seeds each."""
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


class Prompt(NamedTuple):
    """Token ids with one ``IMAGE`` per image, the images' counts, and the images' seeds."""

    ids: list[int]
    counts: list[Any]
    images: list[int]


PROMPTS = [
    Prompt([3, 4, START, IMAGE, END, 5, 6], [9], [1]),
    Prompt([7, START, IMAGE, END, 8, START, IMAGE, END, 9, 10, 11], [25, 16], [2, 3]),
]


def batch(name: str, prompts: Sequence[Prompt], *, labels: bool = False) -> dict[str, Any]:
    """The prompts as one left-padded batch, as the family's processor would give it."""
    tiles = tiles_per_image(name)
    rows = [_expanded(prompt, tiles) for prompt in prompts]
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    ids = torch.tensor([[PAD] * n + row for n, row in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(padding, rows, strict=True)])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    seeds = [seed for prompt in prompts for seed in prompt.images]
    if seeds:
        inputs |= image_inputs(name, seeds)
        inputs["num_image_tokens"] = [
            count for prompt in prompts for count in prompt.counts for _ in range(tiles)
        ]
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)  # all of a prompt is its prefix
    if labels:
        inputs["labels"] = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
        if name == "paligemma":  # what is learned is the suffix
            inputs["token_type_ids"] = torch.ones_like(ids)
    return inputs


def _expanded(prompt: Prompt, tiles: int) -> list[int]:
    repeats = iter(_size(count) * tiles for count in prompt.counts)
    return [i for i in prompt.ids for _ in range(next(repeats) if i == IMAGE else 1)]


def _size(count: Any) -> int:
    return count[0] * count[1] if isinstance(count, tuple) else count
