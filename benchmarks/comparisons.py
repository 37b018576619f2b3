"""Rows beside each other: how much faster ours is than a peer, and how surely."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from benchmarks.results import (
    AGAIN,
    KEY,
    NO_BIASES,
    OURS,
    SPARSE,
    WALL_CLOCK,
    NewRow,
    Row,
    suite_of,
)

CONTROLS_COVERED = 0.95  # of all controls of a suite, by the margin


class Figure(NamedTuple):
    """A number, what a reader must know beside it, and its interval where one was measured."""

    value: float
    remark: str = ""
    low: float | None = None
    high: float | None = None

    def side_of(self, bound: float, margin: float = 0.0) -> int:
        """Return 1 where the number is above the bound, -1 below, 0 where its interval has both.

        Args:
            bound: What the number is compared with.
            margin: Widens the interval, as a share. A number without an interval is its own.
        """
        if self.low is None or self.high is None:
            return 1 if self.value >= bound else -1
        return int(self.low > bound * (1 + margin)) - int(self.high * (1 + margin) < bound)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.2f}{interval} {self.remark}".rstrip()


class Comparison(NamedTuple):
    """A row of ours, a peer's of the same case, and the peer's time over ours."""

    ours: Row
    peer: Row
    figure: Figure
    side: int = 0  # of 1: 1 if we are faster, -1 if we are slower, 0 within noise


class Results:
    """The rows of one machine; the measured ones are found by their ``KEY``."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.measured = [row for row in self.rows if row["status"] == "ok"]
        self._by_key = {tuple(row[name] for name in KEY): row for row in self.measured}
        # By suite and threads: how far the intervals of most controls are from 1, at most. No
        # interval shows what differs from start to start, such as where memory lies.
        misses: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.margins: dict[tuple[str, str], float] = {}
        for _, control, figure, _ in self.controls():
            low, high = figure.low or figure.value, figure.high or figure.value
            misses[suite_of(control), control["threads"]].append(max(0.0, low - 1, 1 / high - 1))
        for setting, values in misses.items():
            self.margins[setting] = float(np.quantile(values, CONTROLS_COVERED, method="higher"))

    def margin(self, row: Row) -> float:
        """Return the share that widens the intervals of a row: its suite's, or the largest."""
        setting = suite_of(row), row["threads"]
        largest = max((m for (_, n), m in self.margins.items() if n == row["threads"]), default=0.0)
        return self.margins.get(setting, largest)

    def beside(self, row: Row, **changes: str) -> Row | None:
        """Return the measured row that differs from ``row`` in ``changes`` alone."""
        wanted = row | changes
        return self._by_key.get(tuple(wanted[name] for name in KEY))

    def uniform(self, row: Row) -> Row | None:
        """Return the row of the uniform batch that a mixed one is compared with."""
        return self.beside(row, case=uniform_name(row["case"]))

    def comparisons(self) -> list[Comparison]:
        """Return each measured row of a peer beside ours that computes the same."""
        peers = [row for row in self.measured if not row["variant"].startswith(OURS)]
        return self._compared(row for row in peers if not row["variant"].endswith(AGAIN))

    def controls(self) -> list[Comparison]:
        """Return each measured row of a control beside the variant that it repeats."""
        return self._compared(row for row in self.measured if row["variant"].endswith(AGAIN))

    def _compared(self, rows: Iterable[Row]) -> list[Comparison]:
        pairs = []
        for row in rows:
            other = self.beside(row, variant=counterpart(row))
            if other and (figure := speed_up(other, row)):
                side = figure.side_of(1, self.margin(row))
                pairs.append(Comparison(other, row, figure, side))
        return pairs


def counterpart(row: NewRow) -> str:
    """Return the variant that a row is compared with: ours that computes the same."""
    if row["variant"].endswith(AGAIN):
        return row["variant"].removesuffix(AGAIN)
    if row["variant"].endswith("no biases"):
        return NO_BIASES
    return SPARSE if row["case"].endswith("sparse table gradient") else OURS


def speed_up(ours: Row, peer: Row) -> Figure | None:
    """Return the peer's time over ours; None where one of them has no time.

    It is the median over the turns that both took, where the peer's row has it. A CUDA-graph replay
    excludes the host's time. If only one of the two was captured, the wall clock times of both are
    compared, and the figure says so.
    """
    if peer["over_ours"] and counterpart(peer) == ours["variant"]:
        low, high = float(peer["over_ours_low"]), float(peer["over_ours_high"])
        return Figure(float(peer["over_ours"]), low=low, high=high)
    if ours["timing"] == peer["timing"]:
        return ratio(peer, ours, "p50_us")
    figure = ratio(peer, ours, "eager_us")
    return figure and Figure(figure.value, WALL_CLOCK)


def ratio(above: Row, below: Row, column: str) -> Figure | None:
    """Return one row's column over another's; None where either is empty."""
    if not above[column] or not below[column]:
        return None
    numerator, denominator = float(above[column]), float(below[column])
    if not denominator:
        return Figure(1.0 if not numerator else float("inf"))
    return Figure(numerator / denominator)


def uniform_name(case: str) -> str:
    """Return the name of the uniform batch that a mixed one is compared with."""
    return case.replace("mixed", "uniform")


def where(row: Row) -> str:
    """Return the case of a row, its mode, and on a CPU its dtype and threads."""
    setting = (row["dtype"], f"threads: {row['threads']}") if row["device"] == "cpu" else ()
    return ", ".join((row["case"], row["mode"], *setting))
