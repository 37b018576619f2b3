"""Images and prompts to model inputs; the one object that decides both numbers that must agree.

A prompt holds ``image_token`` once per image. The processor repeats it as often as the image is to
have vision tokens, and hands the same counts to the model as ``num_image_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from tokenflex.counts import ImageTokenCounts, TokenCount, token_grid, token_grids
from tokenflex.models.configuration import TokenFlexConfig


class TokenFlexProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, with the vision-token count as an argument.

    Args:
        image_processor: a transformers image processor that gives ``pixel_values``.
        tokenizer: a transformers tokenizer that knows ``image_token`` as one token.
        num_image_tokens: the count used when a call names none.
        image_token: the placeholder in prompts, and of each vision token in ``input_ids``.
        chat_template: Jinja template of :meth:`apply_chat_template`; the tokenizer's if None.

    Raises:
        ValueError: the tokenizer does not know ``image_token``, or the count is no square grid.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: TokenCount = 256,
        image_token: str = "<image>",
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
        template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
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
                per image; the processor's own ``num_image_tokens`` if None.
            return_tensors: "pt"; others are refused.
            padding: as the tokenizer takes it.
            padding_side: "left" suits generation, "right" training on padded batches.
            **kwargs: for the tokenizer, for example ``truncation``.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L]; with images also ``pixel_values``
            [images, 3, height, width] and ``num_image_tokens``, a list with one entry per image.

        Raises:
            TypeError: ``text`` is not made of strings.
            ValueError: images, placeholders and counts do not fit together, or truncation cut an
                image's tokens.
        """
        if text is None:
            raise ValueError("text must be a prompt or a list of prompts, got None")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
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
        counts = self.num_image_tokens if num_image_tokens is None else num_image_tokens
        grids = token_grids(counts, len(flat_images), name="num_image_tokens")
        repeats = iter(height * width for height, width in grids)
        encoded = self.tokenizer(
            [self._expand(prompt, repeats) for prompt in prompts],
            return_tensors="pt",
            padding=padding,
            padding_side=padding_side,
            return_token_type_ids=False,
            **kwargs,
        )
        data = dict(encoded)
        if flat_images:
            expected = sum(height * width for height, width in grids)
            kept = int((encoded["input_ids"] == self.image_token_id).sum())
            if kept != expected:
                raise ValueError(
                    f"truncation must not cut vision tokens: {kept} of {expected} are left"
                )
            data.update(self.image_processor(flat_images, return_tensors="pt"))
            # Host ints from here to the kernels: never a tensor that would be read back.
            data["num_image_tokens"] = [
                height * width if height == width else (height, width) for height, width in grids
            ]
        return BatchFeature(data)

    def _expand(self, prompt: str, repeats: Any) -> str:
        first, *rest = prompt.split(self.image_token)
        return first + "".join(self.image_token * next(repeats) + part for part in rest)

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            "num_image_tokens",
        ]


def _images_per_prompt(images: Any) -> list[int] | None:
    """How many images each prompt has, where they come as a list per prompt; else None."""
    if isinstance(images, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in images):
        return [len(entry) if isinstance(entry, (list, tuple)) else 1 for entry in images]
    return None


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        return list(images)
    try:
        return list(make_flat_list_of_images(images))
    except ValueError as error:
        raise ValueError(
            f"images must be an image, a list of images or a list of those per prompt: {error}"
        ) from error


AutoProcessor.register(TokenFlexConfig, TokenFlexProcessor)
