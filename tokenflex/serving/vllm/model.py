"""The model as vLLM runs it: our encoder and projector before vLLM's own language model.

Encoder and projector are the modules of :class:`tokenflex.models.modeling.TokenFlexModel`, so the
projector's layers stay plain Linears and it runs as one fused op. Every process of a
tensor-parallel group has them whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenflex.counts import Grid, token_grid
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.image_features import ImageFeatures, build_projector
from tokenflex.models.vision import EncodedImages
from tokenflex.serving.feature_cache import FeatureCache
from tokenflex.serving.vllm import feature_cache_bytes
from tokenflex.serving.vllm.processing import (
    TokenFlexDummyInputs,
    TokenFlexMultiModalProcessor,
    TokenFlexProcessingInfo,
)


@MULTIMODAL_REGISTRY.register_processor(
    TokenFlexMultiModalProcessor,
    info=TokenFlexProcessingInfo,
    dummy_inputs=TokenFlexDummyInputs,
)
class TokenFlexForVLLM(ImageFeatures, nn.Module, SupportsMultiModal, SupportsPP):
    """A TokenFLEX checkpoint in vLLM.

    Attributes:
        feature_cache: encoder features by the pixels of an image, on the host. A picture that was
            encoded is projected to any other count without another pass of the encoder.
    """

    if TYPE_CHECKING:  # of vLLM's interface
        configure_mm_token_handling: Any
        _mark_tower_model: Any
        _mark_language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: TokenFlexConfig = vllm_config.model_config.hf_config
        self.config = config
        self.dtype = vllm_config.model_config.dtype
        self.feature_cache: FeatureCache[EncodedImages] = FeatureCache(feature_cache_bytes())
        self._known_counts = {token_grid(n) for n in config.trained_num_image_tokens or ()}
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_model = AutoModel.from_config(config.vision_config, dtype=self.dtype)
            self.projector = build_projector(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return nothing: our renderer writes the placeholder that the checkpoint names."""
        return None

    def embed_multimodal(
        self,
        pixel_values: Sequence[torch.Tensor] | torch.Tensor | None = None,
        token_grids: Sequence[torch.Tensor] | torch.Tensor | None = None,
        patch_grids: Sequence[torch.Tensor] | torch.Tensor | None = None,
        **kwargs: object,
    ) -> list[torch.Tensor]:
        """Return the vision tokens of each image, [tiles * h * w, D].

        Args:
            pixel_values: of each image its tiles [tiles, 3, H, W], on the host.
            token_grids: of each image the (h, w) of a tile's vision tokens, on the host.
            patch_grids: of each image the (height, width) in patches of its tiles, on the host,
                where the pixels do not tell it.
            **kwargs: not used.
        """
        if pixel_values is None or token_grids is None:
            return []
        encoded = []
        for i, pixels in enumerate(pixel_values):
            grids: list[Grid] = [] if patch_grids is None else _pairs(patch_grids[i])
            encode = partial(self._encode_image, patch_grids=grids)
            encoded.append(self.feature_cache.features(pixels, encode, grids))
        counts = [
            grid
            for images, grid in zip(encoded, map(_pair, token_grids), strict=True)
            for _ in images.grids
        ]
        device = self.projector.layernorm.weight.device
        features = EncodedImages(
            torch.cat([images.features for images in encoded]).to(device),
            tuple(grid for images in encoded for grid in images.grids),
        )
        outputs = self.get_image_features(encoded_images=features, num_image_tokens=counts)
        tiles = iter(outputs.pooler_output)
        return [torch.cat([next(tiles) for _ in images.grids]) for images in encoded]

    def _encode_image(self, pixels: torch.Tensor, patch_grids: list[Grid]) -> EncodedImages:
        pixels = pixels.to(self.projector.layernorm.weight.device)
        return self.encode_images(pixels, patch_grids or None).to("cpu")

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Return the language model's hidden states, as vLLM's models do."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the logits, minus infinity for the placeholder, which is never an answer."""
        logits: torch.Tensor | None = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[..., self.config.image_token_id] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors of a checkpoint; return the names of the parameters that were loaded."""
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.text_config.model_type]
        base = getattr(transformers, architecture).base_model_prefix
        names = WeightsMapper(
            orig_to_new_prefix={
                "model.vision_model.": "vision_model.",
                "model.projector.": "projector.",
                "model.language_model.": f"language_model.{base}.",
                "lm_head.": "language_model.lm_head.",
            }
        )
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=names)
        return loaded


def _pair(grid: torch.Tensor) -> Grid:
    height, width = grid.tolist()
    return height, width


def _pairs(grids: torch.Tensor) -> list[Grid]:
    return [_pair(grid) for grid in grids]
