"""Images and prompts to model inputs.

A prompt holds ``image_token`` once per image. The processor repeats it once per vision token of the
image, and passes the same counts to the model as ``num_image_tokens``. A video is several images,
its frames, which stand where a prompt holds ``<video>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature

from tokenflex.counts import AUTO, Grid, TokenCount, token_grid, tokens_of
from tokenflex.files import excerpt
from tokenflex.models.auto_map import SavedWithStub
from tokenflex.models.call_options import CallOptions, check_sampling_names, sort_options
from tokenflex.models.chat import image_pattern
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.conversations import ConversationProcessor
from tokenflex.models.image_inputs import NamedImage, name_images
from tokenflex.models.image_preparation import ImagePreparation
from tokenflex.models.prompt_texts import Prompts, read_prompts, tiles_of_images
from tokenflex.models.tiling import check_tile_limits
from tokenflex.models.video_inputs import (
    VIDEO_MARK,
    NamedVideo,
    counts_of_images,
    image_limits,
    in_order,
    name_videos,
)
from tokenflex.videos import SHOWN_FRAMES, FrameSampling
from tokenflex_kernels.checks import check_count


class TokenFlexProcessor(SavedWithStub, ConversationProcessor, ImagePreparation):
    """Image processor and tokenizer in one, with the vision-token count as an argument.

    Prompts are padded on the tokenizer's ``padding_side``. A tokenizer that was made without one is
    set to pad on the left, as generation needs.

    Args:
        image_processor: a transformers image processor that gives ``pixel_values``.
        tokenizer: a transformers tokenizer that knows ``image_token`` as one token.
        num_image_tokens: the default count: an int (a perfect square) or an (h, w) tuple.
        image_token: the placeholder in prompts, and of each vision token in ``input_ids``.
        image_start: the text before an image's placeholders, for example ``<img>``.
        image_end: the text after them.
        max_tiles: the most tiles that an image is cut into, from 1 (do not cut) to 1024. Each is
            encoded on its own, and has the image's count of vision tokens.
        min_tiles: the fewest tiles that an image is cut into.
        use_thumbnail: add the whole image as one more tile, where there are several.
        patch_size: the encoder's, in pixels; needed where tiles are not square.
        max_frames: the most frames of a video, see :class:`tokenflex.videos.FrameSampling`.
        fps: frames per second of a video; None for all, up to ``max_frames``.
        chat_template: Jinja template of :meth:`apply_chat_template`; the tokenizer's if None.

    Raises:
        TypeError: a number is not an int, or the count is a list.
        ValueError: the tokenizer does not know ``image_token``, the count is no square grid, or
            images cannot be cut as asked.
    """

    auto_classes: ClassVar[dict[str, str]] = {"AutoProcessor": "TokenFlexProcessor"}
    skip_tensor_conversion = [
        *ConversationProcessor.skip_tensor_conversion,
        "num_image_tokens",
        "tiles_per_image",
        "image_index",
        "grids",
    ]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: TokenCount = 256,
        image_token: str = "<image>",
        image_start: str = "",
        image_end: str = "",
        max_tiles: int = 1,
        min_tiles: int = 1,
        use_thumbnail: bool = False,
        patch_size: int | None = None,
        max_frames: int = SHOWN_FRAMES,
        fps: float | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        if tokenizer is None or image_processor is None:
            missing = "tokenizer" if tokenizer is None else "image_processor"
            raise ValueError(f"{missing} must be given, got None")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"image_token {image_token!r} must be one token of the tokenizer; add it as a "
                "special token"
            )
        self.image_start, self.image_end = image_start, image_end
        self.min_tiles, self.max_tiles = check_tile_limits(min_tiles, max_tiles)
        self.use_thumbnail = bool(use_thumbnail)
        self.patch_size = None if patch_size is None else check_count("patch_size", patch_size)
        sampling = FrameSampling(max_frames, fps)
        self.max_frames, self.fps = sampling.max_frames, sampling.fps
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=template)
        if self.max_tiles > 1:
            self._tile_size({})  # now, not at the first image

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor of saved values. JSON keeps the pair of a grid as a list."""
        count = processor_dict.get("num_image_tokens")
        if isinstance(count, list):
            processor_dict = {**processor_dict, "num_image_tokens": tuple(count)}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the processor as transformers does, without padding and truncation of the last call.

        The tokenizers library would save these as the tokenizer's own.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        return super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def num_image_tokens(self) -> TokenCount:
        """The default count: an int (a perfect square) or an (h, w) tuple.

        Raises:
            TypeError, ValueError: it is set to something else.
        """
        count: TokenCount = self.__dict__["num_image_tokens"]
        return count

    @num_image_tokens.setter
    def num_image_tokens(self, count: TokenCount) -> None:
        if isinstance(count, (list, str)):
            raise TypeError(
                "num_image_tokens must be one count for all images, an int or an (h, w) tuple, got "
                f"{excerpt(count)}; a call takes a list with one count per image, or 'auto'"
            )
        token_grid(count, name="num_image_tokens")
        # By its own name, as transformers saves the attributes that __init__ names.
        self.__dict__["num_image_tokens"] = count

    @property
    def image_prompt(self) -> str:
        """The text that stands for an image in a prompt; ``image_token`` alone is taken too."""
        return f"{self.image_start}{self.image_token}{self.image_end}"

    def adds_special_tokens(self, prompt: str) -> bool:
        """Return whether the tokenizer adds special tokens to the text of a conversation.

        It does not: as in training, the chat template writes all of them.
        """
        return False

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns for images and text."""
        names = [*self.tokenizer.model_input_names, "pixel_values", "num_image_tokens"]
        if "spatial_shapes" in self.image_processor.model_input_names:
            names.append("grids")
        return [name for name in names if name != "token_type_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return model inputs for a batch of prompts.

        Args:
            images: an image, a list of them, or a list per prompt, in order of appearance. An image
                is whatever :func:`tokenflex.images.load_image` takes: a PIL image, an array or
                tensor, bytes, a path, a URL, a data URL or base64 text.
            text: a prompt or a list of prompts, each with one ``image_token`` per image. Prompts in
                an inner list share their images, which are processed and encoded once:
                ``images=[a, b], text=[[q1, q2], [q3]]`` are three prompts, two of them about a.
                With videos, ``<video>`` stands in a prompt once per video.
            videos: a video, a list of them, or a list per prompt, in order of appearance; None in
                place of a prompt's list makes ``<video>`` text, as it is without videos. A video
                is whatever :func:`tokenflex.videos.load_video` takes, for example the path of a
                GIF or of a folder of frames; in a list that is not per prompt, frames are pictures
                in memory.
            **kwargs: ``num_image_tokens``, ``max_tiles``, ``max_frames``, ``fps``, ``budget``, and
                all options that transformers' processors take, by name or in ``text_kwargs``,
                ``images_kwargs``, ``videos_kwargs`` and ``common_kwargs``:

                - ``num_image_tokens``: an int (a perfect square) or (h, w) for all images and
                  frames, or a list with one per image, for each of the image's tiles. With videos
                  a list has one entry per image and frame, or one per image and video, where a
                  video's is a count or a list of its frames'. With "auto", one placeholder stands
                  for each image and frame, and ``generate`` chooses the counts.
                - ``budget``: vision tokens of each video, spread evenly over its frames: the more
                  frames, the fewer tokens each. ``num_image_tokens`` is then the images'.
                - ``max_tiles``, ``max_frames``, ``fps``: in place of the processor's own.
                - options of the image processor, for example ``size`` or ``do_rescale``. With
                  ``do_rescale=False`` arrays and tensors of floats reach it as they are.
                - options of the tokenizer, for example ``truncation`` and ``max_length``.
                  ``padding`` is True, unless the tokenizer was saved with another.
                - ``return_tensors``: "pt" (the default), "np" or None for lists.
                - ``return_mm_token_type_ids``: return ``mm_token_type_ids`` too, 1 for placeholders
                  and 0 for text.
                - ``return_text_replacement_offsets``: return ``text_replacement_offsets`` too, for
                  each prompt a list of dicts with ``type``, ``span``, ``new_span``, ``text`` and
                  ``replacement``.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L]; with images also ``pixel_values``
            [tiles, 3, height, width] and ``num_image_tokens``, a list with one entry per tile.
            ``grids``, a list of (height, width) in patches, where the encoder needs it. With "auto"
            ``num_image_tokens`` is that, and ``tiles_per_image`` the tiles of each placeholder's
            image. For prompts in inner lists also ``image_index``, the tile of ``pixel_values``
            that each run of placeholders shows.

        Raises:
            ImportError: a video file is given, and no decoder is installed.
            TypeError: ``text`` is not made of strings, or an argument is unknown.
            ValueError: images, placeholders and counts do not fit together, an argument is not
                valid, or truncation cut an image's tokens.
        """
        options = sort_options(self, kwargs)
        self._max_tiles(options.max_tiles)
        named, per_prompt = ([], None) if images is None else name_images(images)
        named_videos, videos_per_prompt = ([], None) if videos is None else name_videos(videos)
        if text is None and not (named or named_videos):
            raise ValueError("text must be a prompt or a list of prompts, got None")
        if videos is not None:
            check_sampling_names(kwargs)
        clips = self._read_clips(named_videos, options)
        prompts = read_prompts(
            text,
            self.image_token,
            len(named),
            per_prompt,
            None if videos is None else [len(clip) for clip in clips],
            videos_per_prompt,
        )
        max_tiles: Any = options.max_tiles
        if videos is not None:
            named, frames = in_order(prompts.kinds, named, clips)
            max_tiles = image_limits(frames, max_tiles)
            options = replace(
                options,
                num_image_tokens=counts_of_images(
                    options.num_image_tokens, frames, options.budget, self.num_image_tokens
                ),
            )
        grids = self._chosen_grids(options, len(named))
        data: dict[str, Any] = {}
        tiles: list[int] = []
        if named:
            data, tiles = self.process_images(
                named, max_tiles, return_tensors=options.return_tensors, **options.images_kwargs
            )
        data |= _counts_of_tiles(grids, tiles, prompts.image_index)
        if not prompts.texts:
            return BatchFeature(data)
        return BatchFeature({**self._encode(prompts, data, tiles, options), **data})

    def _read_clips(
        self, videos: Sequence[NamedVideo], options: CallOptions
    ) -> list[list[NamedImage]]:
        """Read the frames of each video."""
        if not videos and options.budget is not None:
            raise ValueError(
                f"budget is for videos, of which there are none, got {options.budget}; generate "
                "takes one for images, with num_image_tokens='auto'"
            )
        sampling = FrameSampling(
            self.max_frames if options.max_frames is None else options.max_frames,
            self.fps if options.fps is None else options.fps,
        )
        return [video.frames(sampling) for video in videos]

    def show_frames(self, text: str, frames: Sequence[int]) -> str:
        """Return a prompt with an image prompt for each frame in place of each ``<video>``.

        Args:
            text: the prompt.
            frames: the number of frames of each video in it.

        Raises:
            ValueError: the prompt holds ``<video>`` more or less often than there are videos.
        """
        pieces = text.split(VIDEO_MARK)
        if len(pieces) != len(frames) + 1:
            raise ValueError(
                f"text must hold {VIDEO_MARK} once per video, got it {len(pieces) - 1} times for "
                f"{len(frames)} videos"
            )
        shown = [self.image_prompt * number for number in frames]
        return "".join([pieces[0], *(a + b for a, b in zip(shown, pieces[1:], strict=True))])

    def encode_text(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        tiles_per_image: Sequence[int],
        **kwargs: Any,
    ) -> BatchFeature:
        """Return model inputs for prompts about images that are processed already.

        With :meth:`process_images` it does what a call does, for any number of counts of the same
        images, which are processed once.

        Args:
            text: as for a call.
            tiles_per_image: the tiles of each image, as :meth:`process_images` returns them.
            **kwargs: as for a call, without options of the image processor.

        Returns:
            What a call returns, without ``pixel_values`` and ``grids``.

        Raises:
            TypeError, ValueError: as for a call.
        """
        options = sort_options(self, kwargs)
        given = ("max_tiles", "max_frames", "fps", "budget")
        unused = [
            *options.images_kwargs,
            *(name for name in given if getattr(options, name) is not None),
        ]
        if unused:
            raise ValueError(f"{unused[0]} is for images, which are processed already")
        tiles = list(tiles_per_image)
        prompts = read_prompts(text, self.image_token, len(tiles))
        grids = self._chosen_grids(options, len(tiles))
        data = _counts_of_tiles(grids, tiles, prompts.image_index)
        return BatchFeature({**self._encode(prompts, data, tiles, options), **data})

    def _chosen_grids(self, options: CallOptions, images: int) -> list[Grid] | None:
        """Return the token grid of each image, None where they are chosen later."""
        counts = options.num_image_tokens
        if isinstance(counts, str):
            if counts != AUTO:
                raise ValueError(f"num_image_tokens must be counts or 'auto', got {counts!r}")
            return None
        return self._count_grids(counts, images)

    def _encode(
        self,
        prompts: Prompts,
        data: dict[str, Any],
        tiles: list[int],
        options: CallOptions,
    ) -> dict[str, Any]:
        """Put the text of each image in the place of its placeholder, and tokenize."""
        inputs = {**data, "tiles_per_image": tiles}
        image_texts = [self.replace_image_token(inputs, i) for i in range(len(tiles))]
        if prompts.image_index is not None:
            image_texts = [image_texts[image] for image in prompts.image_index]
        replacements = iter(image_texts)
        expanded = [
            self._expand(prompt, replacements, frames)
            for prompt, frames in zip(prompts.texts, prompts.frames, strict=True)
        ]
        encoded = dict(
            self.tokenizer(
                [text for text, _, _ in expanded],
                return_tensors=options.return_tensors,
                **options.text_kwargs,
            )
        )
        images_per_row = [images for _, images, _ in expanded]
        tokens = [text.count(self.image_token) for text in image_texts]
        self._check_nothing_cut(encoded["input_ids"], images_per_row, tokens)
        if options.return_mm_token_type_ids:
            encoded["mm_token_type_ids"] = self._token_types(encoded["input_ids"])
        if options.return_text_replacement_offsets:
            encoded["text_replacement_offsets"] = [offsets for _, _, offsets in expanded]
        return encoded

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for an image, one placeholder per vision token.

        Args:
            image_inputs: the outputs of a call for the images, with ``tiles_per_image`` where these
                are not one each.
            image_idx: the index of the image.
            **kwargs: not used.
        """
        counts = image_inputs["num_image_tokens"]
        if counts == AUTO:
            tokens = 1
        else:
            tiles = image_inputs.get("tiles_per_image") or [1] * len(counts)
            first = sum(tiles[:image_idx])
            tokens = sum(map(tokens_of, counts[first : first + tiles[image_idx]]))
        return f"{self.image_start}{self.image_token * tokens}{self.image_end}"

    def _expand(
        self, prompt: str, replacements: Iterator[str], frames: Sequence[int]
    ) -> tuple[str, int, list[dict[str, Any]]]:
        """Return the prompt with its placeholders replaced, and where each stood and stands.

        Args:
            prompt: the prompt.
            replacements: the text of each image or frame in order.
            frames: the number of frames of each video in order. Without videos the mark is text.

        Returns:
            The text, its number of images and frames, and an entry per image and video.
        """
        pattern = image_pattern(self.image_start, self.image_token, self.image_end)
        if frames:
            pattern = re.compile(f"{pattern.pattern}|{re.escape(VIDEO_MARK)}")
        remaining = iter(frames)
        pieces: list[str] = []
        offsets: list[dict[str, Any]] = []
        last = length = images = 0
        for match in pattern.finditer(prompt):
            is_video = bool(frames) and match.group() == VIDEO_MARK
            shown = next(remaining) if is_video else 1
            images += shown
            replacement = "".join(islice(replacements, shown))
            start = length + match.start() - last
            pieces += [prompt[last : match.start()], replacement]
            last, length = match.end(), start + len(replacement)
            offsets.append(
                {
                    "type": "video" if is_video else "image",
                    "span": match.span(),
                    "new_span": (start, length),
                    "text": match.group(),
                    "replacement": replacement,
                }
            )
        return "".join([*pieces, prompt[last:]]), images, offsets

    def _token_types(self, input_ids: Any) -> Any:
        """Return 1 for placeholders and 0 for others, in the form of ``input_ids``."""
        if isinstance(input_ids, list):
            return [[int(token == self.image_token_id) for token in row] for row in input_ids]
        is_image = input_ids == self.image_token_id
        if isinstance(is_image, torch.Tensor):
            return is_image.long()
        return is_image.astype(np.int64)

    def _check_nothing_cut(
        self, input_ids: Any, images_per_row: list[int], per_image: list[int]
    ) -> None:
        first = 0
        for row, (ids, images) in enumerate(zip(input_ids, images_per_row, strict=True)):
            tokens = per_image[first : first + images]
            if isinstance(ids, list):
                kept = ids.count(self.image_token_id)
            else:
                kept = int((ids == self.image_token_id).sum())
            if kept != sum(tokens):
                raise ValueError(
                    f"truncation must not cut vision tokens: {kept} of {sum(tokens)} are left in "
                    f"row {row}, whose images {list(range(first, first + images))} have {tokens}"
                )
            first += images


def _counts_of_tiles(
    grids: list[Grid] | None, tiles: list[int], shown: list[int] | None
) -> dict[str, Any]:
    """Return the model's inputs that tell the count of each tile, and where tiles are shown."""
    if not tiles:
        return {}
    data = {} if shown is None else {"image_index": tiles_of_images(shown, tiles)}
    if grids is None:
        of_placeholders = tiles if shown is None else [tiles[image] for image in shown]
        return {**data, "num_image_tokens": AUTO, "tiles_per_image": of_placeholders}
    # Host ints from here to the kernels: never a tensor that would be read back.
    counts = [height * width if height == width else (height, width) for height, width in grids]
    per_tile = [count for count, number in zip(counts, tiles, strict=True) for _ in range(number)]
    return {**data, "num_image_tokens": per_tile}


AutoProcessor.register(TokenFlexConfig, TokenFlexProcessor)
