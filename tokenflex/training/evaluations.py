"""Evaluation by all processes together, in the middle of training, which it must not disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from tokenflex.counts import TokenCount
from tokenflex.data.samples import Sample, SampleDataset
from tokenflex.evaluation import evaluate
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.modeling import TokenFlexForConditionalGeneration

# The kind of a question that a process asks only because the others have one more.
_STAND_IN = "stand-in"


class Share:
    """One process's samples of the first ``size`` of a data set: as many as every other has.

    Where the last ones are short of a sample they get a stand-in, whose questions do not count.
    """

    def __init__(self, dataset: SampleDataset, size: int, *, rank: int, num_ranks: int) -> None:
        self.dataset = dataset
        self.size = min(size, len(dataset))
        self.rank = rank
        self.num_ranks = num_ranks

    def __len__(self) -> int:
        return -(self.size // -self.num_ranks)

    def __getitem__(self, index: int) -> Sample:
        place = index * self.num_ranks + self.rank
        if place < self.size:
            return self.dataset[place]
        sample = self.dataset[self.size - 1]
        asked = [replace(one, kind=_STAND_IN) for one in sample.conversations]
        return replace(sample, conversations=tuple(asked))


def evaluate_together(
    accelerator: Accelerator,
    model: Any,
    share: Share,
    *,
    processor: Any,
    counts: Sequence[TokenCount],
    batch_size: int,
    workers: int,
    on_batch: Callable[[], object],
) -> dict[str, Any]:
    """:func:`tokenflex.evaluation.evaluate` over the shares of all processes.

    Every process runs the same number of forward passes and gets the same result. Modes of modules
    and states of random generators are afterwards as they were.
    """
    with _undisturbed(model):
        own = evaluate(
            model,
            processor,
            share,
            counts,
            batch_size=batch_size,
            workers=workers,
            on_batch=on_batch,
        )
    return own if accelerator.num_processes == 1 else merged(gather_object([own]))


def evaluate_alone(
    config: TokenFlexConfig,
    weights: dict[str, Any],
    device: torch.device,
    share: Share,
    *,
    processor: Any,
    counts: Sequence[TokenCount],
    batch_size: int,
    workers: int,
    on_batch: Callable[[], object],
) -> dict[str, Any]:
    """:func:`tokenflex.evaluation.evaluate` of a model of ``weights``, by this process alone.

    It holds a second, whole model meanwhile. Random generators are afterwards as they were.
    """
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model = TokenFlexForConditionalGeneration(config)
        model.load_state_dict(weights)
        return evaluate(
            model.to(device).eval(),
            processor,
            share,
            counts,
            batch_size=batch_size,
            workers=workers,
            on_batch=on_batch,
        )


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report from those of several processes, stand-ins left out."""
    kinds = sorted({kind for one in reports for kind in one["questions"]} - {_STAND_IN})
    asked = {kind: sum(one["questions"].get(kind, 0) for one in reports) for kind in kinds}
    by_kind: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    accuracy = {}
    for count in reports[0]["accuracy"]:
        for kind in kinds:
            right = sum(
                one["accuracy_by_kind"][kind][count] * one["questions"][kind]
                for one in reports
                if kind in one["questions"]
            )
            by_kind[kind][count] = right / asked[kind]
        accuracy[count] = sum(by_kind[kind][count] for kind in kinds) / len(kinds)
    return {"accuracy": accuracy, "accuracy_by_kind": by_kind, "questions": asked}


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Modules in the modes they had: in a stage some learn and others are frozen."""
    modes = [(module, module.training) for module in model.modules()]
    # Data loaders draw from the generator that dropout draws from.
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
