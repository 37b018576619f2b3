"""Ask every question at every count: images are read and encoded once for all of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from tokenflex.counts import token_grid
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.faults import (
    MAX_BROKEN_SAMPLES,
    BrokenSample,
    BrokenSamplesError,
    broken_records,
    check_broken,
    leaving_out,
)
from tokenflex.data.order import load_in_order
from tokenflex.data.samples import Conversation, SampleDataset
from tokenflex.evaluation.counts import AskedCount, labels_of, selector_of
from tokenflex.evaluation.grading import grade_forced, grade_generated
from tokenflex.evaluation.questions import (
    PreparedBatch,
    PreparedSample,
    Question,
    ReadBatch,
    project,
    text_before_answers,
)
from tokenflex.evaluation.scoring import FORCED, SCORES
from tokenflex.evaluation.statistics import Verdict, accuracy_of, group_by_kind, vision_tokens_of
from tokenflex.models.vision import EncodedImages


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    counts: Sequence[AskedCount],
    *,
    score: str = FORCED,
    batch_size: int = 64,
    workers: int = 0,
    max_tiles: int | None = None,
    max_new_tokens: int = 64,
    max_broken_samples: int | None = MAX_BROKEN_SAMPLES,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Share of conversations answered right, at each count.

    With ``score="forced"`` an answer is right when every one of its tokens is the most likely one
    after the right tokens before it: the same as asking whether greedy generation would give
    exactly that answer, in one forward pass. Of a conversation all answers must be right.

    With ``"exact"``, ``"choice"`` or ``"contains"`` the last answer of each conversation is
    generated greedily, after the turns before it as they stand in the data, and its text is
    compared by the rule of that name in :mod:`tokenflex.evaluation.scoring`.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`; its mode is left as it was.
        processor: its processor.
        dataset: what to ask.
        counts: what to ask at, per tile: perfect squares, (height, width) grids, or objects that
            choose per question (:class:`tokenflex.evaluation.CountSelector`).
        score: one of the above.
        batch_size: samples an encoder pass; also questions at most in one call of ``generate``.
        workers: data-loader processes.
        max_tiles: images are cut into at most so many tiles; the processor's own if None.
        max_new_tokens: of a generated answer.
        max_broken_samples: samples that cannot be read or encoded are left out, at most so many;
            None for no bound.
        on_batch: called after each count of each batch.

    Returns:
        ``score``; by count, named as :func:`tokenflex.evaluation.counts.label_of` does:
        ``accuracy`` (the mean over kinds, so that rare kinds weigh the same), ``standard_error``
        (robust to questions about one image; None for one sample), ``vision_tokens_per_image`` and
        ``_per_question`` (means over kinds as well) and ``_per_question_unweighted`` (see
        :class:`tokenflex.evaluation.statistics.VisionTokens`), ``evaluation_seconds`` (encoding
        included, as if each count were asked alone); ``accuracy_by_kind`` and
        ``standard_error_by_kind`` (kind -> count), ``questions`` (kind -> how many), ``samples``,
        ``encoding_seconds`` and ``image_backend`` (what resized the images, "pil" or
        "torchvision"); where samples were left out, ``broken_samples`` (index and reason of each).
        All is as in JSON.

    Raises:
        TypeError: a count is neither a count nor a selector.
        BrokenSamplesError: more samples than allowed are broken, or all of them; the message names
            one.
        ValueError: no or equal counts, an unknown score, an empty data set, or an answer that does
            not suit the score.
    """
    labels = labels_of(counts)
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if not len(dataset):
        raise ValueError("dataset must hold at least one sample, got none")
    check_broken(broken_records(dataset), max_broken_samples)
    was_training = model.training
    model.eval()
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    seconds = dict.fromkeys(labels, 0.0)
    encoding_seconds = 0.0
    broken: list[BrokenSample] = []
    encode = ConversationEncoder(processor.tokenizer, processor.image_prompt, processor.image_token)
    read = ReadBatch(dataset, processor, max_tiles)
    batches = load_in_order(read, _batches(len(dataset), batch_size), workers=workers)
    try:
        for batch in batches:
            asked = _asked(dataset, batch, encode, processor.image_token_id, counts, score)
            broken += batch.broken
            check_broken(broken, max_broken_samples)
            if not asked:
                for _ in counts:
                    on_batch()
                continue
            started = time.perf_counter()
            pixels = batch.pixel_values.to(model.device, non_blocking=True)
            encoded = model.encode_images(pixels, batch.grids)
            encoding_seconds += _seconds_since(started, model.device)
            for label, count in zip(labels, counts, strict=True):
                started = time.perf_counter()
                questions = _at_count(model, encoded, asked, count)
                vision = project(model, encoded, questions)
                if score == FORCED:
                    right = grade_forced(model, processor, questions, vision).right.tolist()
                else:
                    right = grade_generated(
                        model,
                        processor,
                        questions,
                        vision,
                        score,
                        batch_size=batch_size,
                        max_new_tokens=max_new_tokens,
                    )
                verdicts[label] += [
                    Verdict(
                        sample=one.sample.index,
                        kind=one.conversation.kind,
                        right=is_right,
                        images=len(one.sample.tiles),
                        vision_tokens=sum(one.tokens_per_image),
                    )
                    for one, is_right in zip(questions, right, strict=True)
                ]
                seconds[label] += _seconds_since(started, model.device)
                on_batch()
    finally:
        batches.close()
        model.train(was_training)
    if not verdicts:
        raise BrokenSamplesError(
            f"none of the {len(dataset)} samples can be asked: {broken[0].reason}", broken
        )
    report = _report(score, verdicts, seconds, encoding_seconds)
    # PIL's and torchvision's filters differ by a grey level in places, and so may answers.
    report["image_backend"] = getattr(processor.image_processor, "backend", None)
    return report | ({"broken_samples": [asdict(sample) for sample in broken]} if broken else {})


def _batches(samples: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """(epoch, index) keys of each batch."""
    return [
        [(0, index) for index in range(first, min(first + batch_size, samples))]
        for first in range(0, samples, batch_size)
    ]


def _asked(
    dataset: SampleDataset,
    batch: PreparedBatch,
    encode: ConversationEncoder,
    image_token_id: int,
    counts: Sequence[AskedCount],
    score: str,
) -> list[list[Question]]:
    """Every conversation of each sample, with what it takes to ask it, but no counts yet.

    Samples that cannot be encoded join those of the batch that are left out.
    """
    chosen = any(selector_of(count) is not None for count in counts)

    def question(sample: PreparedSample, conversation: Conversation) -> Question:
        if score != FORCED:
            prompt = sample.prompt_ids(encode, conversation)
            return Question(sample, conversation, prompt_ids=prompt)
        encoded = sample.encoded(encode, conversation)
        shown = text_before_answers(encoded, image_token_id) if chosen else None
        return Question(sample, conversation, prompt_ids=shown, encoded=encoded)

    asked = []
    for sample in batch.samples:
        with leaving_out(dataset, sample.index, batch.broken):
            asked.append([question(sample, conversation) for conversation in sample.conversations])
    return asked


def _at_count(
    model: Any, encoded: EncodedImages, asked: Sequence[Sequence[Question]], count: AskedCount
) -> list[Question]:
    """Every question with the grid of each of its images."""
    selector = selector_of(count)
    questions = []
    for of_sample in asked:
        sample = of_sample[0].sample
        if selector is None:
            grids = [(token_grid(count, name="counts"),) * len(sample.tiles)] * len(of_sample)
        else:
            images = encoded.select(sample.tile_range)
            prompts = [one.prompt_ids for one in of_sample if one.prompt_ids is not None]
            grids = [
                tuple(token_grid(one, name=selector.label) for one in counts)
                for counts in selector.select(model, images, sample.tiles, prompts)
            ]
        questions += [replace(one, grids=own) for one, own in zip(of_sample, grids, strict=True)]
    return questions


def _seconds_since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _report(
    score: str,
    verdicts: dict[str, list[Verdict]],
    seconds: dict[str, float],
    encoding_seconds: float,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "score": score,
        "accuracy": {},
        "standard_error": {},
        "accuracy_by_kind": defaultdict(dict),
        "standard_error_by_kind": defaultdict(dict),
        "questions": {},
        "samples": 0,
        "vision_tokens_per_image": {},
        "vision_tokens_per_question": {},
        "vision_tokens_per_question_unweighted": {},
        "evaluation_seconds": {},
        "encoding_seconds": encoding_seconds,
    }
    for label, rows in verdicts.items():
        overall = accuracy_of(rows)
        report["accuracy"][label] = overall.value
        report["standard_error"][label] = overall.standard_error
        groups = group_by_kind(rows)
        for kind, of_kind in groups.items():
            one = accuracy_of(of_kind)
            report["accuracy_by_kind"][kind][label] = one.value
            report["standard_error_by_kind"][kind][label] = one.standard_error
        report["questions"] = {kind: len(of_kind) for kind, of_kind in groups.items()}
        report["samples"] = len({row.sample for row in rows})
        tokens = vision_tokens_of(rows)
        report["vision_tokens_per_image"][label] = tokens.per_image
        report["vision_tokens_per_question"][label] = tokens.per_question
        report["vision_tokens_per_question_unweighted"][label] = tokens.per_question_unweighted
        report["evaluation_seconds"][label] = encoding_seconds + seconds[label]
    return {key: dict(value) if isinstance(value, dict) else value for key, value in report.items()}
