"""Families whose processor gives (frames, height, width) of each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.dropin.configs.common import (
    END,
    GLM_IDS,
    IMAGE,
    IMAGE_SIZE,
    LINEAR_ATTENTION,
    MLA,
    MOE,
    PATCH,
    QWEN_IDS,
    SHARED_MOE,
    SMALL,
    START,
    TEXT_WIDTH,
    VIDEO,
    VISION_WIDTH,
    deepstack_vision,
    glm_text,
    glm_vision,
    mrope,
    mrope_of_layers,
    positions_vision,
    qwen_vision,
    text,
)

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        vision_config=qwen_vision(embed_dim=VISION_WIDTH, hidden_size=TEXT_WIDTH, mlp_ratio=2),
        text_config=mrope([1, 1, 2]),
        **QWEN_IDS,
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        vision_config=qwen_vision(
            hidden_size=VISION_WIDTH,
            intermediate_size=48,
            out_hidden_size=TEXT_WIDTH,
            window_size=32,
            fullatt_block_indexes=[1],
        ),
        text_config=mrope([1, 1, 2]),
        **QWEN_IDS,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        vision_config=qwen_vision(
            depth=3,
            hidden_size=VISION_WIDTH,
            intermediate_size=48,
            out_hidden_size=TEXT_WIDTH,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        text_config=mrope([2, 1, 1], head_dim=8),
        **QWEN_IDS,
    ),
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeConfig(
        vision_config=deepstack_vision(),
        text_config=mrope([2, 1, 1], head_dim=8, **MOE),
        **QWEN_IDS,
    ),
    "cohere_compass": lambda: transformers.CohereCompassConfig(
        vision_config=deepstack_vision(),
        text_config=mrope_of_layers(["sliding_attention", "full_attention"], sliding_window=16),
        **QWEN_IDS,
    ),
    "cosmos3_omni": lambda: transformers.Cosmos3OmniConfig(
        vision_config={"model_type": "qwen3_vl_vision", **deepstack_vision()},
        text_config={"model_type": "qwen3_vl_text", **mrope([2, 1, 1], head_dim=8)},
        **QWEN_IDS,
    ),
    "qwen3_5": lambda: transformers.Qwen3_5Config(
        vision_config=positions_vision(),
        text_config=mrope([2, 1, 1], **LINEAR_ATTENTION),
        **QWEN_IDS,
    ),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeConfig(
        vision_config=positions_vision(),
        text_config=mrope([2, 1, 1], **LINEAR_ATTENTION, **MOE, shared_expert_intermediate_size=16),
        **QWEN_IDS,
    ),
    "exaone4_5": lambda: transformers.Exaone4_5_Config(
        vision_config=qwen_vision(
            hidden_size=VISION_WIDTH,
            intermediate_size=48,
            out_hidden_size=TEXT_WIDTH,
            window_size=32,
            fullatt_block_indexes=[1],
            num_key_value_heads=2,
        ),
        text_config=text(
            "exaone4", sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "dots3_note": lambda: transformers.Dots3NoteConfig(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "moe_intermediate_size": 16,
            "num_local_experts": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "adapter_in_dim": VISION_WIDTH,
            "adapter_out_dim": TEXT_WIDTH,
        },
        text_config=text(
            "dots3_note_text", **MLA, **SHARED_MOE, shared_experts_intermediate_size=16
        ),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": TEXT_WIDTH,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=END + 1,
    ),
    "glm4v": lambda: transformers.Glm4vConfig(
        vision_config=glm_vision(), text_config=glm_text(), **GLM_IDS
    ),
    "glm46v": lambda: transformers.Glm46VConfig(
        vision_config={"model_type": "glm4v_vision", **glm_vision()},
        text_config={"model_type": "glm4v_text", **glm_text()},
        **GLM_IDS,
    ),
    "glmga": lambda: transformers.GlmgaConfig(
        vision_config={"model_type": "glm4v_vision", **glm_vision()},
        text_config={"model_type": "glm4v_text", **glm_text()},
        **GLM_IDS,
    ),
    "glm4v_moe": lambda: transformers.Glm4vMoeConfig(
        vision_config=glm_vision(), text_config=glm_text(head_dim=16, **SHARED_MOE), **GLM_IDS
    ),
    "glm_ocr": lambda: transformers.GlmOcrConfig(
        vision_config=glm_vision(), text_config=glm_text(), **GLM_IDS
    ),
    "kimi_k25": lambda: transformers.Kimi_K25Config(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        text_config=text("deepseek_v3", **MLA, **SHARED_MOE),
        projection_hidden_size=VISION_WIDTH,
        tie_word_embeddings=False,
        **QWEN_IDS,
    ),
    "hyperclovax_vision_v2": lambda: transformers.HyperCLOVAXVisionV2Config(
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            **qwen_vision(
                hidden_size=VISION_WIDTH,
                intermediate_size=48,
                out_hidden_size=48,
                window_size=32,
                fullatt_block_indexes=[1],
            ),
        },
        text_config=text("hyperclovax"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    ),
    "video_llama_3": lambda: transformers.VideoLlama3Config(
        vision_config={**SMALL, "num_attention_heads": 2, "patch_size": PATCH},
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "minimax_m3_vl": lambda: transformers.MiniMaxM3VLConfig(
        vision_config={
            **SMALL,
            **IMAGE_SIZE,
            "num_attention_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        text_config=text(
            "minimax_m3_vl_text",
            head_dim=8,
            rotary_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            dense_intermediate_size=32,
            shared_intermediate_size=16,
            index_n_heads=2,
            index_head_dim=8,
            layer_types=["full_attention", "full_attention"],
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=32,
    ),
    "lfm3_vl": lambda: transformers.Lfm3VlConfig(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": PATCH,
            "layer_types": ["conv", "full_attention"],
        },
        text_config=text("lfm3", layer_types=["conv", "full_attention"], conv_L_cache=3),
        projector_hidden_size=32,
        **QWEN_IDS,
    ),
    "paddleocr_vl": lambda: transformers.PaddleOCRVLConfig(
        vision_config={**SMALL, **IMAGE_SIZE, "num_attention_heads": 2},
        text_config=mrope([2, 1, 1], head_dim=8, tie_word_embeddings=False),
        tie_word_embeddings=False,
        **QWEN_IDS,
    ),
    "ernie4_5_vl_moe": lambda: transformers.Ernie4_5_VLMoeConfig(
        vision_config=qwen_vision(hidden_size=VISION_WIDTH, intermediate_size=48),
        text_config=mrope(
            [1, 1, 2],
            moe_intermediate_size=[16, 16],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
        ),
        image_start_token_id=START,
        image_end_token_id=END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    ),
    "cosmos3_edge": lambda: transformers.Cosmos3EdgeConfig(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 64,
        },
        text_config=mrope([2, 1, 1], head_dim=8),
        projector_hidden_size=48,
        **QWEN_IDS,
    ),
    "muse_glimmer": lambda: transformers.MuseGlimmerConfig(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "max_position_embeddings": 64,
            "layer_types": ["window_attention", "full_attention"],
        },
        text_config=text(
            "muse_glimmer_text",
            head_dim=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            qk_scale_factor=1.0,
            output_multiplier=1.0,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=4 * VISION_WIDTH,
        projector_hidden_size=48,
    ),
    "muse_spark": lambda: transformers.MuseSparkConfig(
        vision_config={
            **SMALL,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "max_position_embeddings": 64,
            "layer_types": ["window_attention", "full_attention"],
        },
        text_config=text(
            "muse_spark_text",
            head_dim=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            qk_scale_factor=1.0,
            output_multiplier=1.0,
            moe_intermediate_size=16,
            moe_hidden_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        audio_config={
            "patch_sizes": (4, 2),
            "hidden_sizes": (8, 16),
            "depths": (1, 1),
            "num_hidden_layers": 2,
            "out_hidden_size": TEXT_WIDTH,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=END + 1,
        out_hidden_size=4 * VISION_WIDTH,
        projector_hidden_size=48,
    ),
    "glm5_next": lambda: transformers.Glm5NextConfig(
        vision_config={**glm_vision(), "projection_intermediate_size": 48},
        text_config=text(
            "glm5_next_text",
            **{**MLA, "qk_rope_head_dim": 0, "qk_nope_head_dim": 8},
            **SHARED_MOE,
            index_n_heads=2,
            index_head_dim=8,
            linear_head_dim=8,
            linear_num_heads=2,
            layer_types=["linear_attention", "indexed_attention"],
            hc_mult=2,
        ),
        **GLM_IDS,
    ),
}
