"""``num_image_tokens="auto"`` before vLLM sees a request.

vLLM must know how many tokens an image has before its model runs: they are part of the prompt, and
of the key under which the image is cached. A choice needs the image's patch features and the
question's embeddings, so the process that prepares requests has the encoder and the embedding
table too, on its CPU, from the first choice on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel

from tokenflex.counts import AUTO, Grid, TokenCount, token_grid, tokens_of
from tokenflex.files import checkpoint_folder
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.image_features import ImageFeatures
from tokenflex.models.vision import EncodedImages
from tokenflex.models.weights import weight_files
from tokenflex.routing.choice import choose_counts
from tokenflex.routing.ladder import trained_counts
from tokenflex.routing.storage import has_router, load_router
from tokenflex.serving.feature_cache import FeatureCache
from tokenflex.serving.vllm.wishes import Choice

_ENCODER = "model.vision_model."
_LANGUAGE_MODEL = "model.language_model."


class CountChooser:
    """The part of a model that chooses counts, loaded at the first choice; thread-safe.

    Args:
        checkpoint: the folder of the model, with its router.
        config: the model's config.
        max_bytes: the most bytes of encoder features to keep.
    """

    def __init__(self, checkpoint: str | Path, config: TokenFlexConfig, max_bytes: int) -> None:
        self.checkpoint = str(checkpoint)
        self.config = config
        self.features: FeatureCache[EncodedImages] = FeatureCache(max_bytes)
        self._model: _Chooser | None = None
        self._lock = Lock()

    @property
    def has_router(self) -> bool:
        """True if the checkpoint has a router."""
        return has_router(SimpleNamespace(name_or_path=self.checkpoint))

    @cached_property
    def known_counts(self) -> tuple[TokenCount, ...]:
        """The counts that the model knows, rising: the router's, or those of training, or none."""
        if self.has_router:
            return load_router(self.checkpoint).counts
        if not self.config.trained_num_image_tokens:
            return ()
        return trained_counts(SimpleNamespace(config=self.config))

    def choose(
        self,
        input_ids: Sequence[int],
        pixels: Sequence[torch.Tensor],
        patch_grids: Sequence[Sequence[Grid] | None],
        choices: Sequence[Choice] | None = None,
        *,
        penalty: float | None = None,
        budget: int | None = None,
    ) -> list[Grid]:
        """Return the grid of each image of a prompt.

        Images of fixed grids are left out of the prompt, and taken off the budget.

        Args:
            input_ids: the prompt's tokens, one placeholder per image.
            pixels: of each image [tiles, 3, H, W].
            patch_grids: of each image the (height, width) in patches of its tiles, None where the
                pixels tell it.
            choices: of each image its grid, or "auto" where that is to be chosen; None if all are.
            penalty: see :func:`tokenflex.routing.choice.choose_counts`.
            budget: the most vision tokens of the prompt.

        Raises:
            FileNotFoundError: there is neither a router nor a budget.
            TypeError, ValueError: ``penalty`` or ``budget`` is not valid.
        """
        choices = [AUTO] * len(pixels) if choices is None else choices
        if budget is not None:
            budget = self._left(budget, choices, [len(tiles) for tiles in pixels])
        fixed = [choice != AUTO for choice in choices]
        if all(fixed):
            return [*cast("Sequence[Grid]", choices)]
        chosen = iter(
            self._choose(
                _without(fixed, input_ids, self.config.image_token_id),
                [tiles for tiles, is_fixed in zip(pixels, fixed, strict=True) if not is_fixed],
                [grids for grids, is_fixed in zip(patch_grids, fixed, strict=True) if not is_fixed],
                penalty,
                budget,
            )
        )
        return [next(chosen) if isinstance(choice, str) else choice for choice in choices]

    def _left(self, budget: int, choices: Sequence[Choice], tiles: Sequence[int]) -> int:
        """Return what images of fixed grids leave of a budget for the others."""
        pairs = [*zip(choices, tiles, strict=True)]
        fixed = sum(tokens_of(choice) * n for choice, n in pairs if not isinstance(choice, str))
        fewest = fixed
        if AUTO in choices:
            if not self.known_counts:
                raise ValueError(
                    "budget needs counts to choose from, which this model has neither in a router "
                    "nor in its config's trained_num_image_tokens: give num_image_tokens"
                )
            each = tokens_of(self.known_counts[0])
            fewest += sum(each * n for choice, n in pairs if choice == AUTO)
        if budget < fewest:
            raise ValueError(
                f"budget must be at least {fewest}, the fewest vision tokens that the images of "
                f"the request can have, got {budget}"
            )
        return budget - fixed

    def _choose(
        self,
        input_ids: Sequence[int],
        pixels: Sequence[torch.Tensor],
        patch_grids: Sequence[Sequence[Grid] | None],
        penalty: float | None,
        budget: int | None,
    ) -> list[Grid]:
        model = self._loaded()
        encoded = [
            self.features.features(images, partial(model.encode, patch_grids=grids), grids or ())
            for images, grids in zip(pixels, patch_grids, strict=True)
        ]
        chosen = choose_counts(
            model,
            torch.tensor([list(input_ids)]),
            num_image_tokens=AUTO,
            penalty=penalty,
            budget=budget,
            encoded_images=EncodedImages.joined(encoded),
            tiles_per_image=[len(images) for images in encoded],
        )
        first_tiles = accumulate([len(images) for images in encoded[:-1]], initial=0)
        return [token_grid(chosen["num_image_tokens"][tile]) for tile in first_tiles]

    def _loaded(self) -> _Chooser:
        with self._lock:
            if self._model is None:
                self._model = _Chooser(self.checkpoint, self.config)
            return self._model


def _without(images: Sequence[bool], input_ids: Sequence[int], image_token_id: int) -> list[int]:
    """Return a prompt without the placeholders of some of its images."""
    left_out = iter(images)
    return [token for token in input_ids if token != image_token_id or not next(left_out)]


class _Chooser(ImageFeatures, nn.Module):
    """The parts of a model that :func:`choose_counts` uses: encoder, embedding table, config."""

    def __init__(self, checkpoint: str, config: TokenFlexConfig) -> None:
        super().__init__()
        self.config = config
        self.name_or_path = checkpoint
        self.generation_config = SimpleNamespace(pad_token_id=None)  # one prompt has no padding
        self.dtype = torch.float32
        with torch.device("cpu"):
            self.vision_model = AutoModel.from_config(config.vision_config, dtype=self.dtype).eval()
        with torch.device("meta"):
            language_model = AutoModel.from_config(config.text_config)
        embedding = language_model.get_input_embeddings()
        if type(embedding) is not nn.Embedding:
            raise ValueError(
                "num_image_tokens='auto' needs a language model with a plain embedding table in "
                f"vLLM, got {type(embedding).__name__}"
            )
        name = next(name for name, module in language_model.named_modules() if module is embedding)
        weights = _read_weights(checkpoint, (_ENCODER, f"{_LANGUAGE_MODEL}{name}.weight"))
        table = weights.pop(f"{_LANGUAGE_MODEL}{name}.weight")
        self.vision_model.load_state_dict(
            {key.removeprefix(_ENCODER): value for key, value in weights.items()}
        )
        self.embedding = nn.Embedding.from_pretrained(table)
        # What choices ask of a projector, whose weights they do not need.
        width = config.vision_config.hidden_size
        self.projector: Any = SimpleNamespace(vision_width=width, pooling=config.pooling)
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, patch_grids: Sequence[Grid] | None) -> EncodedImages:
        return self.encode_images(pixels, patch_grids)


def _read_weights(checkpoint: str, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint whose names begin so."""
    tensors = {}
    for file in weight_files(checkpoint_folder(checkpoint)):
        with safe_open(file, framework="pt") as opened:
            names: list[str] = opened.keys()
            for name in names:
                if name.startswith(prefixes):
                    tensors[name] = opened.get_tensor(name)
    return tensors
