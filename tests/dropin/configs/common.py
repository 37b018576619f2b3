"""Parts of the tiny configs: sizes, token ids, vision encoders and language models."""

from __future__ import annotations

from typing import Any

IMAGE, VIDEO, PAD = 50, 51, 0
START, END = 52, 53  # around an image
PIXELS, PATCH = 64, 8  # 8 x 8 patches
VISION_WIDTH, TEXT_WIDTH, VOCABULARY = 24, 32, 100

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE_SIZE = {"image_size": PIXELS, "patch_size": PATCH}
SMALL = {"hidden_size": VISION_WIDTH, "intermediate_size": 48, **LAYERS}
IDS = {"image_token_id": IMAGE}
QWEN_IDS = {
    **IDS,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
PIXTRAL = {
    "model_type": "pixtral",
    **SMALL,
    "num_attention_heads": 2,
    "head_dim": 12,
    **IMAGE_SIZE,
}
SAM = {
    "hidden_size": VISION_WIDTH,
    "output_channels": 16,
    "initializer_range": 0.15,  # 1e-10 otherwise
    **LAYERS,
    **IMAGE_SIZE,
    "mlp_dim": 48,
    "window_size": 4,
    "global_attn_indexes": [1],
}


def text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        **LAYERS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,  # large enough that a wrong image could not hide
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
        **changes,
    }


def siglip(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        **SMALL,
        **IMAGE_SIZE,
        "vision_use_head": False,
        **changes,
    }


def clip() -> dict[str, Any]:
    return {"model_type": "clip_vision_model", **SMALL, **IMAGE_SIZE, "projection_dim": 16}


def gemma(model_type: str, **changes: Any) -> dict[str, Any]:
    config = text(model_type, head_dim=8, **changes)
    return {k: v for k, v in config.items() if k != "bos_token_id"}


def mrope(section: list[int], **changes: Any) -> dict[str, Any]:
    config = text("", **changes)
    config.pop("model_type")
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e4}
    return {**config, "rope_parameters": rope}


def mrope_of_layers(layer_types: list[str], **changes: Any) -> dict[str, Any]:
    config = mrope([2, 1, 1], layer_types=layer_types, **changes)
    return {**config, "rope_parameters": dict.fromkeys(layer_types, config["rope_parameters"])}


def cohere() -> dict[str, Any]:
    return text("cohere2", sliding_window=16)


def qwen_vision(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **changes,
    }


PINPOINTS = [[64, 64], [64, 128], [128, 64], [128, 128]]

MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
SHARED_MOE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
LINEAR_ATTENTION = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
GLM_IDS = {
    **IDS,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": END + 1,
    "video_end_token_id": END + 2,
}


def positions_vision(**changes: Any) -> dict[str, Any]:
    """A Qwen encoder with a table of positions."""
    return qwen_vision(
        hidden_size=VISION_WIDTH,
        intermediate_size=48,
        out_hidden_size=TEXT_WIDTH,
        num_position_embeddings=64,
        **changes,
    )


def deepstack_vision() -> dict[str, Any]:
    return positions_vision(depth=3, deepstack_visual_indexes=[0, 1])


def glm_vision() -> dict[str, Any]:
    return qwen_vision(
        hidden_size=VISION_WIDTH,
        intermediate_size=48,
        out_hidden_size=TEXT_WIDTH,
        image_size=PIXELS,
    )


def glm_text(**changes: Any) -> dict[str, Any]:
    return mrope([2, 1, 1], **changes)
