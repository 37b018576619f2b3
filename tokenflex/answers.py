"""Questions about some images, answered at several counts: images are encoded once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from tokenflex.counts import AUTO, ImageTokenCounts, TokenCount, token_grids, tokens_of_images
from tokenflex.evaluation.generation import special_tokens
from tokenflex.models.chat import without_placeholders
from tokenflex.models.loading import check_length
from tokenflex.models.prompt_texts import read_prompts
from tokenflex.models.video_inputs import image_limits, in_order
from tokenflex.models.vision import on_device
from tokenflex.prompts import left_padded
from tokenflex.routing.cascade import generate_with_escalation
from tokenflex.routing.ladder import known_counts
from tokenflex.routing.policies import find_policy


@dataclass(frozen=True)
class Answer:
    """An answer and its cost.

    Attributes:
        vision_tokens: of all images together.
        read_vision_tokens: also those of the prompts of a cascade's discarded answers.
        first_token_seconds: time to encode the images, read the prompts and give the first token;
            of a cascade the first token of its last answer.
        seconds: time to the end of the answers to all prompts, encoding included.
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
    prompts: Sequence[str],
    counts: Sequence[ImageTokenCounts | str],
    *,
    videos: Sequence[Any] = (),
    max_new_tokens: int = 64,
    max_tiles: int | None = None,
    penalty: float | None = None,
    budget: int | None = None,
    confidence: float | None = None,
) -> Iterator[Answer]:
    """Yield each prompt's greedy answer at each count, whatever search the model's config names.

    Images are processed and encoded once, and the prompts of a count are one batch. The time of
    encoding is part of every answer's time, so that each time is that of a call at this count
    alone. A first call, of the text alone, is not timed.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`, or a converted stock model,
            in evaluation mode.
        processor: its processor.
        images: PIL images, arrays or tensors.
        prompts: texts with one placeholder per image each, about the same images, and one
            ``<video>`` per video.
        counts: what the processor takes as ``num_image_tokens``, or a policy of
            :mod:`tokenflex.routing.policies`; all prompts are answered at each. With a policy the
            time to the first token includes the choice.
        videos: the frames of each video, each an image with a count. Of a converted model, videos
            as its processor takes them, which are encoded at each count.
        max_new_tokens: the most tokens of an answer.
        max_tiles: as the processor takes it.
        penalty: for "auto", see :func:`tokenflex.routing.choice.choose_counts`.
        budget: for "auto", as ``penalty``. Of videos of a converted model, the vision tokens of
            each: ``counts`` are then those of images.
        confidence: for "auto", in place of the two: the threshold of a cascade, see
            :func:`tokenflex.routing.cascade.generate_with_escalation`.

    Raises:
        FileNotFoundError: counts are to be chosen, and no router is saved with the model.
        ValueError: ``confidence`` is given with another, images need more positions than the
            language model has, or as the two functions say.
    """
    if confidence is not None and (penalty, budget) != (None, None):
        raise ValueError(
            f"confidence must be given alone, got penalty {penalty} and budget {budget} with it"
        )
    tokenizer = processor.tokenizer
    options = special_tokens(model, tokenizer)

    limits: Any = max_tiles
    if videos and not hasattr(processor, "show_frames"):
        yield from _answers_about_videos(
            model, processor, images, prompts, counts, videos, max_new_tokens, max_tiles, budget
        )
        return
    if videos:
        frames = [len(video) for video in videos]
        kinds = read_prompts([prompts], processor.image_token, len(images), frames=frames).kinds
        images, shown = in_order(kinds, images, videos)
        limits = image_limits(shown, max_tiles)
        prompts = [processor.show_frames(prompt, frames) for prompt in prompts]
    data, tiles = {}, []
    if images:
        data, tiles = processor.process_images([list(images)], max_tiles=limits)
    for count in counts if tiles else ():  # before the work, not after it
        most, bound = count, None
        if isinstance(count, str):
            most, bound = _largest_count(model, count, budget, confidence), budget
        grids = token_grids(most, len(tiles), name="num_image_tokens")
        tokens = sum(tokens_of_images(tiles, grids))
        check_length(model.config, tokens if bound is None else min(tokens, bound))
    _warm_up(model, tokenizer, [without_placeholders(p, [processor.image_token]) for p in prompts])
    encoded, encoding_seconds = None, 0.0
    if tiles:
        started = time.perf_counter()
        with torch.no_grad():
            encoded = model.encode_images(**on_device(data, model.device))
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        encoding_seconds = time.perf_counter() - started
    options["max_new_tokens"] = max_new_tokens
    for count in counts:
        read = processor.encode_text(
            [prompts],
            tiles,
            num_image_tokens=AUTO if isinstance(count, str) else count,
            padding_side="left",  # some tokenizers are saved for training
            add_special_tokens=processor.adds_special_tokens(prompts[0]),
        ).to(model.device)
        inputs = {**read, "encoded_images": encoded}
        clock = FirstTokenClock()
        auto = inputs.get("num_image_tokens") == AUTO
        if auto and confidence is not None:
            cascade = generate_with_escalation(
                model, threshold=confidence, **inputs, **options, streamer=clock
            )
            new = cascade.new_tokens
            vision_tokens, read_tokens = cascade.vision_tokens, cascade.prefill_tokens
        else:
            if auto:
                inputs["num_image_tokens"] = count
                inputs = model.choose_counts(**inputs, penalty=penalty, budget=budget)
            output = model.generate(**inputs, **_GREEDY, **options, streamer=clock)
            new = output[:, inputs["input_ids"].shape[1] :]
            vision_tokens = (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist()
            read_tokens = vision_tokens
        seconds = clock.seconds()
        for row, text in enumerate(tokenizer.batch_decode(new, skip_special_tokens=True)):
            yield Answer(
                vision_tokens=vision_tokens[row],
                read_vision_tokens=read_tokens[row],
                first_token_seconds=encoding_seconds + clock.first_token_seconds,
                seconds=encoding_seconds + seconds,
                text=text.strip(),
            )


_GREEDY = {"do_sample": False, "num_beams": 1}  # beams cannot be timed token by token


def _warm_up(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Answer texts alone once, so that what happens in a first call is not timed."""
    options = special_tokens(model, tokenizer)
    lengths = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids, mask = left_padded([torch.tensor(row).long() for row in lengths], options["pad_token_id"])
    if ids.numel():
        warm_up = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        model.generate(**warm_up, **_GREEDY, **options, max_new_tokens=1)


def _answers_about_videos(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    prompts: Sequence[str],
    counts: Sequence[Any],
    videos: Sequence[Any],
    max_new_tokens: int,
    max_tiles: int | None,
    budget: int | None,
) -> Iterator[Answer]:
    """Yield the answers of a converted model, whose processor takes videos with their prompts."""
    if max_tiles is not None:
        raise ValueError(f"max_tiles is for TokenFLEX models, got {max_tiles}")
    tokenizer = processor.tokenizer
    marks = [processor.image_token, processor.video_prompt]
    _warm_up(model, tokenizer, [without_placeholders(prompt, marks) for prompt in prompts])
    for count in counts:
        inputs = processor(
            text=list(prompts),
            images=[list(images)] * len(prompts) if images else None,
            videos=[list(videos)] * len(prompts),
            num_image_tokens=count,
            budget=budget,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=processor.adds_special_tokens(prompts[0]),
        ).to(model.device)
        ids, clock = inputs["input_ids"], FirstTokenClock()
        output = model.generate(
            **inputs,
            **_GREEDY,
            **special_tokens(model, tokenizer),
            max_new_tokens=max_new_tokens,
            streamer=clock,
        )
        seconds = clock.seconds()
        is_placeholder = torch.isin(ids, ids.new_tensor(processor.placeholder_ids))
        vision_tokens = is_placeholder.sum(-1).tolist()
        new = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for number, text in zip(vision_tokens, new, strict=True):
            yield Answer(number, number, clock.first_token_seconds, seconds, text.strip())


def _largest_count(
    model: Any, policy: str, budget: int | None, confidence: float | None
) -> TokenCount:
    """Return the largest count that a policy or a cascade may choose."""
    if confidence is not None:
        return known_counts(model)[-1]
    return find_policy(policy).largest(model, budget)


class FirstTokenClock(BaseStreamer):
    """The time to the first token, from a streamer.

    ``generate`` passes it the prompt, then every token once it is on the host. Of several calls the
    last one's first token counts.
    """

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
