"""From a configuration to the objects it names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from tokenflex.data.messages import MessagesDataset
from tokenflex.data.samples import SampleDataset
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.training.config import DataConfig, ModelConfig, PartConfig


def build_dataset(config: DataConfig) -> SampleDataset:
    """The data set that ``config`` names."""
    if config.name == "digits":
        return DigitsDataset(config.split, size=config.size, questions=config.questions)
    assert config.path is not None  # checked by DataConfig
    return MessagesDataset(config.path)


def build_processor(config: ModelConfig) -> TokenFlexProcessor:
    """The processor, with ``image_token`` known to its tokenizer."""
    if config.processor == "digits":
        return digits_processor(config.num_image_tokens)
    tokenizer = AutoTokenizer.from_pretrained(config.text.path)
    tokenizer.add_special_tokens({"additional_special_tokens": [config.image_token]})
    return TokenFlexProcessor(
        AutoImageProcessor.from_pretrained(config.vision.path),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        image_token=config.image_token,
    )


def build_model(
    config: ModelConfig, processor: TokenFlexProcessor
) -> TokenFlexForConditionalGeneration:
    """The model: fresh where a config is given, pretrained where a path is."""
    vision, vision_config = _build_vision(config.vision)
    language_model = _build_language_model(config.text)
    model_config = TokenFlexConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_id=processor.image_token_id,
        num_image_tokens=config.num_image_tokens,
        pooling=config.pooling,
        projector_hidden_width=config.projector_hidden_width,
    )
    model = TokenFlexForConditionalGeneration.from_parts(model_config, vision, language_model)
    if len(processor.tokenizer) > language_model.config.vocab_size:
        model.resize_token_embeddings(len(processor.tokenizer))
    return model


def _build_vision(part: PartConfig) -> tuple[PreTrainedModel, PretrainedConfig]:
    if part.path is None:
        config = _fresh_config(part)
        return AutoModel.from_config(config), config
    config = AutoConfig.from_pretrained(part.path)
    # A checkpoint of an image-text pair (SigLIP, CLIP) holds the encoder's config inside its own.
    config = getattr(config, "vision_config", config)
    return AutoModel.from_pretrained(part.path, config=config, dtype=torch.float32), config


def _build_language_model(part: PartConfig) -> PreTrainedModel:
    if part.path is None:
        return AutoModelForCausalLM.from_config(_fresh_config(part))
    return AutoModelForCausalLM.from_pretrained(part.path, dtype=torch.float32)


def _fresh_config(part: PartConfig) -> PretrainedConfig:
    fields: dict[str, Any] = dict(part.config or {})
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config must name a model_type that transformers knows, got {model_type!r}"
        )
    return CONFIG_MAPPING[model_type](**fields)
