"""Families whose encoder takes images or tiles of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.dropin.configs.common import (
    END,
    IDS,
    IMAGE,
    IMAGE_SIZE,
    LAYERS,
    PAD,
    PATCH,
    PINPOINTS,
    PIXELS,
    SAM,
    SMALL,
    START,
    TEXT_WIDTH,
    VIDEO,
    VISION_WIDTH,
    VOCABULARY,
    clip,
    cohere,
    gemma,
    siglip,
    text,
)

CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": lambda: transformers.LlavaConfig(
        vision_config=clip(),
        text_config=text("llama"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **IDS,
    ),
    "llava-siglip": lambda: transformers.LlavaConfig(
        vision_config=siglip(),
        text_config=text("qwen2"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **IDS,
    ),
    "llava_next": lambda: transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=text("llama"),
        vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS,
        **IDS,
    ),
    "llava_onevision": lambda: transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text("qwen2"),
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
        video_token_id=VIDEO,
        **IDS,
    ),
    "vipllava": lambda: transformers.VipLlavaConfig(
        vision_config=clip(), text_config=text("llama"), vision_feature_layers=[-1, -2], **IDS
    ),
    "internvl": lambda: transformers.InternVLConfig(
        vision_config={**SMALL, "image_size": [PIXELS] * 2, "patch_size": [PATCH] * 2},
        text_config=text("qwen2"),
        image_seq_length=16,
        downsample_ratio=0.5,
        **IDS,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        vision_config=siglip(),
        text_config=gemma("gemma3_text", sliding_window=16),
        mm_tokens_per_image=16,
        boi_token_index=START,
        eoi_token_index=END,
        **IDS,
    ),
    "paligemma": lambda: transformers.PaliGemmaConfig(
        vision_config=siglip(projection_dim=TEXT_WIDTH),
        text_config=gemma("gemma", num_key_value_heads=1),
        projection_dim=TEXT_WIDTH,
        image_token_index=IMAGE,
    ),
    "idefics3": lambda: transformers.Idefics3Config(
        vision_config={**SMALL, **IMAGE_SIZE},
        text_config=text("llama"),
        scale_factor=2,
        pad_token_id=PAD,
        **IDS,
    ),
    "smolvlm": lambda: transformers.SmolVLMConfig(
        vision_config={**SMALL, **IMAGE_SIZE},
        text_config=text("llama"),
        scale_factor=2,
        pad_token_id=PAD,
        **IDS,
    ),
    "aya_vision": lambda: transformers.AyaVisionConfig(
        vision_config=siglip(),
        text_config=cohere(),
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=IMAGE,
    ),
    "cohere2_vision": lambda: transformers.Cohere2VisionConfig(
        vision_config=siglip(),
        text_config=cohere(),
        downsample_factor=2,
        alignment_intermediate_size=64,
        **IDS,
    ),
    "janus": lambda: transformers.JanusConfig(
        vision_config={
            "model_type": "janus_vision_model",
            "hidden_size": VISION_WIDTH,
            **LAYERS,
            **IMAGE_SIZE,
            "mlp_ratio": 2,
            "projection_dim": TEXT_WIDTH,
        },
        text_config=text("llama"),
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
        **IDS,
    ),
    "deepseek_vl": lambda: transformers.DeepseekVLConfig(
        vision_config=siglip(), text_config=text("llama"), **IDS
    ),
    "got_ocr2": lambda: transformers.GotOcr2Config(
        vision_config=SAM,
        text_config=text("qwen2"),
        image_seq_length=4,
        **IDS,
    ),
    "llava_next_video": lambda: transformers.LlavaNextVideoConfig(
        vision_config=clip(),
        text_config=text("llama"),
        vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    "video_llava": lambda: transformers.VideoLlavaConfig(
        vision_config=clip(),
        text_config=text("llama"),
        vision_feature_layer=-2,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    "qianfan_ocr": lambda: transformers.QianfanOCRConfig(
        vision_config={**SMALL, "image_size": [PIXELS] * 2, "patch_size": [PATCH] * 2},
        text_config=text("qwen3", head_dim=8),
        image_seq_length=16,
        downsample_ratio=0.5,
        **IDS,
    ),
    "ovis2": lambda: transformers.Ovis2Config(
        vision_config={**SMALL, **IMAGE_SIZE, "vocab_size": 40, "hidden_stride": 2},
        text_config=text("qwen2"),
        visual_indicator_token_ids=[START, END, END + 1, END + 2, END + 3],
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        tie_word_embeddings=False,
        **IDS,
    ),
    "pp_chart2table": lambda: transformers.PPChart2TableConfig(
        vision_config={"model_type": "pp_chart2table_vision", **SAM},
        text_config=text("qwen2"),
        image_seq_length=4,
        **IDS,
    ),
    "fast_vlm": lambda: transformers.FastVlmConfig(
        vision_config={
            "model_type": "convnext",
            "hidden_sizes": [16, VISION_WIDTH],
            "depths": [1, 1],
            "num_stages": 2,
            "patch_size": 4,
            "image_size": PIXELS,
            "hidden_size": VISION_WIDTH,
        },
        text_config=text("qwen2"),
        image_token_index=IMAGE,
    ),
    "perception_lm": lambda: transformers.PerceptionLMConfig(
        vision_config={**clip(), "model_args": {"embed_dim": VISION_WIDTH}},
        text_config=text("llama"),
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
}
