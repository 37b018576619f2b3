"""Predictions for the kernels at the reference shapes, and the budgets that they must keep.

``budgets.csv`` states, for each stage, variant, number of images and side of the grid that they are
pooled to, the least share of its limit that a stage must reach in the predictions, with a reason,
and the share that is its target. The limit of a stage is the larger of two times: that of moving
its inputs and outputs once, and that of its matrix products, each at the speed that a GPU's own
copy or product reaches.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from tokenflex_kernels.budget.model import REFERENCE_GPUS, Prediction, ReferenceGpu, predict
from tokenflex_kernels.budget.recording import Recorded, recording
from tokenflex_kernels.budget.state import Totals
from tokenflex_kernels.budget.walk import walk
from tokenflex_kernels.launch_configs import STAGES, launch_config
from tokenflex_kernels.stage_calls import IN_GRID, REFERENCE, rows_of_stage, stage_calls
from tokenflex_kernels.versions import is_release

BUDGETS = Path(__file__).with_name("budgets.csv")
DTYPE = torch.bfloat16
SIDES = (8, 12, 16)  # of the grids that images are pooled to
MARGIN = 0.03  # of a share, for compilers that differ a little
COUNTED_WITH = "3.7"  # the release of Triton that budgets and shipped configs are of
MARGIN_OF_OTHERS = 0.1  # of a share, below which another release is no fault
WALKED = 3  # blocks of a launch


@dataclass(frozen=True)
class Case:
    """A stage at a reference shape: its variant of ``stage_calls``, images, side of the grid."""

    stage: str
    variant: str
    images: int
    side: int

    @property
    def tokens(self) -> int:
        """The tokens of the batch."""
        return self.images * self.side**2

    def limit(self, gpu: ReferenceGpu) -> float:
        """Return the microseconds that no kernel can beat."""
        c, h, d = REFERENCE
        tokens, patches = self.tokens, self.images * IN_GRID[0] * IN_GRID[1]
        words = set(self.variant.split())
        saved, product = "save" in words, "product" in words
        numbers, operations = {
            "pool_norm_forward": (c * (patches + tokens * (1 + saved)), 0),
            "pool_norm_backward": (c * (patches + 2 * tokens), 0),
            "norm_gradient": (2 * c * tokens, 0),
            "scale_shift": (2 * c * tokens, 0),
            "gate_up": (tokens * (c + h * (product + 2 * saved)) + 2 * c * h, 4 * tokens * c * h),
            "down_gradient": (tokens * (d + h * (4 + product)) + d * h, 2 * tokens * d * h),
            "input_gradient": (tokens * (2 * h + c) + 2 * c * h, 4 * tokens * c * h),
            "pointwise": (tokens * h * (5 + product if "gradients" in words else 3), 0),
        }[self.stage]
        memory = numbers * DTYPE.itemsize / (1e3 * gpu.copy)
        return max(memory, operations / (1e6 * gpu.matmul))


@dataclass(frozen=True)
class Budget:
    """A line of ``budgets.csv``: shares of the limit, and the reason for those that are stated.

    Attributes:
        shares: the least that is accepted, by side; none where the stage launches no kernel.
        target: of the project; None where it has set none.
    """

    stage: str
    variant: str
    images: int
    shares: dict[int, float]
    target: float | None
    reason: str


@dataclass(frozen=True)
class Row:
    """The prediction for one launch of a case.

    Attributes:
        recorded: the launch.
        config: of the stage, its fields joined by slashes.
        totals: of the blocks that were walked.
    """

    case: Case
    recorded: Recorded
    config: str
    totals: Sequence[Totals]
    prediction: Prediction

    def describe(self) -> str:
        """Return the row as a line of text."""
        p = self.prediction
        shape = f"{self.case.variant}, {self.case.images} x {self.case.side}^2"
        return (
            f"{self.recorded.kernel:27} {shape:40} {self.recorded.resources.registers:3} registers"
            f" {p.blocks:2} blocks/SM {p.occupancy:4.0%} occupancy {p.waves:6.2f} waves"
            f" {p.microseconds:7.1f} us by {p.bound_by}"
        )


@dataclass(frozen=True)
class Verdict:
    """The prediction for a case, beside its budget.

    Attributes:
        rows: of its launches.
        limit: microseconds, see :meth:`Case.limit`.
    """

    case: Case
    budget: Budget
    rows: Sequence[Row]
    limit: float

    @property
    def least_share(self) -> float:
        """The share that is stated for this side; 0 where none is."""
        return self.budget.shares.get(self.case.side, 0.0)

    @property
    def microseconds(self) -> float:
        """The predicted time of all launches, one after the other."""
        return sum(row.prediction.microseconds for row in self.rows)

    @property
    def share(self) -> float:
        """The share of the limit that is reached."""
        return self.limit / self.microseconds

    @property
    def fault(self) -> str:
        """The fault in words, "" if the budget is kept."""
        if self.share >= self.least_share:
            return ""
        return (
            f"over its budget: {self.share:.3f} of the limit of {self.limit:.1f} us, and"
            f" {self.least_share} is stated in {BUDGETS.name}"
        )

    @property
    def is_of_another_compiler(self) -> bool:
        """True for a small fault under another release of Triton than that of the budgets."""
        missed = bool(self.fault) and not is_release("triton", COUNTED_WITH)
        return missed and self.share >= (1 - MARGIN_OF_OTHERS) * self.least_share

    def describe(self) -> str:
        """Return the verdict as lines of text, one for each launch."""
        lines = [row.describe() for row in self.rows]
        target = f", target {self.budget.target}" if self.budget.target else ""
        lines[0] += f"  {self.share:.3f} of its limit, budget {self.least_share}{target}"
        lines[0] += f"  {self.fault}" if self.fault else ""
        return "\n".join(lines)


def read_budgets(path: Path = BUDGETS) -> dict[tuple[str, str, int], Budget]:
    """Return the budgets by stage, variant and images."""
    with path.open(newline="", encoding="utf-8") as file:
        budgets = [
            Budget(
                line["stage"],
                line["variant"],
                int(line["images"]),
                {side: float(line[f"share_{side}"]) for side in SIDES if line[f"share_{side}"]},
                float(line["target"]) if line["target"] else None,
                line["reason"],
            )
            for line in csv.DictReader(file)
        ]
    return {(b.stage, b.variant, b.images): b for b in budgets}


def write_budgets(judged: Sequence[Verdict], path: Path = BUDGETS) -> None:
    """Write budgets anew, with the shares that were predicted, less ``MARGIN``."""
    predicted = {
        (v.case.stage, v.case.variant, v.case.images, v.case.side): v.share for v in judged
    }
    fields = [
        "stage",
        "variant",
        "images",
        *(f"share_{side}" for side in SIDES),
        "target",
        "reason",
    ]
    budgets = read_budgets(path).values()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for b in budgets:
            shares = {}
            for side in SIDES:
                share = predicted.get((b.stage, b.variant, b.images, side))
                shares[f"share_{side}"] = f"{(1 - MARGIN) * share:.3f}" if share else ""
            line = {"stage": b.stage, "variant": b.variant, "images": b.images, "reason": b.reason}
            writer.writerow({**line, **shares, "target": "" if b.target is None else b.target})


def cases(sides: Sequence[int] = SIDES) -> Iterator[Case]:
    """Yield the cases that have a budget."""
    for stage, variant, images in read_budgets():
        if stage not in STAGES:
            raise ValueError(f"{BUDGETS.name}: {stage!r} is not one of {', '.join(STAGES)}")
        for side in sides:
            yield Case(stage, variant, images, side)


def predict_case(case: Case, architecture: str) -> list[Row]:
    """Compile what a case launches and predict its times; an empty list for the library's products.

    Call ``aot.set_target`` with the architecture before.

    Raises:
        ValueError: the stage has no such variant.
    """
    gpu = REFERENCE_GPUS[architecture]
    grid = (case.side, case.side)
    rows = rows_of_stage(case.stage, case.images, grid)
    config = launch_config(case.stage, rows, DTYPE, architecture)
    calls = dict(stage_calls(case.stage, DTYPE, case.images, grid, torch.device("meta")))
    if case.variant not in calls:
        raise ValueError(f"{case.stage} has no variant {case.variant!r}, only {', '.join(calls)}")
    with recording(gpu.capability, gpu.multiprocessors) as recorded:
        calls[case.variant](config=config)
    if config is None:
        return []
    label = "/".join(str(int(field or 0)) for field in config)
    predicted = []
    for launch in recorded:
        totals = [walk(launch.launch, k) for k in walked_programs(launch.launch.programs, case)]
        prediction = predict(
            gpu, launch.resources, launch.launch.programs, totals, launch.unique_bytes
        )
        predicted.append(Row(case, launch, label, totals, prediction))
    return predicted


def walked_programs(programs: int, case: Case) -> list[int]:
    """Return some blocks of the first image, or of the whole grid if images share blocks."""
    period = programs // case.images if programs % case.images == 0 else programs
    number = min(WALKED, period)
    return [(2 * k + 1) * period // (2 * number) for k in range(number)]


def verdicts(architecture: str, sides: Sequence[int] = SIDES) -> list[Verdict]:
    """Return the verdict on every case that launches a kernel; none for unknown architectures.

    Call ``aot.set_target`` with the architecture before.
    """
    if architecture not in REFERENCE_GPUS:
        return []
    budgets = read_budgets()
    judged = []
    for case in cases(sides):
        budget = budgets[case.stage, case.variant, case.images]
        if rows := predict_case(case, architecture):
            judged.append(Verdict(case, budget, rows, case.limit(REFERENCE_GPUS[architecture])))
    return judged


def compiler_remark(number: int) -> str:
    """Return a line on ``number`` kernels or stages that another compiler makes a little worse."""
    return (
        f"{number} a little worse by Triton {version('triton')} than by {COUNTED_WITH}, of which"
        " configs and budgets are: no fault"
    )


def with_budgets(judged: Sequence[Verdict]) -> list[Verdict]:
    """Return the same predictions beside the budgets as they are stated now."""
    budgets = read_budgets()
    return [replace(v, budget=budgets[v.case.stage, v.case.variant, v.case.images]) for v in judged]
