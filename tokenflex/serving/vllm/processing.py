"""vLLM's side of the processor: pictures to the model's inputs, and counts to cache keys.

A request's counts become one grid per image before anything else is done. From then on vLLM's keys
for an image's inputs and vision tokens are those of the picture and its own grid: images of a
request do not share a key through the request's list of counts, and requests share what they may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement
from vllm.multimodal.processing.inputs import ProcessorInputs

from tokenflex.counts import AUTO, Grid, tokens_of
from tokenflex.serving.vllm.info import RequestOptions, TokenFlexProcessingInfo, user_errors
from tokenflex.serving.vllm.wishes import Choice, image_choices, request_counts
from tokenflex_kernels.checks import check_count


class TokenFlexMultiModalProcessor(BaseMultiModalProcessor[TokenFlexProcessingInfo]):
    """Pictures to the model's inputs, each with the grid of its vision tokens."""

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> ProcessorInputs:
        """Return inputs at the largest count, whatever the default is."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        largest = {"num_image_tokens": self.info.largest_grid, "penalty": None, "budget": None}
        return replace(inputs, hf_processor_mm_kwargs=largest)

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """Process a request as vLLM does, with its counts resolved to a grid per image.

        Raises:
            VLLMValidationError: counts, images and placeholders do not fit together, or an option
                is not valid.
        """
        images = inputs.mm_data_items.get("image")
        if images is None or not len(images):
            self.info.check_placeholders(inputs.prompt, 0)
            return super().apply(inputs, timing_ctx)
        if not isinstance(images, ImageProcessorItems):
            raise VLLMValidationError(
                "image must be a picture: embeddings of images are not supported",
                parameter="image",
            )
        with user_errors("mm_processor_kwargs"):
            options = self.info.request_options(inputs.hf_processor_mm_kwargs)
            prompt = self._with_marks(inputs.prompt, len(images))
            token_grids = self._token_grids(prompt, images, options)
        resolved = {
            "token_grids": token_grids,
            "max_tiles": options.max_tiles,
            "images_kwargs": options.images_kwargs,
        }
        items = MultiModalDataItems({**inputs.mm_data_items, "image": _Pictures(images.data)})
        return super().apply(
            replace(inputs, prompt=prompt, mm_data_items=items, hf_processor_mm_kwargs=resolved),
            timing_ctx,
        )

    def _with_marks(self, prompt: Sequence[int], images: int) -> list[int]:
        """Return the prompt with the processor's marks around each placeholder.

        Raises:
            VLLMValidationError: the prompt does not hold one placeholder per image.
        """
        processor = self.info.get_hf_processor()
        image_token_id = self.info.get_hf_config().image_token_id
        self.info.check_placeholders(prompt, images)
        tokenizer = self.info.get_tokenizer()
        start, end = (
            tokenizer.encode(mark, add_special_tokens=False) if mark else []
            for mark in (processor.image_start, processor.image_end)
        )
        marked: list[int] = []
        rest = list(prompt)
        while image_token_id in rest:
            at = rest.index(image_token_id)
            marked += rest[:at]
            if start and marked[-len(start) :] != start:
                marked += start
            marked.append(image_token_id)
            rest = rest[at + 1 :]
            if end and rest[: len(end)] != end:
                marked += end
        return marked + rest

    def _token_grids(
        self, prompt: list[int], images: ImageProcessorItems, options: RequestOptions
    ) -> list[Grid]:
        """Return the grid of each image's vision tokens.

        Raises:
            TypeError, ValueError: a count is not valid, or beyond a tile's grid of patches.
        """
        chooser = self.info.chooser
        choices = request_counts(options.num_image_tokens, len(images))
        if options.per_image is not None:
            choices = image_choices(
                choices, options.per_image, chooser.known_counts, chooser.has_router
            )
        self._check_largest(choices)
        budget = options.choice.get("budget")
        if budget is not None:
            check_count("budget", budget)
        elif AUTO in choices and not chooser.has_router:
            raise ValueError(
                "num_image_tokens 'auto' needs a router beside the checkpoint, which has none, "
                "or a budget; give a count"
            )
        if AUTO not in choices and "penalty" in options.choice:
            raise ValueError(
                f"penalty must come with num_image_tokens 'auto', got {options.num_image_tokens!r}"
            )
        if AUTO not in choices and budget is None:
            return cast("list[Grid]", choices)
        chosen = self._choose(prompt, images, options, choices)
        self._check_largest(chosen)
        return chosen

    def _check_largest(self, choices: Sequence[Choice]) -> None:
        """Refuse grids larger than those that memory was set aside for, whatever the pictures."""
        for i, choice in enumerate(choices):
            if isinstance(choice, str):  # to be chosen
                continue
            if self.info.most_patches is None:
                _check_grid(f"num_image_tokens[{i}]", choice, self.info.largest_grid)
            elif tokens_of(choice) > self.info.most_patches:
                raise ValueError(
                    f"num_image_tokens[{i}] must be at most {self.info.most_patches}, the most "
                    f"patches of an image, got {_written(choice)}"
                )

    def _check_grids(
        self,
        choices: Sequence[Choice],
        pixels: Sequence[torch.Tensor],
        patch_grids: Sequence[list[Grid] | None],
    ) -> None:
        """Refuse grids beyond the patches of the pictures that they are for."""
        for choice, *image in zip(choices, pixels, patch_grids, strict=True):
            if isinstance(choice, str):
                continue
            for grid in self.info.patch_grids(*image):
                _check_grid("num_image_tokens", choice, grid)

    def _choose(
        self,
        prompt: list[int],
        images: ImageProcessorItems,
        options: RequestOptions,
        choices: Sequence[Choice],
    ) -> list[Grid]:
        sources = _sources(images)
        for i, source in enumerate(sources):
            if source is None:
                raise ValueError(
                    f"image[{i}] must be given with num_image_tokens 'auto' or a budget: its uuid "
                    "alone does not tell what it shows"
                )
        pixels, patch_grids = self._read(sources, options.max_tiles, options.images_kwargs)
        self._check_grids(choices, pixels, patch_grids)
        return self.info.chooser.choose(prompt, pixels, patch_grids, choices, **options.choice)

    def _read(
        self, sources: Sequence[Any], max_tiles: int, images_kwargs: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], list[list[Grid] | None]]:
        """Return of each image its tiles [tiles, 3, H, W] and, where needed, their patch grids."""
        pixels, patch_grids = [], []
        for source in sources:  # pictures of several sizes do not fit into one tensor
            data, _ = self.info.get_hf_processor().process_images(
                [source], max_tiles=max_tiles, **images_kwargs
            )
            pixels.append(data["pixel_values"])
            patch_grids.append(data.get("grids"))
        return pixels, patch_grids

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        """Return vLLM's key of each picture, and its own grid."""
        options = dict(inputs.hf_processor_mm_kwargs)
        token_grids = cast("list[Grid]", options.pop("token_grids"))
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=options))
        return {
            **hashes,
            "image": [
                f"{key}-{height}x{width}"
                for key, (height, width) in zip(hashes["image"], token_grids, strict=True)
            ],
        }

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        """Return the options with the grids of those images that must be processed."""
        options = inputs.hf_processor_mm_kwargs
        token_grids = cast("list[Grid]", options["token_grids"])
        cached = mm_is_cached["image"]
        missing = [grid for grid, known in zip(token_grids, cached, strict=True) if not known]
        return {**options, "token_grids": missing}

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        """Give pictures as the bytes that came, so that they are read as in training."""
        inputs = super()._get_hf_mm_inputs(mm_items, hf_kwargs)
        if "images" in inputs.hf_data:
            inputs.hf_data["images"] = _sources(mm_items["image"])
        return inputs

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        options = cast("dict[str, Any]", hf_kwargs)
        with user_errors("image"):
            pixels, patch_grids = self._read(
                cast("list[Any]", hf_data["images"]),
                options["max_tiles"],
                options["images_kwargs"],
            )
        with user_errors("mm_processor_kwargs"):
            self._check_grids(options["token_grids"], pixels, patch_grids)
        dtype = self.info.ctx.model_config.dtype
        data = {
            "pixel_values": [tiles.to(dtype) for tiles in pixels],
            "token_grids": torch.tensor(options["token_grids"]),
        }
        if None not in patch_grids:
            data["patch_grids"] = [torch.tensor(grids) for grids in patch_grids]
        return BatchFeature(data)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        # The model looks pictures up by their pixels, and moves to the device what it encodes.
        return {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in hf_inputs
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        image_token_id = self.info.get_hf_config().image_token_id

        def vision_tokens(image: int) -> list[int]:
            item = out_mm_kwargs["image"][image].get_data()
            height, width = item["token_grids"].tolist()
            return [image_token_id] * (len(item["pixel_values"]) * height * width)

        return [PromptReplacement("image", target=[image_token_id], replacement=vision_tokens)]


class _Pictures(ImageProcessorItems):
    """Pictures that keep the bytes they came as; vLLM's drop them where they look a cache up."""

    def _unwrap(self, item: Any) -> Any:
        return item


def _written(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]} = {tokens_of(grid)}"


def _check_grid(name: str, grid: Grid, patches: Grid) -> None:
    if grid[0] > patches[0] or grid[1] > patches[1]:
        raise ValueError(
            f"{name} must be at most the {patches[0]} x {patches[1]} patches "
            f"of a tile, in height and in width, got {_written(grid)}"
        )


def _sources(images: ImageProcessorItems) -> list[Any]:
    """Return the pictures as they came: bytes where vLLM kept them."""
    return [
        image.original_bytes if isinstance(image, MediaWithBytes) else image
        for image in images.data
    ]
