"""Images that are processed once and shown in any number of prompts, at any count.

A processor of transformers processes the images of a call and writes their texts into its prompts.
A converted one keeps the texts (:class:`tokenflex.prompts.ImageTiles`), and replays them in later
calls through the family's own code: with blank pictures, of which nothing is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from tokenflex.counts import AUTO, ImageTokenCounts
from tokenflex.dropin.calls import (
    CALL,
    Call,
    ProcessorState,
    check_entries,
    grids_of_call,
    image_token_id,
    nested,
    placeholder_ids,
    placeholders_in,
    running,
)
from tokenflex.dropin.inputs import (
    check_option_names,
    images_of_call,
    is_token_type,
    without_layout,
)
from tokenflex.dropin.variants import Variant
from tokenflex.files import excerpt
from tokenflex.models.call_options import known_options
from tokenflex.models.image_inputs import name_images
from tokenflex.models.prompt_texts import read_prompts, tiles_of_images
from tokenflex.prompts import ImageTiles
from tokenflex.videos import SHOWN_FRAMES

_TEXT_OUTPUTS = {
    *("input_ids", "attention_mask"),
    *("special_tokens_mask", "offset_mapping", "length", "overflowing_tokens", "labels"),
    *("text_replacement_offsets", "num_image_tokens"),
}
"""Outputs of a processor that are not of its images."""


class PreparedImages(Variant):
    """The part of a converted processor's class that prepares images apart from prompts."""

    _tokenflex: ProcessorState

    @property
    def image_prompt(self) -> str:
        """The text that stands for an image in a prompt."""
        names = ("image_placeholder_token", "image_token")
        texts = [getattr(self, name, None) for name in names]
        text: str = next(filter(None, texts), self._tokenflex.image_token)
        return text

    @property
    def video_prompt(self) -> str:
        """The text that stands for a video in a prompt, of families that take videos."""
        text: str = self.video_token
        return text

    def check_takes_videos(self) -> None:
        """Refuse videos of a family that takes none.

        Raises:
            NotImplementedError: With the reason.
        """
        if not self._tokenflex_family.takes_videos:
            raise self._tokenflex_family.videos_refused()

    @property
    def placeholder_ids(self) -> list[int]:
        """The ids of the placeholders of images and frames."""
        return placeholder_ids(self)

    @property
    def max_frames(self) -> int:
        """The most frames of a video that a call shows where it states none."""
        return SHOWN_FRAMES

    @property
    def fps(self) -> None:
        """Frames per second of a video where a call states none: all, up to ``max_frames``."""
        return None

    def adds_special_tokens(self, prompt: str) -> bool:
        """Return whether the tokenizer adds special tokens to the text of a conversation.

        It does, as in ``apply_chat_template`` of transformers, unless the chat template has written
        the first one.
        """
        first = self.tokenizer.bos_token
        return first is None or not prompt.startswith(first)

    def _counts_of(self, call: Call) -> dict[str, Any]:
        """Return the model's inputs that tell the count of each tile."""
        if call.grids is None:
            return {"num_image_tokens": AUTO, "tiles_per_image": call.tiles}
        # Host ints from here to the kernels: a tensor would be read back from the device.
        return {"num_image_tokens": call.tile_counts()}

    def _shared(self, counts: Any, arguments: dict[str, Any]) -> BatchFeature:
        """Return the inputs of prompts in inner lists, whose images are processed once."""
        images, text = arguments.pop("images", None), arguments.pop("text")
        groups = known_options(self)
        of_images = groups["images_kwargs"] - groups["text_kwargs"]
        options = {name: value for name, value in arguments.items() if value is not None}
        for_images = {
            name: options.pop(name)
            for name in [*options]
            if name in of_images or name == "images_kwargs"
        }
        data: dict[str, Any] = {}
        tiles: list[int] = []
        if images is not None:
            data, tiles = self.process_images(images, **for_images)
        inputs = self.encode_text(text, tiles, num_image_tokens=counts, **options)
        return BatchFeature({**inputs, **data})

    def process_images(
        self,
        images: Sequence[Any],
        max_tiles: int | Sequence[int | None] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], list[int]]:
        """Return the image inputs of the model, and the number of tiles of each image.

        See :meth:`tokenflex.TokenFlexProcessor.process_images`. Families may treat images that
        share a prompt otherwise than one alone: give these in inner lists.

        Args:
            images: Images, or a list per prompt.
            max_tiles: For TokenFLEX models; None, for all images or each.
            **options: For the image processor; ``return_tensors`` is "pt" by default.

        Returns:
            A dict for :meth:`ConvertedModel.encode_images`; and for each image its tiles, which
            also hold its text for :meth:`encode_text`.

        Raises:
            ValueError: ``max_tiles`` is given, or images cannot be processed.
        """
        family = self._tokenflex_family
        limits = max_tiles if isinstance(max_tiles, Sequence) else [max_tiles]
        if any(limit is not None for limit in limits):
            raise ValueError(
                f"max_tiles is for TokenFLEX models, got {max_tiles} for a converted "
                f"{family.model_type}: its image processor has options of its own"
            )
        named, per_prompt = name_images(list(images))
        if not named:
            return {}, []
        if family.flat_images or per_prompt is None:
            per_prompt = [1] * len(named)
        rest = iter(named)
        groups: Any = [[next(rest) for _ in range(number)] for number in per_prompt if number]
        text = [self.image_prompt * len(group) for group in groups]
        stock = super().__call__
        arguments = without_layout({"return_tensors": "pt", **options})
        read = images_of_call(self, [image for group in groups for image in group], options)
        pictures = nested(read, [1] * len(read) if family.flat_images else [*map(len, groups)])
        arguments["images"] = read if family.flat_images else pictures
        call = Call(None)
        with running(call):
            outputs = stock(text=text, padding=True, **arguments)
        data = {name: value for name, value in outputs.items() if not _is_of_text(name)}
        return data, [*call.tiles]

    def encode_text(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        tiles_per_image: Sequence[int],
        *,
        num_image_tokens: ImageTokenCounts | str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Return model inputs for prompts about images that are processed already.

        See :meth:`tokenflex.TokenFlexProcessor.encode_text`.

        Args:
            text: As for a call.
            tiles_per_image: The tiles of each image, as :meth:`process_images` returns them.
            num_image_tokens: As for a call.
            **options: For the tokenizer. By default the batch is padded to its longest prompt, on
                the left unless the tokenizer was saved with a side, and tensors are returned.

        Returns:
            What a call returns, without image inputs.

        Raises:
            TypeError: ``tiles_per_image`` are plain ints, which do not tell the images' texts.
            ValueError: Texts, images and counts do not fit together, or the family's processor
                needs images and prompts together.
        """
        check_option_names(self, options, inspect.signature(super().__call__).parameters)
        tiles = [number for number in tiles_per_image if isinstance(number, ImageTiles)]
        if len(tiles) < len(tiles_per_image):
            raise TypeError(
                "tiles_per_image must be what process_images returned, got plain numbers: "
                f"{excerpt([*tiles_per_image])}"
            )
        read = read_prompts(text, self.image_prompt, len(tiles))
        prompts, shown = read.texts, read.image_index
        order = [*range(len(tiles))] if shown is None else shown
        per_prompt = [prompt.count(self.image_prompt) for prompt in prompts]
        drawn_together: Any = tiles if shown is not None else nested(tiles, per_prompt)
        call = Call(grids_of_call(self._tokenflex, num_image_tokens, drawn_together), tiles)
        check_entries(call, len(tiles))
        call.replayed = [self._text_of(call, image) for image in order]
        call.replayed_tiles = [int(tiles[image]) for image in order]
        side = self.tokenizer.padding_side
        if "padding_side" not in self.tokenizer.init_kwargs:
            side = "left"
        arguments = {"padding": True, "padding_side": side, "return_tensors": "pt", **options}
        if tiles:
            blank = Image.new("RGB", (8, 8))
            pictures = [blank] * len(order)
            flat = self._tokenflex_family.flat_images
            arguments["images"] = pictures if flat else nested(pictures, per_prompt)
        stock = super().__call__
        try:
            with running(call):
                outputs = dict(stock(text=prompts, **arguments))
        except (AttributeError, IndexError, KeyError) as error:
            if not call.was_replayed:
                raise
            raise self._not_apart(f"{type(error).__name__}: {error}") from error
        if tiles and not call.was_replayed:
            raise self._not_apart("its processor writes the texts of images in a way of its own")
        inputs = {name: value for name, value in outputs.items() if _is_of_text(name)}
        if not tiles:
            return BatchFeature(inputs)
        kept = placeholders_in(inputs["input_ids"], image_token_id(self))
        expected = sum(text.count(self._tokenflex.image_token) for text in call.replayed)
        if kept != expected:
            raise ValueError(
                f"truncation must not cut vision tokens: {kept} of {expected} are left"
            )
        inputs |= self._counts_of(call)
        if shown is not None:
            inputs["image_index"] = tiles_of_images(shown, tiles)
            if call.grids is None:
                inputs["tiles_per_image"] = [tiles[image] for image in shown]
        return BatchFeature(inputs)

    def _not_apart(self, reason: str) -> ValueError:
        return ValueError(
            f"images of {self._tokenflex_family.model_type} cannot be processed apart from their "
            f"prompts ({reason}): call the processor for each count"
        )

    def _text_of(self, call: Call, image: int) -> str:
        """Return the text of an image at the call's count."""
        tiles, token = call.tiles[image], self._tokenflex.image_token
        if call.grids is None:
            return tiles.text
        height, width = call.grid(image)
        return tiles.text.replace(token, token * (height * width * (tiles // tiles.runs)))

    def _process_images(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Process the images of the running call, unless they were processed before it."""
        call = CALL.get()
        if call is None or call.replayed is None:
            return super()._process_images(images, *args, **kwargs)
        call.was_replayed = True
        # Some families cut the pixels of all images by their numbers of patches.
        tiles = call.replayed_tiles
        return {"pixel_values": torch.zeros(sum(tiles), 1), "num_patches": tiles}, call.replayed


def _is_of_text(name: str) -> bool:
    """Return whether an output of a stock processor describes the prompts, not the images."""
    return name in _TEXT_OUTPUTS or is_token_type(name)
