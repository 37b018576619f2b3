"""Every test here may start runs in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
)

from tokenflex.digits.processor import digits_processor

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as transformers writes them: `siglip`, `clip` (with a class token) and `text`."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    processor = digits_processor()
    text = {**VISION, "vocab_size": 64, "max_position_embeddings": 8}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(
        root / "siglip"
    )
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(root / "clip")
    for name in ("siglip", "clip"):
        processor.image_processor.save_pretrained(root / name)
    language_model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    language_model.to(torch.bfloat16).save_pretrained(root / "text")
    processor.tokenizer.save_pretrained(root / "text")
    return root


@pytest.fixture(autouse=True)
def _own_accelerator_and_threads(own_accelerator_and_threads):
    """Use the shared fixture in every test of this folder."""
