"""Evaluation by all processes together, in the middle of training, which it must not disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from tokenflex.counts import TokenCount
from tokenflex.data.faults import (
    BrokenSample,
    BrokenSamplesError,
    broken_records,
    check_broken,
    where_of,
)
from tokenflex.data.samples import Sample, SampleDataset
from tokenflex.evaluation import evaluate
from tokenflex.interruption import Interruption
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.training.agreement import AgreedStop, other_process_stopped, share
from tokenflex.training.config import EvaluationConfig
from tokenflex.training.records import progress_bar
from tokenflex.training.states import from_main, model_weights

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

    def where(self, index: int) -> str:
        """Return the data set's name for the sample."""
        return where_of(self.dataset, self.place_of(index))

    def place_of(self, index: int) -> int:
        """Return the data set's index of the sample at ``index``; the last one for a stand-in."""
        return min(index * self.num_ranks + self.rank, self.size - 1)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[self.place_of(index)]
        if index * self.num_ranks + self.rank < self.size:
            return sample
        asked = [replace(one, kind=_STAND_IN) for one in sample.conversations]
        return replace(sample, conversations=tuple(asked))


class Evaluator:
    """Asks a run's model as its configuration says, on all processes.

    Args:
        settings: of the evaluation.
        dataset: what is asked.
        processor: the model's.
        accelerator: knows the processes.
        interruption: a signal to any process stops the evaluation on all.
        shards: whether the processes hold shards of the model.
        workers: data-loader processes.
        max_broken_samples: samples that cannot be asked are left out and named, at most so many.

    Raises:
        BrokenSamplesError: more records of the data set are broken.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        dataset: SampleDataset,
        processor: Any,
        accelerator: Accelerator,
        interruption: Interruption,
        *,
        shards: bool,
        workers: int,
        max_broken_samples: int,
    ) -> None:
        check_broken(broken_records(dataset), max_broken_samples)
        self.settings = settings
        self.dataset = dataset
        self.accelerator = accelerator
        self.interruption = interruption
        self.shards = shards
        self._asked: dict[str, Any] = {
            "processor": processor,
            "counts": settings.counts,
            "batch_size": settings.batch_size,
            "workers": workers,
            "max_broken_samples": max_broken_samples,
        }

    def run(self, model: Any, samples: int) -> dict[str, Any]:
        """Over the first ``samples``; the same report on every process.

        Raises:
            AgreedStop: a signal came, or a process cannot read its data.
        """
        is_main, ranks = self.accelerator.is_main_process, self.accelerator.num_processes
        if self.shards:
            weights = model_weights(model, keep=is_main)
            try:
                report = from_main(lambda: self._alone(model, weights, samples), is_main)
            except Exception as error:  # on every process
                raise AgreedStop(error) from error
            if report is None:
                raise AgreedStop(KeyboardInterrupt())
            return report
        asked = Share(self.dataset, samples, rank=self.accelerator.process_index, num_ranks=ranks)
        with self._bar(asked) as bar:

            def on_batch() -> None:
                bar.update()
                if interrupted_anywhere(self.accelerator, self.interruption):
                    raise AgreedStop(KeyboardInterrupt())

            try:
                return evaluate_together(
                    self.accelerator, model, asked, on_batch=on_batch, **self._asked
                )
            except AgreedStop:
                raise
            except Exception as error:
                # The others hear of it after their batch.
                interrupted, _ = share(self.accelerator, self.interruption.requested, True)
                raise AgreedStop(KeyboardInterrupt() if interrupted else error) from error

    def run_last(self, model: Any, weights: dict[str, Any]) -> dict[str, Any]:
        """Over all of the data, after training; nothing on a process that only holds shards.

        ``weights`` are the whole model's, on the main process.

        Raises:
            AgreedStop: as :meth:`run`.
        """
        if not self.shards:
            return self.run(model, len(self.dataset))
        if not self.accelerator.is_main_process:
            return {}
        report = self._alone(model, weights, len(self.dataset))
        if report is None:
            raise AgreedStop(KeyboardInterrupt())
        return report

    def _alone(self, model: Any, weights: dict[str, Any], samples: int) -> dict[str, Any] | None:
        """By this process, with whole weights: it cannot run the others' shards.

        None where a signal stopped it: the others wait for an answer.
        """
        asked = Share(self.dataset, samples, rank=0, num_ranks=1)
        with self._bar(asked) as bar:

            def on_batch() -> None:
                bar.update()
                self.interruption.check()

            try:
                return evaluate_alone(
                    model.config,
                    weights,
                    self.accelerator.device,
                    asked,
                    on_batch=on_batch,
                    **self._asked,
                )
            except KeyboardInterrupt:
                return None

    def _bar(self, share: Share) -> tqdm:
        batches = -(len(share) // -self.settings.batch_size) * len(self.settings.counts)
        shown = self.accelerator.is_main_process
        return progress_bar("evaluation", batches, unit="batch", leave=False, shown=shown)


def interrupted_anywhere(accelerator: Accelerator, interruption: Interruption) -> bool:
    """Return whether a signal came to any process, so that all stop at the same place.

    Raises:
        AgreedStop: another process has stopped.
    """
    interrupted, failed = share(accelerator, interruption.requested, False)
    if failed and not interrupted:
        raise other_process_stopped()
    return bool(interrupted)


def evaluate_together(
    accelerator: Accelerator,
    model: Any,
    share: Share,
    *,
    processor: Any,
    counts: Sequence[TokenCount],
    batch_size: int,
    workers: int,
    max_broken_samples: int,
    on_batch: Callable[[], object],
) -> dict[str, Any]:
    """:func:`tokenflex.evaluation.evaluate` over the shares of all processes.

    Every process takes part in the same exchanges and gets the same result, or the same error.
    Modes of modules and states of random generators are afterwards as they were.
    """
    alone = accelerator.num_processes == 1
    with _undisturbed(model):
        try:
            own = evaluate(
                model,
                processor,
                share,
                counts,
                batch_size=batch_size,
                workers=workers,
                max_broken_samples=max_broken_samples if alone else None,
                on_batch=on_batch,
            )
        except BrokenSamplesError as error:
            if alone:
                raise
            own = {"broken_samples": [asdict(one) for one in error.broken]}  # all of its share
    if alone:
        return own
    own["broken_samples"] = [
        one | {"index": share.place_of(one["index"])} for one in own.get("broken_samples", [])
    ]
    report = merged(gather_object([own]))
    check_broken(
        [BrokenSample(**one) for one in report.get("broken_samples", [])], max_broken_samples
    )
    return report


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
    max_broken_samples: int,
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
            max_broken_samples=max_broken_samples,
            on_batch=on_batch,
        )


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report from those of several processes, stand-ins left out.

    Raises:
        BrokenSamplesError: no process could ask a sample.
    """
    reasons = {one["index"]: one for report in reports for one in report.get("broken_samples", [])}
    broken = [reasons[index] for index in sorted(reasons)]
    reports = [report for report in reports if "accuracy" in report]
    if not reports:
        raise BrokenSamplesError(f"no sample can be asked: {broken[0]['reason']}")
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
    report = {
        "accuracy": accuracy,
        "accuracy_by_kind": by_kind,
        "questions": asked,
        "image_backend": reports[0].get("image_backend"),
    }
    return report | ({"broken_samples": broken} if broken else {})


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
