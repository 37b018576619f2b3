"""A tiny config of each family, or of one of its vision towers or language models."""

from __future__ import annotations

import tokenflex.dropin  # noqa: F401  # registers the families
from tests.dropin.configs import grids, sizes, tiles
from tokenflex.dropin import families
from tokenflex_kernels.versions import is_older

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


# Families that need a newer transformers than the installed one, and which.
TOO_NEW = {
    name: oldest
    for name in ALL
    if is_older("transformers", oldest := families._FAMILIES[model_type(name)].transformers)
}
CONFIGS = {name: config for name, config in ALL.items() if name not in TOO_NEW}
MROPE = [name for name in MROPE if name in CONFIGS]
GRIDS = [name for name in grids.CONFIGS if name in CONFIGS]  # with image_grid_thw
