"""Evaluation of every question at every count; images are read and encoded once for all counts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import torch

from tokenflex.counts import token_grid
from tokenflex.data.faults import MAX_BROKEN_SAMPLES, BrokenSample
from tokenflex.data.samples import Conversation, SampleDataset
from tokenflex.evaluation.baselines import Baselines, baseline_counts, baseline_report
from tokenflex.evaluation.counts import AskedCount, label_of, labels_of, selector_of
from tokenflex.evaluation.encoding import QuestionEncoder
from tokenflex.evaluation.grading import grade_forced, grade_generated
from tokenflex.evaluation.questions import (
    PreparedSample,
    Question,
    images_of,
    read_questions,
    text_before_answers,
)
from tokenflex.evaluation.scoring import FORCED, SCORES
from tokenflex.evaluation.statistics import Verdict, accuracy_of, group_by_kind, vision_tokens_of
from tokenflex.models.vision import EncodedImages, on_device


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
    baselines: bool = False,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Compute the share of conversations answered right at each count.

    With ``score="forced"`` an answer is right when each of its tokens is the most likely one after
    the right tokens before it. Greedy generation would then give exactly that answer; the grade
    takes one forward pass. All answers of a conversation must be right.

    With ``"exact"``, ``"choice"`` or ``"contains"`` the last answer of each conversation is
    generated greedily after the earlier turns of the data, and its text is compared by the rule of
    that name in :mod:`tokenflex.evaluation.scoring`.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration` or a converted stock model;
            its mode is restored.
        processor: Its processor.
        dataset: The questions with their answers.
        counts: Counts per tile: perfect squares, (height, width) grids, or objects that choose per
            question (:class:`tokenflex.evaluation.CountSelector`).
        score: One of the four scores above.
        batch_size: Samples of an encoder pass, and the largest number of questions in one call of
            ``generate``.
        workers: Data-loader processes.
        max_tiles: Largest number of tiles of an image; the processor's default if None.
        max_new_tokens: Largest length of a generated answer.
        max_broken_samples: Largest number of samples left out because they cannot be read or
            encoded; None for no bound.
        baselines: Whether to evaluate :mod:`tokenflex.evaluation.baselines` too.
        on_batch: Called after each count of each batch, of baselines too.

    Returns:
        A report that JSON can hold. By count, with the labels of
        :func:`tokenflex.evaluation.counts.label_of`: ``accuracy`` (mean over kinds, so that rare
        kinds have the same weight), ``standard_error`` (robust to questions about one image; None
        for one sample), ``vision_tokens_per_image``, ``vision_tokens_per_question`` (means over
        kinds as well), ``vision_tokens_per_question_unweighted`` (see
        :class:`tokenflex.evaluation.statistics.VisionTokens`) and ``evaluation_seconds`` (as if
        the count were evaluated alone, encoding included). By kind and count:
        ``accuracy_by_kind`` and ``standard_error_by_kind``. Besides, ``score``, ``questions``
        (number by kind), ``samples``, ``encoding_seconds``, ``image_backend`` ("pil" or
        "torchvision", which resized the images) and, if samples were left out, ``broken_samples``
        (index and reason of each); with baselines ``baselines``, see
        :func:`tokenflex.evaluation.baselines.baseline_report`.

    Raises:
        TypeError: A count is neither a count nor a selector.
        BrokenSamplesError: More samples than allowed are broken, or all of them; the message names
            one.
        ValueError: Counts are missing or repeated, the score is unknown, the data set is empty,
            an answer does not suit the score, or there is no count for baselines.
    """
    labels = labels_of(counts)
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    chooses = any(selector_of(count) is not None for count in counts)
    fewer = None
    if baselines:
        fewer = Baselines(model, processor.image_processor, *baseline_counts(counts))

    def to_question(
        encode: QuestionEncoder, sample: PreparedSample, conversation: Conversation
    ) -> Question:
        if score != FORCED:
            ids = sample.prompt_ids(encode, conversation)
            return Question(sample, conversation, prompt_ids=ids)
        encoded = sample.encoded(encode, conversation)
        image_token_id = model.config.image_token_id
        text = text_before_answers(encoded, image_token_id) if chooses else None
        return Question(sample, conversation, prompt_ids=text, encoded=encoded)

    def verdicts_of(encoded: EncodedImages, questions: Sequence[Question]) -> list[Verdict]:
        images = images_of(encoded, questions)
        if score == FORCED:
            right = grade_forced(model, processor, questions, images).right.tolist()
        else:
            right = grade_generated(
                model,
                processor,
                questions,
                images,
                score,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
            )
        return [
            Verdict(
                sample=asked.sample.index,
                kind=asked.conversation.kind,
                right=is_right,
                images=len(asked.sample.tiles),
                vision_tokens=sum(asked.tokens_per_image),
            )
            for asked, is_right in zip(questions, right, strict=True)
        ]

    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    of_baselines: dict[str, dict[str, list[Verdict]]] = {}
    seconds = dict.fromkeys(labels, 0.0)
    encoding_seconds = 0.0
    broken: list[BrokenSample] = []
    batches = read_questions(
        model,
        processor,
        dataset,
        to_question,
        broken,
        batch_size=batch_size,
        workers=workers,
        max_tiles=max_tiles,
        max_broken_samples=max_broken_samples,
    )
    with closing(batches):
        for batch in batches:
            if not batch.questions:
                for _ in range(len(counts) + len(fewer or ())):
                    on_batch()
                continue
            started = time.perf_counter()
            image_inputs = on_device(batch.image_inputs, model.device)
            encoded = model.encode_images(**image_inputs)
            encoding_seconds += _seconds_since(started, model.device)
            for label, count in zip(labels, counts, strict=True):
                started = time.perf_counter()
                questions = _at_count(model, encoded, batch.questions, count)
                verdicts[label] += verdicts_of(encoded, questions)
                seconds[label] += _seconds_since(started, model.device)
                on_batch()
            if fewer is None:
                continue
            tiles = [
                (sample.index, tile)
                for sample in batch.samples
                for tile in range(len(sample.tile_range))
            ]
            for method, count, shown in fewer.runs(image_inputs, encoded, tiles):
                if shown is not None:
                    questions = _at_count(model, shown.encoded, batch.questions, shown.grid)
                    of_labels = of_baselines.setdefault(method, {})
                    with shown.context:
                        graded = verdicts_of(shown.encoded, questions)
                    of_labels.setdefault(label_of(count), []).extend(graded)
                on_batch()
    report = _report(score, verdicts, seconds, encoding_seconds)
    if fewer is not None:
        full = label_of(fewer.full)
        report["baselines"] = baseline_report(full, verdicts, of_baselines, fewer.left_out)
    # The filters of PIL and torchvision differ by a grey level in places, so answers may differ.
    report["image_backend"] = getattr(processor.image_processor, "backend", None)
    return report | ({"broken_samples": [asdict(sample) for sample in broken]} if broken else {})


def _at_count(
    model: Any, encoded: EncodedImages, asked: Sequence[Sequence[Question]], count: AskedCount
) -> list[Question]:
    """Return every question with the grid of each of its images."""
    selector = selector_of(count)
    questions = []
    for of_sample in asked:
        sample = of_sample[0].sample
        if selector is None:
            grids = [(token_grid(count, name="counts"),) * len(sample.tiles)] * len(of_sample)
        else:
            images = encoded.select(sample.tile_range)
            prompts = [asked.prompt_ids for asked in of_sample if asked.prompt_ids is not None]
            grids = [
                tuple(token_grid(chosen, name=selector.label) for chosen in counts)
                for counts in selector.select(model, images, sample.tiles, prompts)
            ]
        questions += [
            replace(question, grids=of_images)
            for question, of_images in zip(of_sample, grids, strict=True)
        ]
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
    accuracy = {label: accuracy_of(rows) for label, rows in verdicts.items()}
    tokens = {label: vision_tokens_of(rows) for label, rows in verdicts.items()}
    groups = {label: group_by_kind(rows) for label, rows in verdicts.items()}
    first = next(iter(groups.values()))  # every count answers the same questions
    by_kind = {
        kind: {label: accuracy_of(of_label[kind]) for label, of_label in groups.items()}
        for kind in first
    }
    return {
        "score": score,
        "accuracy": _each("value", accuracy),
        "standard_error": _each("standard_error", accuracy),
        "accuracy_by_kind": {kind: _each("value", row) for kind, row in by_kind.items()},
        "standard_error_by_kind": {
            kind: _each("standard_error", row) for kind, row in by_kind.items()
        },
        "questions": {kind: len(rows) for kind, rows in first.items()},
        "samples": len({row.sample for rows in first.values() for row in rows}),
        "vision_tokens_per_image": _each("per_image", tokens),
        "vision_tokens_per_question": _each("per_question", tokens),
        "vision_tokens_per_question_unweighted": _each("per_question_unweighted", tokens),
        "evaluation_seconds": {label: encoding_seconds + seconds[label] for label in verdicts},
        "encoding_seconds": encoding_seconds,
    }


def _each(attribute: str, row: dict[str, Any]) -> dict[str, Any]:
    return {label: getattr(value, attribute) for label, value in row.items()}
