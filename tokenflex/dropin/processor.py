"""The seam on the processor's side: as many placeholders as the image is to have tokens.

A processor of transformers asks its ``replace_image_token`` for the text that stands for an image.
A converted one asks the stock method, and then changes the length of each run of placeholders in
its answer: tags of rows, columns and tiles stay where the family puts them.
"""

from __future__ import annotations

import functools
import inspect
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, TextKwargs
from transformers.utils.chat_template_utils import _get_template_variables

from tokenflex.counts import (
    Grid,
    ImageTokenCounts,
    TokenCount,
    TokenCounts,
    is_one_count,
    token_grid,
    token_grids,
)
from tokenflex.dropin.families import Family, family_of
from tokenflex.dropin.options import check_option_names
from tokenflex.dropin.sampling import CountStream
from tokenflex.dropin.variants import variant_of
from tokenflex.models.chat import IMAGE_MARK, Chat, is_batch, read_chat
from tokenflex.models.conversations import (
    images_of_chats,
    named_conversations,
    split_chat_options,
)
from tokenflex.models.image_inputs import name_images, read_images


@dataclass
class _State:
    """What a converted processor knows beside what the stock one does."""

    image_token: str
    counts: TokenCount | CountStream


@dataclass
class _Call:
    """A call of a converted processor that is under way."""

    asked: Grid | list[Grid]
    tiles: list[list[TokenCount]] = field(default_factory=list)


_TEXT_OPTIONS = {"text_kwargs", *TextKwargs.__annotations__}  # on which no count depends

# Of this thread or task alone: one processor may serve several at a time.
_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)


def convert_processor(processor: Any, config: Any, num_image_tokens: TokenCount) -> Any:
    """Change a processor in place, so that it takes ``num_image_tokens``.

    Args:
        processor: of a supported family, with a tokenizer.
        config: the model's; its ``image_token_id`` is the placeholder.
        num_image_tokens: the count used when a call names none.

    Returns:
        ``processor``.

    Raises:
        TypeError: it is no processor with an image processor and a tokenizer.
        ValueError: the model's placeholder is not a token of its tokenizer.
    """
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
    family = family_of(config)
    if not hasattr(type(processor), "_tokenflex_family"):
        stock: Any = type(processor)
        processor.__class__ = processor_variant(stock, family)
    processor._tokenflex = _State(token, num_image_tokens)
    return processor


def check_default_count(count: Any, *, name: str) -> None:
    """Refuse what is not one count for all images; a list would be one per image.

    Raises:
        TypeError: neither an int nor an (h, w) tuple of ints.
        ValueError: not a perfect square, or a side below 1.
    """
    if isinstance(count, list):
        raise TypeError(
            f"{name} must be one count for all images, an int or an (h, w) tuple, got {count!r}"
        )
    token_grid(count, name=name)


def restore_processor(processor: Any) -> Any:
    """The stock processor again, in place; one that is not converted stays as it is."""
    if hasattr(type(processor), "_tokenflex_family"):
        processor.__class__ = type(processor)._tokenflex_stock_class
        del processor._tokenflex
    return processor


@functools.cache
def processor_variant(stock: Any, family: Family) -> Any:
    """A subclass of a processor's class whose calls take ``num_image_tokens``."""
    signature = inspect.signature(stock.__call__)
    chat_signature = inspect.signature(stock.apply_chat_template)
    call_names = signature.parameters
    chat_names = {
        *inspect.signature(ProcessorMixin.apply_chat_template).parameters,
        *chat_signature.parameters,
    }

    @functools.wraps(stock.__call__)
    def __call__(
        self: Any, *args: Any, num_image_tokens: ImageTokenCounts | None = None, **kwargs: Any
    ) -> BatchFeature:
        check_option_names(self, kwargs, call_names)
        call = signature.bind_partial(self, *args, **kwargs)
        images = call.arguments.get("images")
        if call.arguments.get("videos", kwargs.get("videos")) is not None:
            raise NotImplementedError(
                f"{family.model_type} with a token-adaptive projector takes images only so far; "
                "give the frames of a video as images"
            )
        if images is not None:
            read = _read_images(self, images, kwargs)
            kwargs = _without_layout(kwargs)
            call = signature.bind_partial(self, *args, **kwargs)
            call.arguments["images"] = read
        if kwargs.get("multi_page") or (kwargs.get("images_kwargs") or {}).get("multi_page"):
            raise ValueError(
                f"multi_page is not for a {family.model_type} with a token-adaptive projector: its "
                "pages share one run of placeholders; give one image per prompt"
            )
        state: _State = self._tokenflex
        this = _Call(_asked(state, num_image_tokens, images))
        before = _CALL.set(this)
        try:
            inputs = stock.__call__(*call.args, **call.kwargs)
        finally:
            _CALL.reset(before)
        asked, tiles = this.asked, this.tiles
        if isinstance(asked, list) and len(asked) != len(tiles):
            raise ValueError(
                f"num_image_tokens must have one entry per image: got {len(asked)} entries for "
                f"{len(tiles)} images"
            )
        if tiles:
            # Host ints from here to the kernels: never a tensor that would be read back.
            inputs["num_image_tokens"] = [count for image in tiles for count in image]
            _check_all_there(inputs, self.tokenizer.convert_tokens_to_ids(state.image_token))
        return inputs

    @functools.wraps(stock.apply_chat_template)
    def apply_chat_template(self: Any, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        call = chat_signature.bind_partial(self, conversation, *args)
        given = {**call.arguments, **kwargs}
        template = given.get("chat_template")
        templates = self.chat_template if isinstance(self.chat_template, dict) else {}
        default = templates.get("default") if templates else self.chat_template
        source = default if template is None else templates.get(template, template)
        more = {n: kwargs.pop(n) for n in [*kwargs] if n not in chat_names}
        # transformers hands these to every template, whether it takes them or not.
        of_all = {*self.tokenizer.special_tokens_map, "reasoning_effort"}
        unused = {n: more.pop(n) for n in [*more] if n in of_all}
        variables, options = split_chat_options(source, more, kwargs.pop("processor_kwargs", None))
        variables |= unused
        check_option_names(self, options, [*call_names, *_get_template_variables(source)])
        tokenize = bool(given.get("tokenize"))
        if options and not tokenize:
            raise ValueError(
                f"{', '.join(sorted(options))} must be given with tokenize=True, or to the call "
                "that takes the text"
            )
        placeholders, foreign = _placeholders(self)
        chats = [
            read_chat(messages, name, placeholders, foreign)
            for messages, name in named_conversations(conversation)
        ]
        messages = [_with_images(self, chat, options, tokenize) for chat in chats]
        call.arguments["conversation"] = messages if is_batch(conversation) else messages[0]
        kwargs |= {"processor_kwargs": options} if options else {}
        return stock.apply_chat_template(*call.args, **call.kwargs, **kwargs, **variables)

    def replace_image_token(self: Any, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        stock_text = stock.replace_image_token(self, image_inputs, image_idx, **kwargs)
        state: _State = self._tokenflex
        row_break = getattr(self, "image_break_token", None)
        text = stock_text.replace(row_break, "") if row_break else stock_text
        run = re.compile(f"(?:{re.escape(state.image_token)})+")
        runs = len(run.findall(text))
        tiles = runs if family.tiles is None else family.tiles(self, image_inputs, image_idx)
        if not runs or tiles % runs:
            raise ValueError(
                f"image {image_idx} has {tiles} tiles, but {runs} runs of placeholders in "
                f"{stock_text!r}"
            )
        this = _CALL.get()
        if this is None:
            raise ValueError("replace_image_token is part of a call of the processor")
        height, width = _grid_of(this.asked, image_idx)
        count: TokenCount = height * width if height == width else (height, width)
        this.tiles.append([count] * tiles)
        return run.sub(state.image_token * (height * width * (tiles // runs)), text)

    def image_token_counts(self: Any) -> TokenCount | TokenCounts:
        """The count of images whose call names none, or the :class:`TokenCounts` to draw from."""
        counts = self._tokenflex.counts
        return counts.counts if isinstance(counts, CountStream) else counts

    def set_image_token_counts(self: Any, counts: TokenCount | TokenCounts) -> None:
        if isinstance(counts, TokenCounts):
            self._tokenflex.counts = CountStream(counts)
        else:
            check_default_count(counts, name="image_token_counts")
            self._tokenflex.counts = counts

    methods = {
        "__call__": __call__,
        "apply_chat_template": apply_chat_template,
        "replace_image_token": replace_image_token,
        "image_token_counts": property(image_token_counts, set_image_token_counts),
    }
    if hasattr(stock, "_get_num_multimodal_tokens"):
        methods["_get_num_multimodal_tokens"] = _token_numbers(stock, family)
    return variant_of(stock, family, processor_variant, methods)


def _token_numbers(stock: Any, family: Family) -> Any:
    """Make the method that says, of images of given sizes, how many vision tokens they become."""
    signature = inspect.signature(stock._get_num_multimodal_tokens)

    @functools.wraps(stock._get_num_multimodal_tokens)
    def _get_num_multimodal_tokens(
        self: Any,
        image_sizes: Any = None,
        *args: Any,
        num_image_tokens: ImageTokenCounts | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Vision tokens of each image in all of its tiles, without the tags around them."""
        check_option_names(self, kwargs, signature.parameters)
        # Before transformers 5.23 the stock method makes its options the defaults of later calls.
        options = {n: v for n, v in kwargs.items() if n not in _TEXT_OPTIONS}
        call = signature.bind(self, image_sizes, *args, **options)
        if call.arguments.get("video_sizes", kwargs.get("video_sizes")) is not None:
            raise NotImplementedError(
                f"{family.model_type} with a token-adaptive projector takes images only so far; "
                "give the frames of a video as images"
            )
        data: MultiModalData = stock._get_num_multimodal_tokens(*call.args, **call.kwargs)
        if image_sizes is None:
            return data
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        counts = _counts_of(self._tokenflex, num_image_tokens, len(sizes))
        tokens = {
            (size, count): _tokens_of_blank(self, size, count, options)
            for size, count in dict.fromkeys(zip(sizes, counts, strict=True))
        }
        data.num_image_tokens = [tokens[key] for key in zip(sizes, counts, strict=True)]
        return data

    return _get_num_multimodal_tokens


def _placeholders(processor: Any) -> tuple[list[str], list[str]]:
    """Return what stands for an image in the processor's prompts, and what users write for it."""
    names = ("image_token", "boi_token")  # of which a family's prompts hold one
    tokens = [getattr(processor, name, None) for name in names]
    own = [*dict.fromkeys([processor._tokenflex.image_token, *filter(None, tokens)])]
    return own, [] if IMAGE_MARK in own else [IMAGE_MARK]


def _with_images(
    processor: Any, chat: Chat, options: dict[str, Any], tokenize: bool
) -> list[dict[str, Any]]:
    """Return a conversation's messages with their images read, where they will be used."""
    if not tokenize or not chat.images:
        return chat.messages
    images_of_chats([chat], options.get("images"))
    read = iter(_read_images(processor, chat.images, options))
    return [
        {
            **message,
            "content": [
                {**part, "image": next(read)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        if isinstance(message.get("content"), list)
        else message
        for message in chat.messages
    ]


def _read_images(processor: Any, images: Any, options: dict[str, Any]) -> Any:
    """Read the images of a call, nested as they are given."""
    named, per_prompt = name_images(images)
    groups = (options.get("common_kwargs"), options.get("images_kwargs"), options)
    merged = {name: value for group in groups for name, value in (group or {}).items()}
    read = read_images(named, processor.image_processor, merged)
    if per_prompt is not None:
        rest = iter(read)
        return [[next(rest) for _ in range(number)] for number in per_prompt]
    return read if isinstance(images, (list, tuple)) or len(read) != 1 else read[0]


def _without_layout(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the layout of arrays, once these are read."""
    return {
        name: _without_layout(value) if name in ("images_kwargs", "common_kwargs") else value
        for name, value in options.items()
        if name != "input_data_format"
    }


def _asked(state: _State, counts: Any, images: Any) -> Grid | list[Grid]:
    """One grid for all images of a call, or one per image."""
    if counts is None:
        if isinstance(state.counts, CountStream):
            return _drawn(state.counts, images)
        counts = state.counts
    if is_one_count(counts):
        return token_grid(counts, name="num_image_tokens")
    entries = getattr(counts, "ndim", 1) and hasattr(counts, "__len__")  # a 0-d array has no length
    return token_grids(counts, len(counts) if entries else 0, name="num_image_tokens")


def _counts_of(state: _State, counts: Any, images: int) -> list[Grid]:
    """Return the grid of each image of which only the size is known."""
    if counts is None and isinstance(state.counts, CountStream):
        raise ValueError(
            "num_image_tokens must be given: this processor draws a count for each prompt, so the "
            "number of tokens cannot be known before"
        )
    return token_grids(state.counts if counts is None else counts, images, name="num_image_tokens")


def _tokens_of_blank(
    processor: Any, size: tuple[int, int], grid: Grid, options: dict[str, Any]
) -> int:
    """Return the vision tokens of an image of ``size``, in all of its tiles.

    Families cut images by rules of their own, so a blank one goes through the processor.
    """
    height, width = size
    blank = Image.new("RGB", (width, height))
    text = getattr(processor, "image_token", None) or processor._tokenflex.image_token
    inputs = processor(images=blank, text=text, num_image_tokens=grid, **options)
    tiles: int = len(inputs["num_image_tokens"])
    return tiles * grid[0] * grid[1]


def _drawn(counts: CountStream, images: Any) -> list[Grid]:
    """A count per prompt, for all of its images; per image where they come as one list."""
    if images is None:
        return []
    groups = images if isinstance(images, (list, tuple)) else [images]
    sizes = [len(group) if isinstance(group, (list, tuple)) else 1 for group in groups]
    return [grid for size in sizes for grid in [token_grid(counts.next())] * size]


def _check_all_there(inputs: BatchFeature, image_token_id: int) -> None:
    if "input_ids" not in inputs:
        return
    counts = inputs["num_image_tokens"]
    expected = sum(c[0] * c[1] if isinstance(c, tuple) else c for c in counts)
    ids = inputs["input_ids"]
    if isinstance(ids, torch.Tensor):
        kept = int((ids == image_token_id).sum())
    else:
        kept = sum(list(row).count(image_token_id) for row in ids)
    if kept != expected:
        raise ValueError(f"truncation must not cut vision tokens: {kept} of {expected} are left")


def _grid_of(asked: Grid | list[Grid], image_idx: int) -> Grid:
    if isinstance(asked, tuple):
        return asked
    if image_idx >= len(asked):
        raise ValueError(
            f"num_image_tokens must have one entry per image: got {len(asked)} entries, but "
            "there are more images"
        )
    return asked[image_idx]
