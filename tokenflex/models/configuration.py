"""The configuration of a model: a vision encoder, a projector and a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tokenflex.counts import TokenCount, token_grid
from tokenflex.models.auto_map import SavedWithStub
from tokenflex.positions import check_image_positions, check_position
from tokenflex_kernels.checks import check_count, check_eps
from tokenflex_kernels.pool_norm.axis_weights import check_mode


class TokenFlexConfig(SavedWithStub, PretrainedConfig):
    """Configuration of :class:`TokenFlexForConditionalGeneration`.

    Args:
        vision_config: config, or dict with a ``model_type``, of any transformers vision encoder
            that returns patch features as ``last_hidden_state``; SigLIP by default.
        text_config: config, or dict with a ``model_type``, of a transformers causal language model
            with ``inputs_embeds`` and a ``past_key_values`` cache; Qwen2 by default. Its transform
            of logits must be one of :mod:`tokenflex.models.head`.
        image_token_id: the placeholder of one vision token in ``input_ids``.
        num_image_tokens: the default number of vision tokens per image.
        pooling: "adaptive" (the paper) or "resize" (the released model).
        projector_hidden_width: width of the gated unit; 3 * vision width if None.
        projector_eps: of the projector's LayerNorm.
        projector_position: None, or "normalized" for a learned term of the position of each token's
            cell in its image, see :class:`tokenflex.TokenAdaptiveProjector`.
        image_positions: "sequential" numbers an image's vision tokens like text; "shared" gives all
            of them the position of its last one, so that no distance depends on their number. It
            needs ``projector_position``, which alone then distinguishes them. The two together
            let a model answer at counts it was not trained with.
        trained_num_image_tokens: the counts the model was trained with, if known. The model warns
            of others.

    Raises:
        TypeError: a value is of a wrong type.
        ValueError: an unknown ``model_type``, ``pooling`` or position, a count that is no square
            grid, a vision encoder without ``hidden_size`` or ``patch_size``.
    """

    model_type = "tokenflex"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "TokenFlexConfig",
        "AutoModel": "TokenFlexModel",
        "AutoModelForImageTextToText": "TokenFlexForConditionalGeneration",
        "AutoModelForMultimodalLM": "TokenFlexForConditionalGeneration",
        "AutoProcessor": "TokenFlexProcessor",
    }
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # Trainer's predictions are logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "image_hidden_states"]

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        image_token_id: int = 151655,
        num_image_tokens: TokenCount = 256,
        pooling: str = "adaptive",
        projector_hidden_width: int | None = None,
        projector_eps: float = 1e-5,
        projector_position: str | None = None,
        image_positions: str = "sequential",
        trained_num_image_tokens: Sequence[TokenCount] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config("vision_config", vision_config, "siglip_vision_model")
        for field in ("hidden_size", "patch_size"):
            if getattr(self.vision_config, field, None) is None:
                raise ValueError(
                    f"vision_config must have {field}, and model_type "
                    f"{self.vision_config.model_type!r} has none"
                )
        self.text_config = _sub_config("text_config", text_config, "qwen2")
        if isinstance(image_token_id, bool) or not isinstance(image_token_id, int):
            raise TypeError(f"image_token_id must be an int, got {image_token_id!r}")
        if image_token_id < 0:
            raise ValueError(
                f"image_token_id must be from 0 to {self.text_config.vocab_size - 1}, a row of "
                f"the embedding, got {image_token_id}"
            )
        self.image_token_id = image_token_id
        token_grid(num_image_tokens, name="num_image_tokens")
        self.num_image_tokens = num_image_tokens
        self.pooling = check_mode(pooling, name="pooling")
        if projector_hidden_width is not None:
            check_count("projector_hidden_width", projector_hidden_width)
        self.projector_hidden_width = projector_hidden_width
        self.projector_eps = check_eps(projector_eps)
        self.projector_position = check_position(projector_position, name="projector_position")
        self.image_positions = check_image_positions(image_positions, projector_position)
        if trained_num_image_tokens is not None:
            trained_num_image_tokens = list(trained_num_image_tokens)
            for i, count in enumerate(trained_num_image_tokens):
                token_grid(count, name=f"trained_num_image_tokens[{i}]")
        self.trained_num_image_tokens = trained_num_image_tokens
        tied = getattr(self.text_config, "tie_word_embeddings", False)
        kwargs.setdefault("tie_word_embeddings", bool(tied))
        super().__init__(**kwargs)


def _sub_config(
    name: str, value: dict[str, Any] | PretrainedConfig | None, default_type: str
) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"{name} must be a config or a dict, got {type(value).__name__}")
    fields = dict(value or {})
    model_type = fields.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{name} has model_type {model_type!r}, which transformers does not know")
    return CONFIG_MAPPING[model_type](**fields)


AutoConfig.register("tokenflex", TokenFlexConfig)
