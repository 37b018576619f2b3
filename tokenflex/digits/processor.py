"""Tokenizer and image processor of the digits task. A word is one token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil

from tokenflex.counts import TokenCount
from tokenflex.digits.canvas import (
    CELL_PIXELS,
    CELLS,
    COLOURS,
    QUADRANTS,
    QUESTIONS,
    cell_name,
    fewest_and_most,
)
from tokenflex.models.processing import TokenFlexProcessor

SPECIAL_TOKENS = ("<pad>", "<unk>", "<eos>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{{ '<eos>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
)


def digits_vocabulary(cells: int = CELLS) -> dict[str, int]:
    """Return the token id of each word."""
    words = [*map(str, range(10)), *COLOURS, "blank", *QUADRANTS, *QUESTIONS]
    words += [cell_name(cell, cells) for cell in range(cells * cells)]
    words += map(str, range(10, fewest_and_most(cells)[1] + 1))
    return _vocabulary(words)


def _vocabulary(words: Sequence[str]) -> dict[str, int]:
    return {word: token_id for token_id, word in enumerate([*SPECIAL_TOKENS, *words])}


def digits_processor(num_image_tokens: TokenCount = 16, cells: int = CELLS) -> TokenFlexProcessor:
    """Build a processor for canvases of ``cells`` per side, without any saved file."""
    return _processor(digits_vocabulary(cells), cells * CELL_PIXELS, num_image_tokens)


def word_processor(
    words: Sequence[str], image_size: int, num_image_tokens: TokenCount
) -> TokenFlexProcessor:
    """Build a processor whose tokens are the words, for images of ``image_size`` pixels a side."""
    return _processor(_vocabulary(words), image_size, num_image_tokens)


def _processor(
    vocabulary: dict[str, int], image_size: int, num_image_tokens: TokenCount
) -> TokenFlexProcessor:
    model = WordLevel(vocabulary, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT_TEMPLATE,
    )
    image_processor = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return TokenFlexProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens)
