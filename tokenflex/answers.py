"""One question about some images, answered at several counts: the encoder runs once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.generation.streamers import BaseStreamer

from tokenflex.counts import AUTO, ImageTokenCounts
from tokenflex.models.chat import without_placeholders
from tokenflex.routing.cascade import generate_with_escalation


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        vision_tokens: of all images together.
        read_vision_tokens: with those of the prompts of a cascade's answers that were given up.
        first_token_seconds: encoding the images, reading the prompt, and the first token; of a
            cascade the first of the answer that counts, after all others.
        seconds: to the end of the answer, encoding included.
        text: the answer.
    """

    vision_tokens: int
    read_vision_tokens: int
    first_token_seconds: float
    seconds: float
    text: str


def answer_at_counts(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    prompt: str,
    counts: Sequence[ImageTokenCounts | Literal["auto"]],
    *,
    max_new_tokens: int = 64,
    max_tiles: int | None = None,
    penalty: float | None = None,
    budget: int | None = None,
    confidence: float | None = None,
) -> Iterator[Answer]:
    """The greedy answer at each count, whatever search the model's generation config names.

    Images are encoded once; the time that took is part of every answer's, which so are the times of
    a call at that count alone. A first call, of the text alone, is not timed.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration` in evaluation mode.
        processor: its processor.
        images: PIL images, arrays or tensors.
        prompt: text with one placeholder per image.
        counts: what the processor takes as ``num_image_tokens``, once per answer. For "auto" the
            choice is part of the time to the first token.
        max_new_tokens: of an answer.
        max_tiles: as the processor takes it.
        penalty: for "auto", see :func:`tokenflex.routing.choice.choose_counts`.
        budget: likewise.
        confidence: for "auto", in place of the two: the threshold of a cascade, see
            :func:`tokenflex.routing.cascade.generate_with_escalation`.

    Raises:
        ValueError: ``confidence`` is given with another, or as the two functions say.
    """
    if confidence is not None and (penalty, budget) != (None, None):
        raise ValueError(
            f"confidence must be given alone, got penalty {penalty} and budget {budget} with it"
        )
    tokenizer = processor.tokenizer
    ends = model.generation_config.eos_token_id
    options = {
        "eos_token_id": tokenizer.eos_token_id if ends is None else ends,
        "pad_token_id": tokenizer.pad_token_id,
    }
    greedy = {"do_sample": False, "num_beams": 1}  # beams cannot be timed token by token
    question = without_placeholders(prompt, [processor.image_token])
    warm_up = processor(text=question, add_special_tokens=False)
    if warm_up["input_ids"].numel():
        model.generate(**warm_up.to(model.device), **greedy, **options, max_new_tokens=1)
    encoded, encoding_seconds = None, 0.0
    if images:
        data, _ = processor.process_images(images, max_tiles=max_tiles)
        started = time.perf_counter()
        with torch.no_grad():
            encoded = model.encode_images(data["pixel_values"].to(model.device), data.get("grids"))
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        encoding_seconds = time.perf_counter() - started
    for count in counts:
        # As in training: the chat template writes whatever special tokens there are.
        inputs = processor(
            images=list(images) or None,
            text=prompt,
            num_image_tokens=count,
            max_tiles=max_tiles,
            add_special_tokens=False,
        )
        for name in ("pixel_values", "grids"):
            inputs.pop(name, None)
        inputs = {**inputs.to(model.device), "encoded_images": encoded}
        clock = _FirstTokenClock()
        asked = {**options, "max_new_tokens": max_new_tokens, "streamer": clock}
        auto = inputs.get("num_image_tokens") == AUTO
        if auto and confidence is not None:
            tried = generate_with_escalation(model, threshold=confidence, **inputs, **asked)
            new = tried.new_tokens[0]
            (vision_tokens,), (read,) = tried.vision_tokens, tried.prefill_tokens
        else:
            if auto:
                inputs = model.choose_counts(**inputs, penalty=penalty, budget=budget)
            new = model.generate(**inputs, **greedy, **asked)[0, inputs["input_ids"].shape[1] :]
            vision_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
            read = vision_tokens
        seconds = clock.seconds()
        yield Answer(
            vision_tokens=vision_tokens,
            read_vision_tokens=read,
            first_token_seconds=encoding_seconds + clock.first_token_seconds,
            seconds=encoding_seconds + seconds,
            text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        )


class _FirstTokenClock(BaseStreamer):
    """``generate`` hands over the prompt first, then every token once it is on the host. Of
    several calls, one after the other, the last one's first token counts."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_token_seconds = 0.0
        self._puts = 0

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first_token_seconds = self.seconds()

    def end(self) -> None:
        self._puts = 0

    def seconds(self) -> float:
        return time.perf_counter() - self.started
