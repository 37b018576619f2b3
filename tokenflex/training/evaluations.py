"""Evaluate a model that is being trained, on all processes together and without a trace."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from tokenflex.counts import TokenCounts
from tokenflex.data.faults import (
    BrokenSample,
    BrokenSamplesError,
    broken_records,
    check_broken,
    where_of,
)
from tokenflex.data.samples import Sample, SampleDataset
from tokenflex.data.steps import PackedStep, StepPacker
from tokenflex.evaluation import evaluate
from tokenflex.evaluation.counts import label_of
from tokenflex.interruption import Interruption
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.terminal import progress_bar
from tokenflex.training.agreement import AgreedStop, from_main, interrupted_anywhere, share
from tokenflex.training.config import EvaluationConfig, StageConfig
from tokenflex.training.model_kind import ModelKind
from tokenflex.training.sharding import is_sharded, model_weights

_STAND_IN = "stand-in"  # kind of the questions of a sample that belongs to another process


class Share:
    """One process's share of the first ``size`` samples of a data set, as large as every other.

    A process that is short of a sample gets a stand-in, whose questions do not count.
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
        return where_of(self.dataset, self.position_of(index))

    def position_of(self, index: int) -> int:
        """Return the data set's index of the sample at ``index``; the last one for a stand-in."""
        return min(index * self.num_ranks + self.rank, self.size - 1)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[self.position_of(index)]
        if index * self.num_ranks + self.rank < self.size:
            return sample
        questions = [replace(question, kind=_STAND_IN) for question in sample.conversations]
        return replace(sample, conversations=tuple(questions))


class Evaluator:
    """Evaluates the model of a run as its configuration says, on all processes.

    A signal to any of them stops the evaluation on all. At most ``max_broken_samples`` samples that
    cannot be read are left out.

    Raises:
        BrokenSamplesError: More records of the data set are broken.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        dataset: SampleDataset,
        kind: ModelKind,
        accelerator: Accelerator,
        interruption: Interruption,
        *,
        workers: int,
        max_broken_samples: int,
    ) -> None:
        check_broken(broken_records(dataset), max_broken_samples)
        self.settings = settings
        self.dataset = dataset
        self.kind = kind
        self.processor = kind.processor
        self.accelerator = accelerator
        self.interruption = interruption
        self.workers = workers
        self.max_broken_samples = max_broken_samples

    def is_due(self, step: int, is_last: bool) -> bool:
        """Return whether to evaluate after a step of a stage, the last one or not."""
        every = self.settings.every
        return (is_last and self.settings.at_stage_end) or (every is not None and step % every == 0)

    def run(self, model: Any, samples: int) -> dict[str, Any]:
        """Evaluate on the first ``samples``; every process returns the report of :func:`evaluate`.

        Raises:
            AgreedStop: A signal came, or a process cannot read its data.
        """
        if is_sharded(model):
            weights, is_main = model_weights(model), self.accelerator.is_main_process
            try:
                report = from_main(lambda: self._alone(model, weights, samples), is_main)
            except Exception as error:  # on every process
                raise AgreedStop(error) from error
            if report is None:
                raise AgreedStop(KeyboardInterrupt())
            return report
        with self._told_together():
            return self._together(model, samples)

    def loss(self, model: Any, stage: StageConfig, report: dict[str, Any]) -> dict[str, float]:
        """Return the mean cross entropy of an answer token in nats, by count, on every process.

        Samples are those of an evaluation during training, without the broken ones of its
        ``report``. They are encoded and packed as in ``stage``, as many at a time.

        Raises:
            AgreedStop: A signal came, or a process cannot read its data.
        """
        with self._told_together():
            return self._loss(
                model, stage, {sample["index"] for sample in report.get("broken_samples", [])}
            )

    @contextmanager
    def _told_together(self) -> Iterator[None]:
        """Tell the other processes of an error, at what is their next check.

        Raises:
            AgreedStop: There was one.
        """
        try:
            yield
        except AgreedStop:
            raise
        except Exception as error:
            # The other processes are told of it after their batch.
            interrupted, _ = share(self.accelerator, self.interruption.requested, True)
            raise AgreedStop(KeyboardInterrupt() if interrupted else error) from error

    def run_last(self, model: Any, weights: dict[str, Any]) -> dict[str, Any]:
        """Evaluate on all of the data after training, where the main process has whole ``weights``.

        A process that has nothing but shards returns an empty report.

        Raises:
            AgreedStop: A signal came, or a process cannot read its data.
        """
        if not is_sharded(model):
            return self.run(model, len(self.dataset))
        if not self.accelerator.is_main_process:
            return {}
        report = self._alone(model, weights, len(self.dataset))
        if report is None:
            raise AgreedStop(KeyboardInterrupt())
        return report

    def _alone(self, model: Any, weights: dict[str, Any], samples: int) -> dict[str, Any] | None:
        """Evaluate a second, whole model on this process; None if a signal came.

        This process cannot run the shards of the others, which wait for its result.
        """
        data = Share(self.dataset, samples, rank=0, num_ranks=1)
        with torch.random.fork_rng(devices=_cuda_devices(self.accelerator.device)):
            whole = TokenFlexForConditionalGeneration(model.config)
            whole.load_state_dict(weights)
            whole.to(self.accelerator.device).eval()
            try:
                return self._evaluate(whole, data, self.max_broken_samples, self.interruption.check)
            except KeyboardInterrupt:
                return None

    def _together(self, model: Any, samples: int) -> dict[str, Any]:
        """Evaluate on a share of the samples and merge the reports of all processes.

        Every process takes part in the same exchanges and gets the same result, or the same error.
        """
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        data, check = Share(self.dataset, samples, rank=rank, num_ranks=num_ranks), self._check
        with _undisturbed(model):
            if num_ranks == 1:
                return self._evaluate(model, data, self.max_broken_samples, check)
            try:
                report = self._evaluate(model, data, None, check)
            except BrokenSamplesError as error:  # all samples of the share are broken
                report = {"broken_samples": [asdict(sample) for sample in error.broken]}
        report["broken_samples"] = [
            sample | {"index": data.position_of(sample["index"])}
            for sample in report.get("broken_samples", [])
        ]
        report = merged(gather_object([report]))
        broken = [BrokenSample(**sample) for sample in report.get("broken_samples", [])]
        check_broken(broken, self.max_broken_samples)
        return report

    def _check(self) -> None:
        if interrupted_anywhere(self.accelerator, self.interruption):
            raise AgreedStop(KeyboardInterrupt())

    def _loss(self, model: Any, stage: StageConfig, broken: Collection[int]) -> dict[str, float]:
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        size, at_a_time = min(self.settings.samples, len(self.dataset)), stage.samples_read
        indices = [index for index in range(rank, size, num_ranks) if index not in broken]
        counts = self.settings.counts
        totals = torch.zeros(len(counts), 2, dtype=torch.float64)
        with _undisturbed(model), torch.no_grad():
            model.eval()
            for total, count in zip(totals, counts, strict=True):
                packer = StepPacker(
                    self.dataset,
                    self.kind.collator(TokenCounts((count,), (1.0,)), max_length=stage.max_length),
                    max_tokens=stage.max_tokens,
                    max_tiles=stage.max_tiles,
                )
                # As many checks on every process, and one that tells of an error in the last batch.
                for batch in range(-(-size // (at_a_time * num_ranks)) + 1):
                    self._check()
                    members = indices[batch * at_a_time : (batch + 1) * at_a_time]
                    if members:
                        total += self._loss_of(packer([(0, index) for index in members]))
        sums = self.accelerator.reduce(totals.to(self.accelerator.device), "sum").tolist()
        return {
            label_of(count): loss / targets
            for count, (loss, targets) in zip(counts, sums, strict=True)
        }

    def _loss_of(self, packed: PackedStep) -> torch.Tensor:
        """Return the sum of the losses of a step's targets, and their number."""
        total, device = torch.zeros(2, dtype=torch.float64), self.accelerator.device
        for batch in packed.bins:
            batch = batch.to(device)
            weights = torch.ones(len(batch.targets), device=device)
            with self.accelerator.autocast():
                outputs = self.kind.step_module(
                    **batch.model_inputs(), targets=batch.targets, target_weights=weights
                )
            total += torch.tensor([float(outputs.loss), float(len(batch.targets))])
        return total

    def _evaluate(
        self, model: Any, data: Share, max_broken: int | None, check: Callable[[], object]
    ) -> dict[str, Any]:
        batches = -(len(data) // -self.settings.batch_size) * len(self.settings.counts)
        shown = self.accelerator.is_main_process
        bar: Any
        with progress_bar("evaluation", batches, unit="batch", leave=False, shown=shown) as bar:

            def on_batch() -> None:
                bar.update()
                check()

            return evaluate(
                model,
                self.processor,
                data,
                self.settings.counts,
                batch_size=self.settings.batch_size,
                workers=self.workers,
                max_broken_samples=max_broken,
                on_batch=on_batch,
            )


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the reports of several processes; leave out stand-ins.

    Raises:
        BrokenSamplesError: No process could read a sample.
    """
    reasons = {
        sample["index"]: sample for report in reports for sample in report.get("broken_samples", [])
    }
    broken = [reasons[index] for index in sorted(reasons)]
    reports = [report for report in reports if "accuracy" in report]
    if not reports:
        raise BrokenSamplesError(f"no sample can be asked: {broken[0]['reason']}")
    kinds = sorted({kind for report in reports for kind in report["questions"]} - {_STAND_IN})
    questions = {
        kind: sum(report["questions"].get(kind, 0) for report in reports) for kind in kinds
    }
    by_kind: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    accuracy = {}
    for count in reports[0]["accuracy"]:
        for kind in kinds:
            right = sum(
                report["accuracy_by_kind"][kind][count] * report["questions"][kind]
                for report in reports
                if kind in report["questions"]
            )
            by_kind[kind][count] = right / questions[kind]
        accuracy[count] = sum(by_kind[kind][count] for kind in kinds) / len(kinds)
    report = {
        "accuracy": accuracy,
        "accuracy_by_kind": by_kind,
        "questions": questions,
        "image_backend": reports[0].get("image_backend"),
    }
    return report | ({"broken_samples": broken} if broken else {})


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Restore the modes of modules, some of which learn, and the states of random generators."""
    modes = [(module, module.training) for module in model.modules()]
    # Data loaders draw from the generator that dropout draws from.
    with torch.random.fork_rng(devices=_cuda_devices(model.device)):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _cuda_devices(device: torch.device) -> list[int]:
    return [torch.cuda.current_device()] if device.type == "cuda" else []
