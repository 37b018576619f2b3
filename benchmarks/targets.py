"""What the project set itself before anything was measured, and whether a run reaches it.

Every target is judged by the worst of its cases, small batches included. A result of ours that is
wrong is a target missed; cases that did not run are counted beside those that met it. Targets of a
GPU are judged by rows of a GPU only: on the CPU the projector's ops run as plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.host_cost import OPS
from benchmarks.results import (
    COMPILED,
    EAGER,
    NO_BIASES,
    OURS,
    SPARSE,
    Figure,
    Results,
    Row,
    ratio,
    speed_up,
)

NOT_MEASURED = "not measured here"
LEAN = "tokenflex, save=input"
SCATTER = "embedding + masked_scatter"

# The suite that measures an op: if it did not end, nobody knows which cases are missing.
SUITE_OF = {
    "pool_norm": "pooling",
    "swiglu": "gate_up",
    "project_tokens": "projector",
    "pack_embeddings": "packing",
    "merge_vision": "packing",
    "host_cost": "host",
}

Value = Callable[[Results, Row, str], Figure | None]


@dataclass(frozen=True)
class Target:
    """One figure to reach, and the rows that it is about.

    Attributes:
        name: as it is printed.
        bound: what ``value`` must not be below (``at_least``) or above.
        value: (results, our row, peer) -> the figure of one row, None where it has none.
        ops, modes, variants: of our rows; ``modes`` empty for all.
        peer: the variant that ours is held against, if any.
        tokens: the least and the most rows of the result.
        ending: of the case's name.
        device: "cuda" or "cpu"; empty for both.
    """

    name: str
    bound: float
    value: Value
    ops: tuple[str, ...]
    modes: tuple[str, ...] = ()
    variants: tuple[str, ...] = (OURS,)
    peer: str = ""
    at_least: bool = True
    tokens: tuple[float, float] = (0, math.inf)
    ending: str = ""
    device: str = "cuda"

    def rows(self, found: Results) -> Iterator[Row]:
        """Ours, whatever became of them, and those of cases that did not run."""
        for row in found.rows:
            if (
                row["op"] in self.ops
                and (not self.modes or row["mode"] in self.modes)
                and row["variant"] in (*self.variants, "")
                and self.device in ("", row["device"])
                and row["case"].endswith(self.ending)
                and self.tokens[0] <= float(row["tokens"] or math.inf) <= self.tokens[1]
                and row["backend"] != "reference"
            ):
                yield row

    def judge(self, found: Results) -> Verdict:
        measured: list[tuple[Figure, Row]] = []
        failed: list[Row] = []
        not_run = 0
        for row in self.rows(found):
            if row["status"] == "ok":
                if figure := self.value(found, row, self.peer):
                    measured.append((figure, row))
            elif row["variant"] and row["status"].startswith("failed"):
                failed.append(row)
            else:
                not_run += 1
        if self.peer and not found.has(self.peer):
            failed = []  # there was nothing to be held against
        suites = {f"{SUITE_OF[op]} suite" for op in self.ops}
        value, where = None, ""
        if failed:
            where = f"{_where(failed[0])}: {failed[0]['status']}"
        elif measured:
            worst = min if self.at_least else max
            figure, row = worst(measured, key=lambda one: one[0].value)
            value, where = figure.value, ", ".join(filter(None, (_where(row), figure.remark)))
        return Verdict(
            target=self,
            value=value,
            where=where,
            met_cases=sum(self.reaches(figure.value) for figure, _ in measured),
            measured=len(measured),
            failed=len(failed),
            not_run=not_run,
            cut_short=any(
                row["op"] in suites and self.device in ("", row["device"]) for row in found.rows
            ),
        )

    def reaches(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Verdict:
    """What became of one target.

    Attributes:
        target: the target.
        value: the worst that was measured; None if nothing was, or a row of ours failed.
        where: the case of ``value``, or of the failure.
        met_cases, measured, failed, not_run: numbers of cases.
        cut_short: whether the suite did not end by itself.
    """

    target: Target
    value: float | None
    where: str
    met_cases: int
    measured: int
    failed: int
    not_run: int
    cut_short: bool

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.failed:
            return False
        return None if self.value is None else self.target.reaches(self.value)

    def __str__(self) -> str:
        cases = f"met on {self.met_cases} of {self.measured + self.failed + self.not_run} cases"
        left_out = f", {self.not_run} not run" if self.not_run else ""
        left_out += ", and the suite did not end" if self.cut_short else ""
        cases += left_out
        if self.failed:
            return f"SHORT: {self.failed} of ours failed ({self.where}); {cases}"
        if self.value is None:
            return NOT_MEASURED + left_out
        worst = f"{self.value:.3g} at worst ({self.where})"
        if not self.target.bound:
            return f"{cases}: {worst}" if self.met else f"SHORT: {worst}; {cases}"
        gap = abs(self.value / self.target.bound - 1)
        if self.met:
            return f"{cases}, {gap:.1%} to spare: {worst}"
        return f"SHORT by {gap:.1%}: {worst}; {cases}"


def _where(row: Row) -> str:
    return row["variant"] if row["op"] == "host_cost" else f"{row['case']}, {row['mode']}"


# ---- the figures


def faster(found: Results, row: Row, peer: str) -> Figure | None:
    """The peer's time over ours."""
    other = found.beside(row, variant=peer)
    return other and speed_up(row, other)


def slower(found: Results, row: Row, peer: str) -> Figure | None:
    """Our time over the peer's."""
    other = found.beside(row, variant=peer)
    return other and speed_up(other, row)


def faster_by_wall_clock(found: Results, row: Row, peer: str) -> Figure | None:
    other = found.beside(row, variant=peer)
    return other and ratio(other, row, "eager_us")


def saved(found: Results, row: Row, peer: str) -> Figure | None:
    """Bytes kept for backward, ours over the peer's."""
    other = found.beside(row, variant=peer)
    return other and ratio(row, other, "saved_bytes")


def inexact(found: Results, row: Row, peer: str) -> Figure | None:
    """Our error over the peer's."""
    other = found.beside(row, variant=peer)
    return other and ratio(row, other, "error")


def over_uniform(found: Results, row: Row, _: str) -> Figure | None:
    """The time of a mixed batch over that of the uniform one."""
    uniform = found.beside(row, case=row["case"].replace("mixed", "uniform"))
    return uniform and speed_up(uniform, row)


def share_of_copy(found: Results, row: Row, _: str) -> Figure | None:
    if not row["share_of_copy"]:
        return None
    sheet = row["share_of_sheet"]
    remark = f"{float(sheet):.3g} of the data sheet" if sheet else ""
    return Figure(float(row["share_of_copy"]), remark)


def microseconds(found: Results, row: Row, _: str) -> Figure | None:
    return Figure(float(row["p50_us"])) if row["case"] == "no grad" and row["backend"] else None


def synchronisations(found: Results, row: Row, _: str) -> Figure | None:
    """As PyTorch counts them; what could not be captured has waited, whoever counts."""
    if row["synchronisations"] == "":
        return None
    counted = int(row["synchronisations"])
    if row["timing"] == "graph":
        return Figure(counted)
    return Figure(max(1, counted), "not captured in a graph")


# ---- the targets

_POOL, _GATE_UP, _PROJECT = ("pool_norm",), ("swiglu",), ("project_tokens",)
_PACK, _MERGE = ("pack_embeddings",), ("merge_vision",)
_FORWARD, _BACKWARD, _TRAINING = ("forward",), ("backward",), ("forward+backward",)
_WHOLE = ("forward", "forward+backward")
_LARGE, _SMALL = (2048, math.inf), (0, 256)

TARGETS: tuple[Target, ...] = (
    Target("pool+LN forward: >= 85 % of copy bandwidth", 0.85, share_of_copy, _POOL, _FORWARD),
    Target("pool+LN backward: >= 80 % of copy bandwidth", 0.80, share_of_copy, _POOL, _BACKWARD),
    Target("pool+LN: >= 3x the eager chain", 3, faster, _POOL, peer=EAGER),
    Target("pool+LN: >= 1.3x torch.compile", 1.3, faster, _POOL, peer=COMPILED),
    *(
        Target(
            f"gate/up forward, T >= 2048: <= {bound:.2f}x the bare product{stretch}",
            bound,
            slower,
            _GATE_UP,
            _FORWARD,
            peer="bare product",
            at_least=False,
            tokens=_LARGE,
        )
        for bound, stretch in ((1.06, ""), (1.00, " (stretch)"))
    ),
    Target(
        "gate/up forward, T >= 2048: >= 1.10x torch.compile",
        1.10,
        faster,
        _GATE_UP,
        _FORWARD,
        peer=COMPILED,
        tokens=_LARGE,
    ),
    *(
        Target(
            f"projector, T >= 2048: >= {times}{name}",
            bound,
            faster,
            _PROJECT,
            _WHOLE,
            peer=peer,
            tokens=_LARGE,
        )
        for bound, times, name, peer in (
            (1.2, "1.2x ", "eager", EAGER),
            (1.08, "1.08x ", "torch.compile", COMPILED),
            (1, "", "liger-kernel", "liger-kernel"),
            (1, "", "quack-kernels", "quack-kernels"),
        )
    ),
    Target(
        "projector, T >= 2048: >= flash-swiglu-mlp (no biases)",
        1,
        faster,
        _PROJECT,
        _WHOLE,
        variants=(NO_BIASES,),
        peer="flash-swiglu-mlp, no biases",
        tokens=_LARGE,
    ),
    Target(
        "projector, T <= 256: >= 2x eager, wall clock",
        2,
        faster_by_wall_clock,
        _PROJECT,
        peer=EAGER,
        tokens=_SMALL,
    ),
    Target("projector, any T: never slower than eager", 1, faster, _PROJECT, peer=EAGER),
    Target(
        "projector, any T: nor by the wall clock", 1, faster_by_wall_clock, _PROJECT, peer=EAGER
    ),
    *(
        target
        for op in ("pool_norm", "project_tokens")
        for target in (
            Target(
                f"{op}, mixed counts: <= 1.05x uniform",
                1.05,
                over_uniform,
                (op,),
                at_least=False,
                ending="mixed",
            ),
            Target(
                f"{op}, mixed counts: >= 1.5x a loop over groups",
                1.5,
                faster,
                (op,),
                peer=EAGER,
                ending="mixed",
            ),
        )
    ),
    *(
        Target(
            f"saved for backward, {name}: <= {bound}x eager",
            bound,
            saved,
            _PROJECT,
            _TRAINING,
            variants=(variant,),
            peer=EAGER,
            at_least=False,
        )
        for name, bound, variant in (("preactivation", 0.55, OURS), ("input", 0.15, LEAN))
    ),
    Target("pack forward: >= 90 % of copy bandwidth", 0.90, share_of_copy, _PACK, _FORWARD),
    *(
        Target(
            f"pack forward+backward, {ending}: >= 85 %",
            0.85,
            share_of_copy,
            _PACK,
            _TRAINING,
            variants=(variant,),
            ending=ending,
        )
        for ending, variant in (
            ("frozen table", OURS),
            ("trained table", OURS),
            ("sparse table gradient", SPARSE),
        )
    ),
    Target("pack: >= 5x masked_scatter", 5, faster, _PACK, _WHOLE, peer=SCATTER),
    Target(
        "pack: 0 synchronisations",
        0,
        synchronisations,
        _PACK,
        variants=(OURS, SPARSE),
        at_least=False,
    ),
    Target(
        "pack on the CPU: >= 2x masked_scatter",
        2,
        faster,
        _PACK,
        peer=SCATTER,
        device="cpu",
    ),
    Target(
        "merge on the CPU: >= 2x masked_scatter",
        2,
        faster,
        _MERGE,
        peer="masked_scatter",
        device="cpu",
    ),
    Target(
        "host cost of an op call, forward: <= 15 us",
        15,
        microseconds,
        ("host_cost",),
        variants=OPS,
        at_least=False,
        device="",
    ),
    Target(
        "error against float64: <= 1.2x eager's",
        1.2,
        inexact,
        (*_POOL, *_GATE_UP, *_PROJECT),
        variants=(OURS, LEAN),
        peer=EAGER,
        at_least=False,
    ),
)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every target, judged by its worst case."""
    found = Results(rows)
    return [target.judge(found) for target in TARGETS]
