"""Faults that stop a run: a loss that is no number, and too many samples that cannot be read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from tokenflex.data.faults import BrokenSample, BrokenSamplesError, broken_records
from tokenflex.data.samples import SampleDataset
from tokenflex.data.steps import PackedStep
from tokenflex.errors import ReportedError
from tokenflex.files import write_json
from tokenflex.training.engine import StepOutcome


class NonFiniteLossError(ReportedError):
    """The loss is NaN or infinite; the message names the step and the file of its samples."""


def check_finite(
    accelerator: Accelerator,
    outcome: StepOutcome,
    packed: PackedStep,
    stage: str,
    step: int,
    path: Path,
) -> None:
    """Stop at the step that broke the model: later ones would blame other samples.

    The file at ``path`` names the samples of all processes, which have the same outcome.

    Raises:
        NonFiniteLossError: The loss or the norm of the gradients is NaN or infinite.
    """
    loss, norm = outcome.loss, outcome.norm
    # In float16 the loss scaler skips steps whose gradients overflowed, and training goes on.
    norm_counts = accelerator.mixed_precision != "fp16"
    if math.isfinite(loss) and (math.isfinite(norm) or not norm_counts):
        return
    sample_ids = gather_object([name for batch in packed.bins for name in batch.sample_ids])
    if accelerator.is_main_process:
        report = {
            "stage": stage,
            "step": step,
            "loss": str(loss),  # JSON has no NaN
            "gradient_norm": str(norm),
            "sample_ids": sample_ids,
        }
        write_json(path, report)
    raise NonFiniteLossError(
        f"loss and gradient norm must be finite, got {loss} and {norm} at step {step} of stage "
        f"{stage!r}; its {len(sample_ids)} samples, {sample_ids[0]} and so on, are in {path}"
    )


class BrokenSamples:
    """The samples that were left out, each once, at most ``most`` of them, in a file."""

    def __init__(self, path: Path, most: int) -> None:
        self.path = path
        self.most = most
        self.reasons: dict[tuple[int, int], str] = {}
        """(data set, index) -> reason; part of a state."""

    def __len__(self) -> int:
        return len(self.reasons)

    def add_known(self, datasets: Iterable[SampleDataset], *, writes: bool) -> None:
        """Name all records that the data sets found broken when they were opened.

        Raises:
            BrokenSamplesError: They are too many. The file names all of them.
        """
        for data, dataset in enumerate(datasets):
            self.reasons |= {
                (data, sample.index): sample.reason for sample in broken_records(dataset)
            }
        if self.reasons:
            self.add(0, [], writes=writes)

    def add(self, data: int, broken: list[BrokenSample], *, writes: bool) -> None:
        """Name the samples of data set ``data`` that any process left out.

        The process that ``writes`` keeps the file.

        Raises:
            BrokenSamplesError: They are too many now.
        """
        # Every process plans the whole step and finds what is broken, so each sample comes often.
        self.reasons |= {(data, sample.index): sample.reason for sample in gather_object(broken)}
        if writes:
            named = [
                {"data": data, "index": index, "reason": reason}
                for (data, index), reason in sorted(self.reasons.items())
            ]
            write_json(self.path, named)
        if len(self) > self.most:
            raise BrokenSamplesError(
                f"{len(self)} broken samples are more than max_broken_samples of {self.most}; "
                f"{self.path} names them, the last is: {list(self.reasons.values())[-1]}"
            )
