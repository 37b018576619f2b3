"""Answers to vLLM about a checkpoint, before there is a request, and the options of a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseProcessingInfo

from tokenflex.counts import AUTO, Grid, tokens_of
from tokenflex.models.call_options import CallOptions, sort_options
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.models.tiling import num_tiles
from tokenflex.serving.vllm import feature_cache_bytes
from tokenflex.serving.vllm.choosing import CountChooser
from tokenflex.serving.vllm.wishes import PER_IMAGE, request_counts

_OURS = ("num_image_tokens", PER_IMAGE, "penalty", "budget")
"""Options of a request that its counts are read from."""
_MOST_KNOWN_OPTIONS = 64


@lru_cache(maxsize=4)
def load_processor(checkpoint: str, revision: str | None) -> TokenFlexProcessor:
    """Return the processor of a checkpoint, loaded once in a process."""
    processor: TokenFlexProcessor = TokenFlexProcessor.from_pretrained(
        checkpoint, revision=revision
    )
    return processor


@lru_cache(maxsize=4)
def _chooser(checkpoint: str) -> CountChooser:
    config = TokenFlexConfig.from_pretrained(checkpoint)
    return CountChooser(checkpoint, config, feature_cache_bytes())


@contextmanager
def user_errors(parameter: str) -> Iterator[None]:
    """Turn our refusals into errors that vLLM's server answers with status 400."""
    try:
        yield
    except VLLMValidationError:
        raise
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise VLLMValidationError(str(error), parameter=parameter) from error


@dataclass(frozen=True)
class RequestOptions:
    """The options of a request, merged with the server's.

    Attributes:
        num_image_tokens: counts as the caller gave them.
        per_image: the wishes of single images, None without.
        choice: ``penalty`` and ``budget``.
        max_tiles: the most tiles of an image.
        images_kwargs: for the image processor.
    """

    num_image_tokens: Any
    per_image: Sequence[Any] | None
    choice: dict[str, Any]
    max_tiles: int
    images_kwargs: dict[str, Any]


class TokenFlexProcessingInfo(BaseProcessingInfo):
    """Answers to vLLM about a checkpoint, before there is a request."""

    def get_hf_config(self) -> TokenFlexConfig:
        return cast(TokenFlexConfig, self.ctx.get_hf_config(TokenFlexConfig))

    def get_hf_processor(self, **kwargs: object) -> TokenFlexProcessor:
        """Return the checkpoint's processor. Options of a request are given to its methods."""
        model = self.ctx.model_config
        return load_processor(str(model.model), model.revision)

    def check_placeholders(self, prompt: Sequence[int], images: int) -> None:
        """Check that a prompt's token ids hold one placeholder per image.

        Raises:
            VLLMValidationError: they hold another number.
        """
        image_token_id = self.get_hf_config().image_token_id
        placeholders = sum(token == image_token_id for token in prompt)
        if placeholders != images:
            raise VLLMValidationError(
                f"prompt must hold {self.get_hf_processor().image_token!r} once per image, got "
                f"{placeholders} for {images} images",
                parameter="prompt",
            )

    @property
    def chooser(self) -> CountChooser:
        """The chooser of "auto" counts."""
        return _chooser(str(self.ctx.model_config.model))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the tokens of an image of the most tiles at the largest grid."""
        processor = self.get_hf_processor()
        max_tiles = num_tiles((1, self.server_options.max_tiles), processor.use_thumbnail)
        return {"image": min(max_tiles * tokens_of(self.largest_grid), seq_len)}

    @cached_property
    def largest_grid(self) -> Grid:
        """The largest grid of vision tokens of a tile, which is its grid of patches."""
        if self.most_patches is not None:
            return 1, self.most_patches
        height, width = self.tile_size
        return height // self.patch_size[0], width // self.patch_size[1]

    @cached_property
    def patch_size(self) -> Grid:
        """The (height, width) of a patch in pixels."""
        patch = self.get_hf_config().vision_config.patch_size
        return (patch, patch) if isinstance(patch, int) else tuple(patch)

    @cached_property
    def most_patches(self) -> int | None:
        """The most patches of an image, where images may have any shape; else None."""
        return getattr(self.get_hf_processor().image_processor, "max_num_patches", None)

    @property
    def tile_size(self) -> Grid:
        """The (height, width) of a tile in pixels, where all have the same."""
        size = self.get_hf_processor()._configured_size({})
        size = size or self.get_hf_config().vision_config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def patch_grids(self, pixels: torch.Tensor, grids: Sequence[Grid] | None) -> Sequence[Grid]:
        """Return the (height, width) in patches of each tile of an image.

        Args:
            pixels: [tiles, 3, H, W]; of any kind where ``grids`` are given.
            grids: those that the image processor named, None where the pixels tell them.
        """
        if grids is not None:
            return grids
        height, width = pixels.shape[2] // self.patch_size[0], pixels.shape[3] // self.patch_size[1]
        return [(height, width)] * len(pixels)

    @cached_property
    def server_options(self) -> RequestOptions:
        """The options that the server was started with, which a request may replace.

        Raises:
            TypeError, ValueError: an option is unknown or not valid, or the count is a list.
        """
        options = self._options(self.ctx.get_mm_config().mm_processor_kwargs or {})
        count = options.num_image_tokens
        if isinstance(count, list):  # JSON has no tuples
            count = tuple(count)
        return replace(options, num_image_tokens=request_counts(count, 1)[0])

    def request_options(self, given: Mapping[str, object]) -> RequestOptions:
        """Return the options of a request, merged with the server's.

        Raises:
            TypeError, ValueError: an option is unknown or not valid, or ``max_tiles`` is above the
                server's, for which memory was set aside.
        """
        server = self.server_options
        options = self._options({**(self.ctx.get_mm_config().mm_processor_kwargs or {}), **given})
        if given.get("num_image_tokens") is None:
            shared = given.get("budget") is not None
            counts = AUTO if shared else server.num_image_tokens
            options = replace(options, num_image_tokens=counts)
        limit = server.max_tiles
        if options.max_tiles > limit:
            raise ValueError(
                f"max_tiles must be at most {limit}, with which the server was started, got "
                f"{options.max_tiles}"
            )
        return options

    def _options(self, given: Mapping[str, Any]) -> RequestOptions:
        processor = self.get_hf_processor()
        ours = {name: given[name] for name in _OURS if given.get(name) is not None}
        others = self._sorted_options({k: v for k, v in given.items() if k not in _OURS})
        shared = ours.get("budget") is not None
        counts = ours.pop("num_image_tokens", AUTO if shared else processor.num_image_tokens)
        return RequestOptions(
            num_image_tokens=counts,
            per_image=cast("Sequence[Any] | None", ours.pop(PER_IMAGE, None)),
            choice=ours,
            max_tiles=processor._max_tiles(others.max_tiles),
            images_kwargs={k: v for k, v in others.images_kwargs.items() if v is not None},
        )

    def _sorted_options(self, options: Mapping[str, Any]) -> CallOptions:
        """Return the options of the processor; they are the same for most requests."""
        key = repr(sorted(options.items()))
        if key not in self._known_options:
            if len(self._known_options) == _MOST_KNOWN_OPTIONS:
                self._known_options.clear()
            self._known_options[key] = sort_options(self.get_hf_processor(), options)
        return self._known_options[key]

    @cached_property
    def _known_options(self) -> dict[str, CallOptions]:
        return {}


class TokenFlexDummyInputs(BaseDummyInputsBuilder[TokenFlexProcessingInfo]):
    """The inputs with which vLLM measures the memory that images take."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return pictures that are cut into the most tiles."""
        number = mm_counts.get("image", 0)
        if self.info.most_patches is not None:  # a row of patches
            height, width = self.info.patch_size
            width *= self.info.most_patches
            images = self._get_dummy_images(width=width, height=height, num_images=number)
            return {"image": images}
        height, width = self.info.tile_size
        images = self._get_dummy_images(
            width=width * self.info.server_options.max_tiles,
            height=height,
            num_images=number,
            overrides=mm_options.get("image"),
        )
        return {"image": images}
