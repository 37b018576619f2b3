"""A tiny config of each family, or of one of its vision towers or language models."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.dropin.configs import grids, sizes, tiles

ALL = {**tiles.CONFIGS, **sizes.CONFIGS, **grids.CONFIGS}


def model_type(name: str) -> str:
    return name.split("-")[0]


# Families whose models have M-RoPE positions, which need the token types.
MROPE = [
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "ernie4_5_vl_moe",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "paddleocr_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
]

# Those that the installed transformers has.
CONFIGS = {
    name: config
    for name, config in ALL.items()
    if model_type(name) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
}
MROPE = [name for name in MROPE if name in CONFIGS]
GRIDS = [name for name in grids.CONFIGS if name in CONFIGS]  # with image_grid_thw
