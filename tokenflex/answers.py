"""One question about some images, answered at several counts: the encoder runs once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.generation.streamers import BaseStreamer

from tokenflex.counts import AUTO, ImageTokenCounts


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        vision_tokens: of all images together.
        first_token_seconds: encoding the images, reading the prompt, and the first token.
        seconds: to the end of the answer, encoding included.
        text: the answer.
    """

    vision_tokens: int
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
        penalty: for "auto", see :func:`tokenflex.selection.choice.choose_counts`.
    """
    tokenizer = processor.tokenizer
    ends = model.generation_config.eos_token_id
    options = {
        "do_sample": False,
        "num_beams": 1,  # beams cannot be timed token by token
        "eos_token_id": tokenizer.eos_token_id if ends is None else ends,
        "pad_token_id": tokenizer.pad_token_id,
    }
    warm_up = processor(text=prompt.replace(processor.image_token, ""), add_special_tokens=False)
    if warm_up["input_ids"].numel():
        model.generate(**warm_up.to(model.device), **options, max_new_tokens=1)
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
        if inputs.get("num_image_tokens") == AUTO:
            inputs = model.choose_counts(**inputs, penalty=penalty)
        output = model.generate(
            **inputs,
            **options,
            max_new_tokens=max_new_tokens,
            streamer=clock,
        )
        seconds = clock.seconds()
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield Answer(
            vision_tokens=int((inputs["input_ids"] == processor.image_token_id).sum()),
            first_token_seconds=encoding_seconds + clock.first_token_seconds,
            seconds=encoding_seconds + seconds,
            text=text.strip(),
        )


class _FirstTokenClock(BaseStreamer):
    """``generate`` hands over the prompt first, then every token once it is on the host."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_token_seconds = 0.0
        self._puts = 0

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first_token_seconds = self.seconds()

    def end(self) -> None:
        pass

    def seconds(self) -> float:
        return time.perf_counter() - self.started
