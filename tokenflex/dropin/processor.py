"""The class of a converted processor: as many placeholders as an image has vision tokens.

A processor of transformers gets the text that stands for an image from its ``replace_image_token``.
A converted one changes only the length of each run of placeholders in that text: the family's tags
of rows, columns and tiles stay where they are.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, TextKwargs
from transformers.utils.chat_template_utils import _get_template_variables

from tokenflex.counts import (
    Grid,
    ImageTokenCounts,
    TokenCount,
    TokenCounts,
    token_grid,
    token_grids,
)
from tokenflex.dropin.calls import (
    CALL,
    Call,
    ProcessorState,
    check_all_there,
    check_clips_there,
    check_entries,
    frame_token,
    grids_of_call,
    image_token_id,
    running,
)
from tokenflex.dropin.clips import (
    CallVideos,
    call_with_videos,
    counts_of_clips,
    frames_of,
    read_videos,
    stock_videos,
    take_video_options,
    text_of_clip,
    tiles_in_order,
)
from tokenflex.dropin.families import family_of
from tokenflex.dropin.inputs import (
    arguments_by_name,
    check_option_names,
    images_of_call,
    read_conversation,
    without_layout,
)
from tokenflex.dropin.prepared import PreparedImages
from tokenflex.dropin.sampling import CountStream
from tokenflex.dropin.variants import Variant, change_class, restore_class
from tokenflex.models.conversations import (
    check_tokenized,
    split_chat_options,
    template_source,
)
from tokenflex.prompts import ImageTiles

_TEXT_OPTIONS = {"text_kwargs", *TextKwargs.__annotations__}  # without effect on vision tokens


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
    processor._tokenflex = ProcessorState(token, num_image_tokens)


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


class ConvertedProcessor(PreparedImages):
    """Changes of a processor's class, whose calls then take ``num_image_tokens``."""

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
        if CALL.get() is not None and "num_image_tokens" in self.__dict__:
            stock: TokenCount = self.__dict__["num_image_tokens"]
            return stock
        return self.image_token_counts

    @num_image_tokens.setter
    def num_image_tokens(self, counts: TokenCount | TokenCounts) -> None:
        self.image_token_counts = counts

    def __call__(
        self, *args: Any, num_image_tokens: ImageTokenCounts | str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Return the model inputs of texts and images.

        Args:
            *args: As the stock processor takes them. Prompts in an inner list share their images,
                as for :class:`tokenflex.TokenFlexProcessor`.
            num_image_tokens: One count for all images, or one per image; or "auto": then
                placeholders are not repeated, ``generate`` chooses the counts, and
                ``tiles_per_image`` is returned. With videos, as for
                :class:`tokenflex.TokenFlexProcessor`.
            **kwargs: As the stock processor takes them, and ``max_frames``, ``fps`` and ``budget``
                of videos, which may have any form that :class:`tokenflex.TokenFlexProcessor` takes.

        Returns:
            What the stock processor returns, with ``num_image_tokens``, the count of each tile, and
            ``num_video_tokens``, a list of its frames' counts for each video. Where two pictures
            are one patch in time, they are one frame. Where a family's frames are images to its
            model, ``num_image_tokens`` holds their counts among those of tiles.
        """
        stock = super().__call__
        check_option_names(self, kwargs, inspect.signature(stock).parameters)
        arguments = arguments_by_name(stock, args, kwargs)
        images, text = arguments.get("images"), arguments.get("text")
        has_videos = arguments.get("videos") is not None
        family = self._tokenflex_family
        if has_videos:
            self.check_takes_videos()
        if has_videos and images is not None and family.no_mixture:
            raise ValueError(
                f"images must be None beside videos of {family.model_type}: {family.no_mixture}"
            )
        sampling, budget = take_video_options(arguments, has_videos)
        if isinstance(text, (list, tuple)) and any(isinstance(t, (list, tuple)) for t in text):
            if has_videos:
                raise ValueError(
                    "text must be a prompt or a list of prompts beside videos, got inner lists, "
                    "whose prompts share images alone"
                )
            return self._shared(num_image_tokens, arguments)
        read = None
        if images is not None:
            arguments = without_layout(arguments)
            read = arguments["images"] = images_of_call(self, images, kwargs)
        if kwargs.get("multi_page") or (kwargs.get("images_kwargs") or {}).get("multi_page"):
            raise ValueError(
                f"multi_page is not for a {family.model_type} with a "
                "token-adaptive projector: its pages share one run of placeholders; give one image "
                "per prompt"
            )
        videos = None
        if has_videos:
            videos = read_videos(self, arguments["videos"], text, read, sampling)
            arguments |= stock_videos(self, videos.clips)
            call = call_with_videos(self._tokenflex, num_image_tokens, videos, budget)
        else:
            call = Call(grids_of_call(self._tokenflex, num_image_tokens, images))
        with running(call):
            inputs = stock(**arguments)
        if videos is None:
            check_entries(call, len(call.tiles))
        if videos is not None:
            inputs |= self._counts_with_videos(call, videos, inputs)
        elif call.tiles:
            inputs |= self._counts_of(call)
        if "num_image_tokens" in inputs:
            check_all_there(inputs, image_token_id(self))
        return inputs

    def _counts_with_videos(
        self, call: Call, videos: CallVideos, inputs: BatchFeature
    ) -> dict[str, Any]:
        """Return the model's inputs that tell the count of each tile and frame."""
        family = self._tokenflex_family
        if family.videos is not None:
            token: int = self.tokenizer.convert_tokens_to_ids(frame_token(self))
            check_clips_there(inputs, token, call.clips, family.clip_end_tokens)
            counts = {"num_video_tokens": counts_of_clips(call)}
            return counts | (self._counts_of(call) if call.tiles else {})
        in_order, kept = tiles_in_order(call, videos)
        data: dict[str, Any] = {"num_image_tokens": in_order}
        # Pixels [clips, frames, ..] are padded with zeros, which the model leaves out.
        if kept is not None and inputs["pixel_values"][0].ndim == 3:
            data["pixel_values"] = inputs["pixel_values"][kept]
        return data

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

    def replace_video_token(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        """Return the text of one video, at the counts that the running call has for its frames."""
        call = CALL.get()
        if call is None:
            raise ValueError("replace_video_token is part of a call of the processor")
        grids = call.clips[video_idx]
        if "pixel_values" in video_inputs:  # without the padding of a shorter clip
            clips = video_inputs["pixel_values"][video_idx][None, : len(grids)]
            video_inputs = {**video_inputs, "pixel_values": clips}
        elif "video_grid_thw" not in video_inputs:
            clip = video_inputs["pixel_values_videos"][video_idx][: len(grids)]
            video_inputs = {**video_inputs, "pixel_values_videos": {video_idx: clip}}
        text: str = super().replace_video_token(video_inputs, video_idx, **kwargs)
        end_tokens = self._tokenflex_family.clip_end_tokens
        return text_of_clip(text, frame_token(self), grids, end_tokens)

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
        call = CALL.get()
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
        video_sizes: Any = None,
        *,
        num_image_tokens: ImageTokenCounts | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Return the vision tokens of each image and video, without tags around them.

        Those of an image are of all of its tiles. ``video_sizes`` are (pictures, height, width),
        and ``num_image_tokens`` is then one count for all images and frames.
        """
        stock = super()._get_num_multimodal_tokens
        check_option_names(self, kwargs, inspect.signature(stock).parameters)
        # Before transformers 5.23 the stock method makes its options the defaults of later calls.
        options = {name: value for name, value in kwargs.items() if name not in _TEXT_OPTIONS}
        if video_sizes is not None:
            self.check_takes_videos()
        with running(Call(None)):
            data: MultiModalData = stock(image_sizes, **options)
        if image_sizes is None and video_sizes is None:
            return data
        counts = self._tokenflex.counts if num_image_tokens is None else num_image_tokens
        if isinstance(counts, CountStream):
            raise ValueError(
                "num_image_tokens must be given: this processor draws a count for each prompt, so "
                "the number of tokens cannot be known before"
            )
        if video_sizes is not None:
            height, width = token_grid(counts, name="num_image_tokens")
            end_tokens = self._tokenflex_family.clip_end_tokens
            frames = [frames_of(self, pictures) for pictures, _, _ in video_sizes]
            data.num_video_tokens = [number * height * width + end_tokens for number in frames]
        if image_sizes is None:
            return data
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        grids = token_grids(counts, len(sizes), name="num_image_tokens")
        tokens = {
            image: _tokens_of_blank(self, *image, options)
            for image in dict.fromkeys(zip(sizes, grids, strict=True))
        }
        data.num_image_tokens = [tokens[image] for image in zip(sizes, grids, strict=True)]
        return data


def _tokens_of_blank(
    processor: Any, size: tuple[int, int], grid: Grid, options: dict[str, Any]
) -> int:
    # Families cut images by rules of their own, so a blank image goes through the processor.
    height, width = size
    text = processor.image_prompt
    blank = Image.new("RGB", (width, height))
    inputs = processor(images=blank, text=text, num_image_tokens=grid, **options)
    return len(inputs["num_image_tokens"]) * grid[0] * grid[1]
