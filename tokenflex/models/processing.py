"""Images and prompts to model inputs; the one object that decides both numbers that must agree.

A prompt holds ``image_token`` once per image. The processor repeats it as often as the image is to
have vision tokens, and hands the same counts to the model as ``num_image_tokens``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import (
    PILImageResampling,
    get_image_size,
    load_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import MultiModalData

from tokenflex.counts import AUTO, Grid, ImageTokenCounts, TokenCount, token_grid, token_grids
from tokenflex.models.auto_map import SavedWithStub
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.tiling import best_tile_grid, check_tile_limits, cut_tiles, num_tiles
from tokenflex_kernels._checks import check_count


class TokenFlexProcessor(SavedWithStub, ProcessorMixin):
    """Image processor and tokenizer in one, with the vision-token count as an argument.

    Args:
        image_processor: a transformers image processor that gives ``pixel_values``.
        tokenizer: a transformers tokenizer that knows ``image_token`` as one token.
        num_image_tokens: the count used when a call names none.
        image_token: the placeholder in prompts, and of each vision token in ``input_ids``.
        image_start: what stands before an image's placeholders, for example ``<img>``.
        image_end: what stands after them.
        max_tiles: images are cut into at most so many tiles, each encoded on its own and with the
            image's count of vision tokens; 1 cuts none.
        min_tiles: and into at least so many.
        use_thumbnail: give the whole image as one more tile, where there are several.
        patch_size: the encoder's, in pixels; needed where tiles are not square.
        chat_template: Jinja template of :meth:`apply_chat_template`; the tokenizer's if None.

    Raises:
        TypeError: a number is not an int.
        ValueError: the tokenizer does not know ``image_token``, the count is no square grid, or
            images cannot be cut as asked.
    """

    auto_classes: ClassVar[dict[str, str]] = {"AutoProcessor": "TokenFlexProcessor"}

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
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None or image_processor is None:
            missing = "tokenizer" if tokenizer is None else "image_processor"
            raise ValueError(f"{missing} must be given, got None")
        if isinstance(num_image_tokens, list):  # JSON has no tuples
            num_image_tokens = tuple(num_image_tokens)
        token_grid(num_image_tokens, name="num_image_tokens")
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
        template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=template)
        if self.max_tiles > 1:
            self._tile_size()  # now, not at the first image

    @property
    def image_prompt(self) -> str:
        """What stands for an image in a prompt; ``image_token`` alone is taken for it too."""
        return f"{self.image_start}{self.image_token}{self.image_end}"

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        num_image_tokens: ImageTokenCounts | Literal["auto"] | None = None,
        max_tiles: int | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for a batch of prompts.

        Args:
            images: an image, a list of them, or a list per prompt, in order of appearance.
            text: a prompt or a list of prompts, each with one ``image_token`` per image.
            num_image_tokens: an int (a perfect square) or (h, w) for all images, or a list with one
                per image; the processor's own ``num_image_tokens`` if None. Each tile of an image
                gets as many. With "auto", one placeholder stands for each image, and ``generate``
                chooses.
            max_tiles: in place of the processor's own.
            return_tensors: "pt"; others are refused.
            padding: as the tokenizer takes it.
            padding_side: "left" suits generation, "right" training on padded batches.
            **kwargs: for the tokenizer, for example ``truncation``.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L]; with images also ``pixel_values``
            [tiles, 3, height, width] and ``num_image_tokens``, a list with one entry per tile.
            ``grids``, a list of (height, width) in patches, where the encoder needs it. With "auto"
            ``num_image_tokens`` is that, and ``tiles_per_image`` the tiles of each image.

        Raises:
            TypeError: ``text`` is not made of strings, or the tokenizer has no such argument.
            ValueError: images, placeholders and counts do not fit together, or truncation cut an
                image's tokens.
        """
        if text is None:
            raise ValueError("text must be a prompt or a list of prompts, got None")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        self._check_arguments(kwargs)
        prompts = [text] if isinstance(text, str) else list(text)
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"text[{i}] must be a string, got {type(prompt).__name__}")
        flat_images = [] if images is None else _flatten(images)
        placeholders = [prompt.count(self.image_token) for prompt in prompts]
        nested = _images_per_prompt(images)
        if nested is not None and nested != placeholders:
            raise ValueError(
                f"text must hold {self.image_token!r} once per image of its prompt: got "
                f"{placeholders} per prompt for {nested} images per prompt"
            )
        if sum(placeholders) != len(flat_images):
            raise ValueError(
                f"text must hold {self.image_token!r} once per image: got {sum(placeholders)} "
                f"(per prompt {placeholders}) for {len(flat_images)} images"
            )
        auto = isinstance(num_image_tokens, str)
        if isinstance(num_image_tokens, str):
            if num_image_tokens != AUTO:
                raise ValueError(
                    f"num_image_tokens must be counts or 'auto', got {num_image_tokens!r}"
                )
            num_image_tokens = 1  # a placeholder
        image_grids = self._count_grids(num_image_tokens, len(flat_images))
        data: dict[str, Any] = {}
        tiles: list[int] = []
        if flat_images:
            data, tiles = self.process_images(flat_images, max_tiles=max_tiles)
            # Host ints from here to the kernels: never a tensor that would be read back.
            data["num_image_tokens"] = [
                height * width if height == width else (height, width)
                for (height, width), n in zip(image_grids, tiles, strict=True)
                for _ in range(n)
            ]
        if auto and flat_images:
            data |= {"num_image_tokens": AUTO, "tiles_per_image": tiles}
            tiles = [1] * len(tiles)  # one placeholder for them all
        per_image = [
            n * height * width for (height, width), n in zip(image_grids, tiles, strict=True)
        ]
        repeats = iter(per_image)
        encoded = self.tokenizer(
            [self._expand(prompt, repeats) for prompt in prompts],
            return_tensors="pt",
            padding=padding,
            padding_side=padding_side,
            return_token_type_ids=False,
            **kwargs,
        )
        self._check_nothing_cut(encoded["input_ids"], placeholders, per_image)
        return BatchFeature({**encoded, **data})

    def process_images(
        self, images: Sequence[Any], max_tiles: int | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        """What the encoder takes, and how many of its inputs (tiles) each image became.

        Args:
            images: PIL images, arrays or tensors.
            max_tiles: in place of the processor's own.

        Returns:
            A dict with ``pixel_values`` and, where the encoder needs it, ``grids``; and a list
            with the tiles of each image.
        """
        limit = self._max_tiles(max_tiles)
        tiles, inputs = [1] * len(images), list(images)
        if limit > 1:
            size, resample = self._tile_size(), self._resample()
            cut = [
                cut_tiles(
                    image,
                    size,
                    self._tile_grid(_size(image), limit),
                    use_thumbnail=self.use_thumbnail,
                    resample=resample,
                )
                for image in images
            ]
            tiles, inputs = [len(one) for one in cut], [tile for one in cut for tile in one]
        processed = self.image_processor(inputs, return_tensors="pt")
        data: dict[str, Any] = {"pixel_values": processed["pixel_values"]}
        if "spatial_shapes" in processed:  # NaFlex: patches of images of any shape
            data["grids"] = [tuple(shape) for shape in processed["spatial_shapes"].tolist()]
        elif (shape := data["pixel_values"].shape)[-2] != shape[-1]:
            if self.patch_size is None:
                raise ValueError(
                    "patch_size must be given to a processor whose tiles are not square, got None "
                    f"and tiles of {shape[-2]} x {shape[-1]}"
                )
            grid = shape[-2] // self.patch_size, shape[-1] // self.patch_size
            data["grids"] = [grid] * shape[0]
        return data, tiles

    def image_tokens(
        self,
        images: Sequence[Any],
        num_image_tokens: ImageTokenCounts | None = None,
        max_tiles: int | None = None,
    ) -> list[int]:
        """How many vision tokens each image will cost, all its tiles together.

        Args:
            images: images, or their (height, width) in pixels.
            num_image_tokens: as the processor is called with it.
            max_tiles: likewise.
        """
        grids = self._count_grids(num_image_tokens, len(images))
        return [
            self._num_tiles(image, max_tiles) * height * width
            for image, (height, width) in zip(images, grids, strict=True)
        ]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Messages to a prompt, or to model inputs with ``tokenize=True``.

        The ``content`` of a message is a string, or a list of ``{"type": "text", "text": ...}`` and
        ``{"type": "image", "image": ...}`` parts (or ``url``, ``path``). It reaches the template as
        a string with :attr:`image_prompt` where images stand, so that the template of any language
        model serves.

        Args:
            conversation: a list of messages, or a list of those.
            chat_template: in place of the processor's own.
            tokenize: return model inputs, not text.
            return_dict: with ``tokenize``: all inputs, not ``input_ids`` alone.
            return_tensors: as the processor takes it.
            processor_kwargs: for the processor, for example ``{"num_image_tokens": 64}``.
            **kwargs: for the template, for example ``add_generation_prompt``.

        Raises:
            ValueError: a part is neither text nor image, or ``return_assistant_tokens_mask`` is
                asked for.
        """
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError(
                "return_assistant_tokens_mask must be False: train on prompt and completion instead"
            )
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        images: list[list[Any]] = []
        texts: list[str] = []
        for messages in conversation if batched else [conversation]:
            shown: list[Any] = []
            flat = [
                {**message, "content": self._flat_content(message.get("content"), shown)}
                for message in messages
            ]
            texts.append(
                super().apply_chat_template(
                    flat, chat_template=chat_template, tokenize=False, **kwargs
                )
            )
            images.append(shown)
        text: Any = texts if batched else texts[0]
        if not tokenize:
            return text
        options = {"add_special_tokens": False, **(processor_kwargs or {})}
        given = options.pop("images", None)
        if given is None and any(images):
            given = images
        inputs = self(
            images=given,
            text=text,
            return_tensors=return_tensors or "pt",
            **options,
        )
        return inputs if return_dict else inputs["input_ids"]

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            "num_image_tokens",
            "tiles_per_image",
            "grids",
        ]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Grid] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """What servers ask: tokens and tiles of images of these (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=self.image_tokens(image_sizes, kwargs.get("num_image_tokens")),
            num_image_patches=[self._num_tiles(size, None) for size in image_sizes],
        )

    def _check_arguments(self, given: Iterable[str]) -> None:
        """The tokenizer would pass over a misspelt argument in silence."""
        known = [
            *inspect.signature(type(self).__call__).parameters,
            *inspect.signature(type(self.tokenizer).__call__).parameters,
            "split_special_tokens",
        ]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"{name} is no argument of the processor or its tokenizer{hint}")

    def _count_grids(self, counts: ImageTokenCounts | None, images: int) -> list[Grid]:
        counts = self.num_image_tokens if counts is None else counts
        return token_grids(counts, images, name="num_image_tokens")

    def _max_tiles(self, max_tiles: int | None) -> int:
        if max_tiles is None:
            return self.max_tiles
        # Fewer than the processor's own minimum is what the caller wants then.
        return check_tile_limits(1, max_tiles)[1]

    def _num_tiles(self, image: Any, max_tiles: int | None) -> int:
        limit = self._max_tiles(max_tiles)
        if limit == 1:
            return 1
        height, width = image if isinstance(image, (tuple, list)) else _size(image)
        return num_tiles(self._tile_grid((height, width), limit), self.use_thumbnail)

    def _tile_grid(self, size: Grid, max_tiles: int) -> Grid:
        lowest = min(self.min_tiles, max_tiles)
        return best_tile_grid(size, self._tile_size(), max_tiles, lowest)

    def _tile_size(self) -> Grid:
        for name in ("crop_size", "size"):
            size = getattr(self.image_processor, name, None) or {}
            height, width = dict(size).get("height"), dict(size).get("width")
            if height and width:
                return height, width
        raise ValueError(
            "max_tiles above 1 needs an image_processor with a size of height and width, got "
            f"{type(self.image_processor).__name__} with size {size or None}"
        )

    def _resample(self) -> int:
        resample = getattr(self.image_processor, "resample", None)
        return int(PILImageResampling.BICUBIC if resample is None else resample)

    def _expand(self, prompt: str, repeats: Iterator[int]) -> str:
        # A prompt may hold the marks already, and leave out the space that ends them.
        end = self.image_end.rstrip()
        parts = (self.image_start, self.image_token, end, self.image_end[len(end) :])
        mark = "(?:{})?{}(?:{})?(?:{})?".format(*map(re.escape, parts))
        return re.sub(
            mark,
            lambda _: self.image_start + self.image_token * next(repeats) + self.image_end,
            prompt,
        )

    def _check_nothing_cut(
        self, input_ids: torch.Tensor, images_per_row: list[int], per_image: list[int]
    ) -> None:
        first = 0
        for row, images in enumerate(images_per_row):
            tokens = per_image[first : first + images]
            kept = int((input_ids[row] == self.image_token_id).sum())
            if kept != sum(tokens):
                raise ValueError(
                    f"truncation must not cut vision tokens: {kept} of {sum(tokens)} are left in "
                    f"row {row}, whose images {list(range(first, first + images))} have {tokens}"
                )
            first += images

    def _flat_content(self, content: Any, images: list[Any]) -> Any:
        """A message's content as a string; what images it brings are added to ``images``."""
        if not isinstance(content, (list, tuple)):
            return content
        text = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                text.append(part["text"])
            elif kind == "image":
                text.append(self.image_prompt)
                found = [part[key] for key in ("image", "url", "path") if part.get(key) is not None]
                images += [load_image(one) if isinstance(one, str) else one for one in found[:1]]
            else:
                raise ValueError(f"content must have parts of type text and image, got {part!r}")
        return "".join(text)


def _images_per_prompt(images: Any) -> list[int] | None:
    """How many images each prompt has, where they come as a list per prompt; else None."""
    if isinstance(images, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in images):
        return [len(entry) if isinstance(entry, (list, tuple)) else 1 for entry in images]
    return None


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        return list(images)
    if _images_per_prompt(images) is not None:
        entries = [one if isinstance(one, (list, tuple)) else [one] for one in images]
        images = [image for entry in entries for image in entry]
    if isinstance(images, (list, tuple)) and not images:
        return []
    try:
        return list(make_flat_list_of_images(images))
    except ValueError as error:
        raise ValueError(
            f"images must be an image, a list of images or a list of those per prompt: {error}"
        ) from error


def _size(image: Any) -> Grid:
    """(height, width) of an image in pixels."""
    if hasattr(image, "getbands"):  # PIL says width first
        return image.size[1], image.size[0]
    height, width = get_image_size(image)
    return height, width


AutoProcessor.register(TokenFlexConfig, TokenFlexProcessor)
