"""The class of a converted processor: as many placeholders as an image has vision tokens.

A processor of transformers gets the text that stands for an image from its ``replace_image_token``.
A converted one changes only the length of each run of placeholders in that text: the family's tags
of rows, columns and tiles stay where they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, TextKwargs
from transformers.utils.chat_template_utils import _get_template_variables

from tokenflex.counts import (
    AUTO,
    Grid,
    ImageTokenCounts,
    TokenCount,
    TokenCounts,
    is_one_count,
    token_grid,
    token_grids,
    tokens_of,
)
from tokenflex.dropin.families import family_of
from tokenflex.dropin.inputs import (
    arguments_by_name,
    check_option_names,
    images_of_call,
    read_conversation,
    without_layout,
)
from tokenflex.dropin.sampling import CountStream
from tokenflex.dropin.variants import Variant, change_class, restore_class
from tokenflex.files import excerpt
from tokenflex.models.call_options import known_options
from tokenflex.models.conversations import (
    check_tokenized,
    split_chat_options,
    template_source,
)
from tokenflex.models.image_inputs import name_images
from tokenflex.models.prompt_texts import read_prompts, tiles_of_images
from tokenflex.prompts import ImageTiles, runs_of

_TEXT_OPTIONS = {"text_kwargs", *TextKwargs.__annotations__}  # without effect on vision tokens
_TEXT_OUTPUTS = {
    *("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"),
    *("special_tokens_mask", "offset_mapping", "length", "overflowing_tokens", "labels"),
    *("text_replacement_offsets", "num_image_tokens"),
}
"""Outputs of a processor that are not of its images."""


@dataclass
class _State:
    """State of a converted processor: its placeholder, and the counts of calls without counts."""

    image_token: str
    counts: TokenCount | CountStream


@dataclass
class _Call:
    """A running call.

    Attributes:
        grids: The grid of all images or of each; None for one placeholder per run.
        tiles: Of each image that has been replaced by its text so far.
        replayed: The texts of images that were processed before, as the prompts show them.
        replayed_tiles: Their numbers of tiles.
    """

    grids: Grid | list[Grid] | None
    tiles: list[ImageTiles] = field(default_factory=list)
    replayed: list[str] | None = None
    replayed_tiles: list[int] = field(default_factory=list)

    def grid(self, image: int) -> Grid:
        assert self.grids is not None
        return self.grids[image] if isinstance(self.grids, list) else self.grids

    def tile_counts(self) -> list[TokenCount]:
        """Return the count of each tile."""
        return [
            _as_count(self.grid(image))
            for image, tiles in enumerate(self.tiles)
            for _ in range(tiles)
        ]


# Of this thread or task alone: one processor may serve several at a time.
_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)


def convert_processor(processor: Any, config: Any, num_image_tokens: TokenCount) -> None:
    """Change the processor of a model in place, so that it takes ``num_image_tokens``."""
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(processor, ProcessorMixin) or tokenizer is None:
        raise TypeError(
            "processor must be a transformers processor with a tokenizer, got "
            f"{type(processor).__name__}"
        )
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    if token is None or token == tokenizer.unk_token:
        raise ValueError(
            f"processor does not fit the model: its tokenizer has no token of id "
            f"{config.image_token_id}, the model's image_token_id"
        )
    if not isinstance(processor, Variant):
        change_class(processor, family_of(config), ConvertedProcessor, _TokenNumbers)
    processor._tokenflex = _State(token, num_image_tokens)


def restore_processor(processor: Any) -> None:
    """Undo :func:`convert_processor`, in place; a stock processor stays as it is."""
    if isinstance(processor, Variant):
        restore_class(processor)
        del processor._tokenflex


def check_default_count(count: Any, *, name: str) -> None:
    """Refuse anything but one count for all images; a list would be one count per image."""
    if isinstance(count, list):
        raise TypeError(
            f"{name} must be one count for all images, an int or an (h, w) tuple, got {count!r}"
        )
    token_grid(count, name=name)


class ConvertedProcessor(Variant):
    """Changes of a processor's class, whose calls then take ``num_image_tokens``."""

    _tokenflex: _State

    @property
    def image_token_counts(self) -> TokenCount | TokenCounts:
        """The count of images where a call gives none, or the TokenCounts that draws it."""
        counts = self._tokenflex.counts
        return counts.counts if isinstance(counts, CountStream) else counts

    @image_token_counts.setter
    def image_token_counts(self, counts: TokenCount | TokenCounts) -> None:
        if isinstance(counts, TokenCounts):
            self._tokenflex.counts = CountStream(counts)
        else:
            check_default_count(counts, name="image_token_counts")
            self._tokenflex.counts = counts

    @property
    def num_image_tokens(self) -> TokenCount | TokenCounts:
        """The same as ``image_token_counts``, by the name that TokenFLEX processors have.

        Some stock processors have a number by this name, which their own code still sees.
        """
        if _CALL.get() is not None and "num_image_tokens" in self.__dict__:
            stock: TokenCount = self.__dict__["num_image_tokens"]
            return stock
        return self.image_token_counts

    @num_image_tokens.setter
    def num_image_tokens(self, counts: TokenCount | TokenCounts) -> None:
        self.image_token_counts = counts

    @property
    def image_prompt(self) -> str:
        """The text that stands for an image in a prompt."""
        text: str | None = getattr(self, "image_token", None)
        return text or self._tokenflex.image_token

    def adds_special_tokens(self, prompt: str) -> bool:
        """Return whether the tokenizer adds special tokens to the text of a conversation.

        It does, as in ``apply_chat_template`` of transformers, unless the chat template has written
        the first one.
        """
        first = self.tokenizer.bos_token
        return first is None or not prompt.startswith(first)

    def __call__(
        self, *args: Any, num_image_tokens: ImageTokenCounts | str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Return the model inputs of texts and images.

        Args:
            *args: As the stock processor takes them. Prompts in an inner list share their images,
                as for :class:`tokenflex.TokenFlexProcessor`.
            num_image_tokens: One count for all images, or one per image; or "auto": then
                placeholders are not repeated, ``generate`` chooses the counts, and
                ``tiles_per_image`` is returned.
            **kwargs: As the stock processor takes them.
        """
        stock = super().__call__
        check_option_names(self, kwargs, inspect.signature(stock).parameters)
        arguments = arguments_by_name(stock, args, kwargs)
        images, text = arguments.get("images"), arguments.get("text")
        if arguments.get("videos") is not None:
            raise self._tokenflex_family.videos_refused()
        if isinstance(text, (list, tuple)) and any(isinstance(t, (list, tuple)) for t in text):
            return self._shared(num_image_tokens, arguments)
        if images is not None:
            arguments = without_layout(arguments)
            arguments["images"] = images_of_call(self, images, kwargs)
        if kwargs.get("multi_page") or (kwargs.get("images_kwargs") or {}).get("multi_page"):
            raise ValueError(
                f"multi_page is not for a {self._tokenflex_family.model_type} with a "
                "token-adaptive projector: its pages share one run of placeholders; give one image "
                "per prompt"
            )
        call = _Call(_grids_of_call(self._tokenflex, num_image_tokens, images))
        with _running(call):
            inputs = stock(**arguments)
        _check_entries(call, len(call.tiles))
        if call.tiles:
            inputs |= self._counts_of(call)
            _check_all_there(inputs, image_token_id(self))
        return inputs

    def _counts_of(self, call: _Call) -> dict[str, Any]:
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
        self, images: Sequence[Any], max_tiles: int | None = None, **options: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Return the image inputs of the model, and the number of tiles of each image.

        See :meth:`tokenflex.TokenFlexProcessor.process_images`. Families may treat images that
        share a prompt otherwise than one alone: give these in inner lists.

        Args:
            images: Images, or a list per prompt.
            max_tiles: For TokenFLEX models; None.
            **options: For the image processor; ``return_tensors`` is "pt" by default.

        Returns:
            A dict for :meth:`ConvertedModel.encode_images`; and for each image its tiles, which
            also hold its text for :meth:`encode_text`.

        Raises:
            ValueError: ``max_tiles`` is given, or images cannot be processed.
        """
        family = self._tokenflex_family
        if max_tiles is not None:
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
        pictures = _nested(read, [1] * len(read) if family.flat_images else [*map(len, groups)])
        arguments["images"] = read if family.flat_images else pictures
        call = _Call(None)
        with _running(call):
            outputs = stock(text=text, padding=True, **arguments)
        data = {name: value for name, value in outputs.items() if name not in _TEXT_OUTPUTS}
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
            ValueError: Texts, images and counts do not fit together.
        """
        check_option_names(self, options, inspect.signature(super().__call__).parameters)
        tiles = [number for number in tiles_per_image if isinstance(number, ImageTiles)]
        if len(tiles) < len(tiles_per_image):
            raise TypeError(
                "tiles_per_image must be what process_images returned, got plain numbers: "
                f"{excerpt([*tiles_per_image])}"
            )
        prompts, shown = read_prompts(text, self.image_prompt, len(tiles))
        order = [*range(len(tiles))] if shown is None else shown
        per_prompt = [prompt.count(self.image_prompt) for prompt in prompts]
        drawn_together: Any = tiles if shown is not None else _nested(tiles, per_prompt)
        call = _Call(_grids_of_call(self._tokenflex, num_image_tokens, drawn_together), tiles)
        _check_entries(call, len(tiles))
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
            arguments["images"] = pictures if flat else _nested(pictures, per_prompt)
        stock = super().__call__
        with _running(call):
            outputs = dict(stock(text=prompts, **arguments))
        inputs = {name: value for name, value in outputs.items() if name in _TEXT_OUTPUTS}
        if not tiles:
            return BatchFeature(inputs)
        kept = _placeholders(inputs["input_ids"], image_token_id(self))
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

    def _text_of(self, call: _Call, image: int) -> str:
        """Return the text of an image at the call's count."""
        tiles, token = call.tiles[image], self._tokenflex.image_token
        if call.grids is None:
            return tiles.text
        height, width = call.grid(image)
        return tiles.text.replace(token, token * (height * width * (tiles // tiles.runs)))

    def _process_images(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Process the images of the running call, unless they were processed before it."""
        call = _CALL.get()
        if call is None or call.replayed is None:
            return super()._process_images(images, *args, **kwargs)
        # Some families cut the pixels of all images by their numbers of patches.
        tiles = call.replayed_tiles
        return {"pixel_values": torch.zeros(sum(tiles), 1), "num_patches": tiles}, call.replayed

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the prompt of a conversation, or model inputs with ``tokenize=True``.

        Args:
            conversation: A list of messages, or a list of those.
            *args: As the stock processor takes them.
            **kwargs: Likewise. Those that neither the stock method nor the chat template takes are
                options of the processor, as those in ``processor_kwargs``.
        """
        stock = super().apply_chat_template
        arguments = arguments_by_name(stock, (conversation, *args), kwargs)
        named = {
            *inspect.signature(stock).parameters,
            *inspect.signature(ProcessorMixin.apply_chat_template).parameters,
        }
        more = {name: arguments.pop(name) for name in [*arguments] if name not in named}
        template = template_source(self.chat_template, arguments.get("chat_template"))
        # transformers gives these to every template, whether it takes them or not.
        for_all = {*self.tokenizer.special_tokens_map, "reasoning_effort"}
        unused = {name: more.pop(name) for name in [*more] if name in for_all}
        variables, options = split_chat_options(
            template, more, arguments.pop("processor_kwargs", None)
        )
        call_parameters = inspect.signature(super().__call__).parameters
        check_option_names(self, options, [*call_parameters, *_get_template_variables(template)])
        tokenize = bool(arguments.get("tokenize"))
        check_tokenized(options, tokenize)
        arguments["conversation"] = read_conversation(self, conversation, options, tokenize)
        if options:
            arguments["processor_kwargs"] = options
        return stock(**arguments, **variables, **unused)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return the text of one image, at the count that the running call has for it."""
        stock_text = super().replace_image_token(image_inputs, image_idx, **kwargs)
        family, token = self._tokenflex_family, self._tokenflex.image_token
        row_break = getattr(self, "image_break_token", None)
        text = stock_text.replace(row_break, "") if row_break else stock_text
        run = re.compile(f"(?:{re.escape(token)})+")
        runs = len(run.findall(text))
        tiles = runs if family.tiles is None else family.tiles(self, image_inputs, image_idx)
        if not runs or tiles % runs:
            raise ValueError(
                f"image {image_idx} has {tiles} tiles, but {runs} runs of placeholders in "
                f"{stock_text!r}"
            )
        call = _CALL.get()
        if call is None:
            raise ValueError("replace_image_token is part of a call of the processor")
        if isinstance(call.grids, list) and image_idx >= len(call.grids):
            raise ValueError(
                f"num_image_tokens must have one entry per image: got {len(call.grids)} entries, "
                "but there are more images"
            )
        call.tiles.append(ImageTiles(int(tiles), run.sub(token, text), runs))
        return self._text_of(call, image_idx)


class _TokenNumbers(Variant):
    """Changes of a processor's class that counts the tokens of images by their sizes."""

    _tokenflex_method = "_get_num_multimodal_tokens"

    def _get_num_multimodal_tokens(
        self: Any,
        image_sizes: Any = None,
        *args: Any,
        num_image_tokens: ImageTokenCounts | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Return the vision tokens of each image in all of its tiles, without tags around them."""
        stock = super()._get_num_multimodal_tokens
        check_option_names(self, kwargs, inspect.signature(stock).parameters)
        # Before transformers 5.23 the stock method makes its options the defaults of later calls.
        options = {name: value for name, value in kwargs.items() if name not in _TEXT_OPTIONS}
        arguments = arguments_by_name(stock, (image_sizes, *args), options)
        if arguments.get("video_sizes") is not None:
            raise self._tokenflex_family.videos_refused()
        with _running(_Call(None)):
            data: MultiModalData = stock(**arguments)
        if image_sizes is None:
            return data
        counts = self._tokenflex.counts if num_image_tokens is None else num_image_tokens
        if isinstance(counts, CountStream):
            raise ValueError(
                "num_image_tokens must be given: this processor draws a count for each prompt, so "
                "the number of tokens cannot be known before"
            )
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        grids = token_grids(counts, len(sizes), name="num_image_tokens")
        tokens = {
            image: _tokens_of_blank(self, *image, options)
            for image in dict.fromkeys(zip(sizes, grids, strict=True))
        }
        data.num_image_tokens = [tokens[image] for image in zip(sizes, grids, strict=True)]
        return data


def image_token_id(processor: Any) -> int:
    """Return the id of a converted processor's placeholder."""
    token: int = processor.tokenizer.convert_tokens_to_ids(processor._tokenflex.image_token)
    return token


def _tokens_of_blank(
    processor: Any, size: tuple[int, int], grid: Grid, options: dict[str, Any]
) -> int:
    # Families cut images by rules of their own, so a blank image goes through the processor.
    height, width = size
    text = getattr(processor, "image_token", None) or processor._tokenflex.image_token
    blank = Image.new("RGB", (width, height))
    inputs = processor(images=blank, text=text, num_image_tokens=grid, **options)
    return len(inputs["num_image_tokens"]) * grid[0] * grid[1]


def _as_count(grid: Grid) -> TokenCount:
    height, width = grid
    return height * width if height == width else grid


def _nested(images: Sequence[Any], per_prompt: Sequence[int]) -> list[list[Any]]:
    """Return images as a list per prompt."""
    rest = iter(images)
    return [[next(rest) for _ in range(number)] for number in per_prompt]


@contextmanager
def _running(call: _Call) -> Iterator[None]:
    """Make a call the running one within a ``with`` block."""
    outer = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(outer)


def _check_entries(call: _Call, images: int) -> None:
    if isinstance(call.grids, list) and len(call.grids) != images:
        raise ValueError(
            f"num_image_tokens must have one entry per image: got {len(call.grids)} entries "
            f"for {images} images"
        )


def _grids_of_call(state: _State, counts: Any, images: Any) -> Grid | list[Grid] | None:
    """Return the grid of all images of a call, or of each; None where they are chosen later."""
    if isinstance(counts, str) and counts == AUTO:
        return None
    if counts is None and isinstance(state.counts, CountStream):
        # One draw per prompt, for all of its images; per image where they come as one list.
        prompts = (
            images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        )
        sizes = [len(prompt) if isinstance(prompt, (list, tuple)) else 1 for prompt in prompts]
        return [grid for size in sizes for grid in [token_grid(state.counts.next())] * size]
    counts = state.counts if counts is None else counts
    if is_one_count(counts):
        return token_grid(counts, name="num_image_tokens")
    has_length = getattr(counts, "ndim", 1) and hasattr(counts, "__len__")  # not a 0-d array
    return token_grids(counts, len(counts) if has_length else 0, name="num_image_tokens")


def _placeholders(ids: Any, placeholder: int) -> int:
    """Return the number of placeholders among ids, a tensor or lists."""
    if isinstance(ids, torch.Tensor):
        return int((ids == placeholder).sum())
    return sum(list(row).count(placeholder) for row in ids)


def _check_all_there(inputs: BatchFeature, placeholder: int) -> None:
    if "input_ids" not in inputs:
        return
    counts = inputs["num_image_tokens"]
    if counts == AUTO:
        expected = sum(map(runs_of, inputs["tiles_per_image"]))
    else:
        expected = sum(map(tokens_of, counts))
    kept = _placeholders(inputs["input_ids"], placeholder)
    if kept != expected:
        raise ValueError(f"truncation must not cut vision tokens: {kept} of {expected} are left")
