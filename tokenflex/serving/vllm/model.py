"""The model as vLLM runs it: our encoder and projector before vLLM's own language model.

Encoder and projector are the modules of :class:`tokenflex.models.modeling.TokenFlexModel`, so the
projector's layers stay plain Linears and it runs as one fused op. Every process of a
tensor-parallel group has them whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenflex.counts import Grid, tokens_of
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.image_features import ImageFeatures, build_projector
from tokenflex.models.vision import EncodedImages
from tokenflex.positions import shared_image_positions
from tokenflex.serving.feature_cache import FeatureCache
from tokenflex.serving.passes import encode_in_passes
from tokenflex.serving.vllm import POSITION_ROWS, feature_cache_bytes
from tokenflex.serving.vllm.info import TokenFlexDummyInputs, TokenFlexProcessingInfo
from tokenflex.serving.vllm.processing import TokenFlexMultiModalProcessor


@MULTIMODAL_REGISTRY.register_processor(
    TokenFlexMultiModalProcessor,
    info=TokenFlexProcessingInfo,
    dummy_inputs=TokenFlexDummyInputs,
)
class TokenFlexForVLLM(ImageFeatures, nn.Module, SupportsMultiModal, SupportsMRoPE, SupportsPP):
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
        self._known_counts = set()  # any count is a client's to choose: the log has no warnings
        self._patches_per_pass = vllm_config.scheduler_config.max_num_batched_tokens
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
        images = list(pixel_values)
        grids = [[]] * len(images) if patch_grids is None else [*map(_pairs, patch_grids)]
        encoded = self.feature_cache.features_of(
            images,
            lambda missing: self._encode_images(
                [images[i] for i in missing], [grids[i] for i in missing]
            ),
            grids,
        )
        counts = [
            grid
            for image, grid in zip(encoded, map(_pair, token_grids), strict=True)
            for _ in image.grids
        ]
        device = self.projector.layernorm.weight.device
        features = EncodedImages.joined(encoded).to(device)
        outputs = self.get_image_features(encoded_images=features, num_image_tokens=counts)
        tiles = iter(outputs.pooler_output)
        return [torch.cat([next(tiles) for _ in image.grids]) for image in encoded]

    def _encode_images(
        self, images: list[torch.Tensor], patch_grids: list[list[Grid]]
    ) -> list[EncodedImages]:
        """Return the features of each image; images of one shape share passes of the encoder.

        vLLM bounds a step by its vision tokens, of which an image may have few. A pass takes no
        more patches than vLLM's memory profile, whose images have a token per patch.
        """
        device = self.projector.layernorm.weight.device

        def encode(pixels: torch.Tensor, batch: list[int]) -> EncodedImages:
            grids = [grid for i in batch for grid in patch_grids[i]] or None
            return self.encode_images(pixels.to(device), grids).to("cpu")

        return encode_in_passes(
            images, encode, lambda pixels: self._patches_per_pass // self._patches(pixels)
        )

    def _patches(self, pixels: torch.Tensor) -> int:
        """Return the patches of a tile."""
        if pixels.ndim == 3:  # patches of images of any shape
            return pixels.shape[1]
        patch = self.config.vision_config.patch_size
        height, width = (patch, patch) if isinstance(patch, int) else patch
        return (pixels.shape[2] // height) * (pixels.shape[3] // width)

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Return the positions of a prompt, and what to add to the index of a later token: 0.

        All tokens of a tile may share the position of its last one, and text keeps its own.

        Args:
            input_tokens: the prompt's tokens, those of its images among them.
            mm_features: vLLM's description of each image, with its place in the prompt.

        Returns:
            int64 [3, tokens] with equal rows, which vLLM keeps for positions of three axes; and 0.
        """
        positions = torch.arange(len(input_tokens))
        if self.config.image_positions == "shared":
            positions = shared_image_positions(positions, *_vision_rows(mm_features))
        return positions.expand(POSITION_ROWS, -1), 0

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Return the language model's hidden states, as vLLM's models do.

        ``positions`` are [tokens], or [3, tokens] from :meth:`get_mrope_input_positions`.
        """
        if positions.ndim == 2:
            positions = positions[0]  # of equal rows
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


def _vision_rows(features: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a prompt's vision tokens, and the tile of each: int64 [vision] both."""
    rows: list[int] = []
    tiles: list[int] = []
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        start, length = feature.mm_position.offset, feature.mm_position.length
        count = tokens_of(_pair(feature.data["token_grids"].data))
        first = tiles[-1] + 1 if tiles else 0
        rows += range(start, start + length)
        tiles += (first + token // count for token in range(length))
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(tiles, dtype=torch.int64)


def _pair(grid: torch.Tensor) -> Grid:
    height, width = grid.tolist()
    return height, width


def _pairs(grids: torch.Tensor) -> list[Grid]:
    return [_pair(grid) for grid in grids]
