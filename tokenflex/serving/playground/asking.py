"""One question about one picture, answered at several counts. The picture is encoded once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenflex.answers import FirstTokenClock
from tokenflex.counts import AUTO, TokenCount, token_grid, tokens_of
from tokenflex.evaluation.generation import answers_with_certainty, special_tokens
from tokenflex.images import Source, load_image
from tokenflex.models.loading import check_length
from tokenflex.serving.playground.subjects import Panel, Shown, subject_of
from tokenflex.videos import FrameSampling, is_animated, is_frames, load_video


@dataclass(frozen=True)
class CountAnswer:
    """An answer at one count, and its cost.

    Attributes:
        asked: The count as it was asked for, or "auto".
        count: The count of each tile of the picture.
        tiles: Inputs of the encoder that the picture became.
        text: The answer, greedy.
        certainty: Probability of the least certain token of the answer, 0 to 1.
        encoder_seconds: Time to encode the picture, once for all counts.
        first_token_seconds: Time to encode the picture, read the prompt and give the first token.
        seconds: Time to the end of the answer, encoding included: that of a call at this count
            alone.
        is_trained: Whether the model was trained with the count; None if it does not say.
        panels: The picture as the encoder sees it.
        pooling: The projector's pooling, "adaptive" or "resize".
    """

    asked: TokenCount | str
    count: TokenCount
    tiles: int
    text: str
    certainty: float
    encoder_seconds: float
    first_token_seconds: float
    seconds: float
    is_trained: bool | None
    panels: list[Panel]
    pooling: str

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of the prompt, those of all tiles together."""
        return self.tiles * tokens_of(self.count)

    @property
    def name(self) -> str:
        """The count in words: ``9``, ``2 x 3``, or ``auto: 9``."""
        count = count_name(self.count)
        return f"{AUTO}: {count}" if self.asked == AUTO else count


def count_name(count: TokenCount) -> str:
    """Return a count in words: ``9``, or ``2 x 3`` for a grid that is not square."""
    height, width = token_grid(count)
    return f"{height * width}" if height == width else f"{height} x {width}"


@torch.no_grad()
def ask_at_counts(
    model: Any,
    processor: Any,
    picture: Source | Sequence[Source] | None,
    question: str,
    counts: Sequence[TokenCount | str],
    *,
    max_new_tokens: int = 64,
    max_tiles: int | None = None,
) -> Iterator[CountAnswer]:
    """Yield the greedy answer to a question at each count, in the order of ``counts``.

    Args:
        model: A TokenFLEX model, or a stock model with a token-adaptive projector, in evaluation
            mode.
        processor: Its processor.
        picture: As :func:`tokenflex.images.load_image` takes it. For a TokenFLEX model an animated
            GIF or WebP, or a list of frames, is a clip: a count is that of each frame.
        question: The text of the user's turn.
        counts: Perfect squares, (h, w) grids, or "auto" for a TokenFLEX model with a router. A
            count is that of each tile of the picture.
        max_new_tokens: The most tokens of an answer.
        max_tiles: The most tiles of the picture; the processor's own limit if None.

    Raises:
        FileNotFoundError: A count is "auto", and the model has no router.
        TypeError: A count or the picture is of a wrong type.
        ValueError: The picture cannot be read, the question is empty, no count is given or one is
            not valid, or the vision tokens exceed the language model's positions.
    """
    if picture is None:
        raise ValueError("picture must be given, got none")
    if not question.strip():
        raise ValueError("question must have words, got an empty text")
    if not counts:
        raise ValueError("counts must name one count or more, got none")
    for count in counts:
        if count != AUTO:
            token_grid(count, name="counts")
    subject = subject_of(model, processor)
    image: Shown
    if subject.takes_clips and (is_frames(picture) or is_animated(picture)):
        sampling = FrameSampling(processor.max_frames, processor.fps)
        image = load_video(picture, "picture", sampling).frames
    else:
        image = load_image(picture, "picture")  # type: ignore[arg-type]
    prepared = subject.prepare(image, max_tiles)
    started = time.perf_counter()
    encoded = subject.encode(image, prepared)
    _wait_for(model)
    encoder_seconds = time.perf_counter() - started
    options = {
        **special_tokens(model, processor.tokenizer),
        **{"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens},
        **{"return_dict_in_generate": True, "output_logits": True},
    }
    known = {token_grid(count) for count in subject.trained_counts}
    for asked in counts:
        if asked != AUTO:
            check_length(model.config, tokens_of(asked) * encoded.tiles)  # type: ignore[arg-type]
        prompt = encoded.read(question, asked)
        clock = FirstTokenClock()
        inputs = encoded.with_picture(prompt)
        output = model.generate(**inputs, **options, streamer=clock)
        seconds = clock.seconds()
        length = inputs["input_ids"].shape[1]
        ((tokens, certainty),) = answers_with_certainty(output, length, options["eos_token_id"])
        count = inputs["num_image_tokens"][0]
        yield CountAnswer(
            asked=asked,
            count=count,
            tiles=encoded.tiles,
            text=processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            certainty=certainty,
            encoder_seconds=encoder_seconds,
            first_token_seconds=encoder_seconds + clock.first_token_seconds,
            seconds=encoder_seconds + seconds,
            is_trained=token_grid(count) in known if known else None,
            panels=encoded.panels,
            pooling=subject.pooling,
        )


def _wait_for(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
