"""Families whose encoder takes images of different sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.dropin.configs.common import (
    END,
    IDS,
    IMAGE,
    IMAGE_SIZE,
    LINEAR_ATTENTION,
    MLA,
    PATCH,
    PIXTRAL,
    SHARED_MOE,
    SMALL,
    START,
    TEXT_WIDTH,
    VIDEO,
    VOCABULARY,
    gemma,
    text,
)


def minicpm() -> dict[str, Any]:
    return {
        "vision_config": {**SMALL, **IMAGE_SIZE, "num_attention_heads": 2, "insert_layer_id": 0},
        "text_config": text("qwen3_5_text", **LINEAR_ATTENTION),
        "insert_layer_id": 0,
        "downsample_mode": "16x",
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "tie_word_embeddings": False,
    }


CONFIGS: dict[str, Callable[[], Any]] = {
    "inkling2": lambda: transformers.Inkling2Config(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "posemb_grid_size": 8,
            "projection_hidden_dim": 48,
            "text_hidden_size": TEXT_WIDTH,
        },
        text_config=text(
            "inkling2_text",
            unpadded_vocab_size=VOCABULARY,
            head_dim=8,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=8,
            sliding_window_size=16,
            d_rel=4,
            rel_extent=64,
            layer_types=["hybrid_sliding", "hybrid"],
            conv_kernel_size=3,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_layers_per_attn_res_block=1,
        ),
        **IDS,
    ),
    "llava-pixtral": lambda: transformers.LlavaConfig(
        vision_config=PIXTRAL,
        text_config=text("llama"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **IDS,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        vision_config=PIXTRAL,
        text_config=text("mistral", head_dim=8),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **IDS,
    ),
    "lfm2_vl": lambda: transformers.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            **SMALL,
            "num_patches": 64,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config=text(
            "lfm2",
            layer_types=["full_attention", "conv"],
            block_multiple_of=8,
            conv_L_cache=3,
        ),
        downsample_factor=2,
        projector_hidden_size=32,
        **IDS,
    ),
    "mistral3-mistral4": lambda: transformers.Mistral3Config(
        vision_config=PIXTRAL,
        text_config=text("mistral4", **MLA, **SHARED_MOE),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **IDS,
    ),
    "mistral_large4": lambda: transformers.MistralLarge4Config(
        vision_config=PIXTRAL,
        text_config=text(
            "mistral_large4_text",
            **MLA,
            **SHARED_MOE,
            head_dim=4,
            index_n_heads=2,
            index_head_dim=8,
        ),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        image_token_index=IMAGE,
    ),
    "lighton_ocr": lambda: transformers.LightOnOcrConfig(
        vision_config=PIXTRAL,
        text_config=text("qwen3", head_dim=8),
        spatial_merge_size=2,
        tie_word_embeddings=False,
        **IDS,
    ),
    "minicpmv4_6": lambda: transformers.MiniCPMV4_6Config(**minicpm()),
    "minicpm_ocr": lambda: transformers.MiniCPMOcrConfig(**minicpm()),
    "gemma4": lambda: transformers.Gemma4Config(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "patch_size": PATCH,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        text_config=gemma(
            "gemma4_text",
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
            global_head_dim=8,
        ),
        audio_config=None,
        boi_token_id=START,
        eoi_token_id=END,
        video_token_id=VIDEO,
        boa_token_id=END + 1,
        eoa_token_index=END + 2,
        audio_token_id=END + 3,
        **IDS,
    ),
    "aria": lambda: transformers.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **SMALL, **IMAGE_SIZE},
        text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        projector_patch_to_query_dict={64: 16},
        image_token_index=IMAGE,
    ),
}
