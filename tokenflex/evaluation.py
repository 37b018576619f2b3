"""Accuracy at every vision-token count, overall and by kind of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenflex.counts import TokenCount, TokenCounts
from tokenflex.data.order import packed_batches
from tokenflex.data.packing import PackedBatch, PackingCollator
from tokenflex.data.samples import SampleDataset


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    counts: Sequence[TokenCount],
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Share of conversations answered exactly, at each count.

    An answer is right when every one of its tokens is the most likely one after the right tokens
    before it: the same as asking whether greedy generation would give exactly that answer.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`; its mode is left as it was.
        processor: its processor.
        dataset: what to ask.
        counts: vision-token counts to ask at.
        batch_size: samples a forward pass.
        workers: data-loader processes.
        on_batch: called after each forward pass.

    Returns:
        ``accuracy`` (count -> the mean over kinds, so that rare kinds weigh the same),
        ``accuracy_by_kind`` (kind -> count -> accuracy) and ``questions`` (kind -> how many);
        counts are strings, as in JSON.
    """
    was_training = model.training
    model.eval()
    try:
        return _evaluate(model, processor, dataset, counts, batch_size, workers, on_batch)
    finally:
        model.train(was_training)


def _evaluate(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    counts: Sequence[TokenCount],
    batch_size: int,
    workers: int,
    on_batch: Callable[[], object],
) -> dict[str, Any]:
    accuracy: dict[str, float] = {}
    by_kind: dict[str, dict[str, float]] = defaultdict(dict)
    questions: dict[str, int] = {}
    indices = range(len(dataset))
    batches = [
        [(0, index) for index in indices[first : first + batch_size]]
        for first in range(0, len(dataset), batch_size)
    ]
    for count in counts:
        collator = PackingCollator(
            processor, TokenCounts((count,), (1.0,)), share_prefix=model.takes_shared_prefixes
        )
        right: dict[str, int] = defaultdict(int)
        asked: dict[str, int] = defaultdict(int)
        for batch in packed_batches(dataset, collator, batches, workers=workers):
            for kind, is_right in _graded(model, batch.to(model.device)):
                right[kind] += is_right
                asked[kind] += 1
            on_batch()
        for kind in sorted(asked):
            by_kind[kind][str(count)] = right[kind] / asked[kind]
        accuracy[str(count)] = sum(right[kind] / asked[kind] for kind in asked) / len(asked)
        questions = dict(sorted(asked.items()))
    return {"accuracy": accuracy, "accuracy_by_kind": dict(by_kind), "questions": questions}


def _graded(model: Any, batch: PackedBatch) -> list[tuple[str, bool]]:
    """(kind, right or wrong) of every conversation in the batch."""
    logits = model(**batch.model_inputs()).logits[0]
    hits = (logits.argmax(-1) == batch.targets).cpu()
    per_answer = hits.split([length for _, length in batch.answers])
    kinds = [kind for kind, _ in batch.answers]
    return [(kind, bool(answer.all())) for kind, answer in zip(kinds, per_answer, strict=True)]
