"""vLLM serves TokenFLEX checkpoints, with a count of vision tokens per request and per image.

vLLM calls :func:`register` in each of its processes, through the entry point
``vllm.general_plugins``. It only tells vLLM names; what they stand for is imported when vLLM loads
a TokenFLEX checkpoint.
"""

from __future__ import annotations

import logging
import os
from typing import Any

ARCHITECTURE = "TokenFlexForConditionalGeneration"
MODE = "tokenflex"
"""The name of our renderer, which writes a conversation as the prompt of our processor does."""
POSITION_ROWS = 3
"""Rows in which vLLM keeps positions that a model gives (M-RoPE: time, height and width)."""

logger = logging.getLogger(__name__)


def feature_cache_bytes() -> int:
    """Return the most bytes of encoder features that each process keeps, from the environment.

    ``TOKENFLEX_FEATURE_CACHE_MB`` holds it in megabytes; 512 by default.

    Raises:
        ValueError: it is no positive integer.
    """
    given = os.environ.get("TOKENFLEX_FEATURE_CACHE_MB", "512")
    if not given.isdecimal() or not int(given):
        raise ValueError(
            f"TOKENFLEX_FEATURE_CACHE_MB must be a positive integer, got {given[:40]!r}"
        )
    return int(given) * 10**6


class ConfigHook:
    """Hooks that vLLM calls as soon as it has read a checkpoint's config."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose our renderer, and have the model give positions where an image's tokens share one.

        vLLM takes positions from a model, in place of 0, 1, 2, .., if its config has an
        ``mrope_section``. The language model's own config stays as it is: it gets one row of them.
        """
        if model_config.hf_config.image_positions == "shared":
            model_config.hf_config.mrope_section = [1] * POSITION_ROWS
        model_config.tokenizer_mode = MODE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Leave the rest of vLLM's configuration as it is."""


def register() -> None:
    """Tell vLLM about TokenFLEX checkpoints. Calling it again changes nothing.

    transformers' Auto classes know our model as soon as this package is imported.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry
    except ImportError as error:  # other models must be served all the same
        logger.warning("tokenflex cannot be registered with this vLLM: %s", error)
        return
    if MODELS_CONFIG_MAP.get(ARCHITECTURE) is ConfigHook:
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = ConfigHook
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:TokenFlexForVLLM")
    RENDERER_REGISTRY.register(MODE, f"{__name__}.rendering", "TokenFlexRenderer")
    TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
