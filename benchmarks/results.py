"""The rows of a CSV, how two of them compare, and names that plots, tables and verdicts share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, str]
OURS = "tokenflex"
EAGER = "PyTorch eager"
COMPILED = "torch.compile, max-autotune"
WALL_CLOCK = "wall clock"


@dataclass(frozen=True)
class Figure:
    """A number, and what a reader must know beside it."""

    value: float
    remark: str = ""


class Results:
    """The rows of one machine, by op, case, mode and variant."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._found = {
            (row["op"], row["case"], row["mode"], row["variant"]): row
            for row in self.rows
            if row["status"] == "ok"
        }

    def has(self, variant: str) -> bool:
        """Whether anything was measured of a variant."""
        return any(key[-1] == variant for key in self._found)

    def beside(self, row: Row, *, variant: str = "", case: str = "") -> Row | None:
        """The measured row that differs from ``row`` in its variant or case alone."""
        key = (row["op"], case or row["case"], row["mode"], variant or row["variant"])
        return self._found.get(key)


def speed_up(ours: Row, peer: Row) -> Figure | None:
    """The peer's time over ours, of the same kind on both sides; None if there is no such pair.

    The replay of a graph leaves the host out. Where only one of the two could be captured, both
    count by their wall clock, and the figure says so.
    """
    if ours["timing"] == peer["timing"]:
        return ratio(peer, ours, "p50_us")
    figure = ratio(peer, ours, "eager_us")
    return figure and Figure(figure.value, WALL_CLOCK)


def ratio(above: Row, below: Row, column: str) -> Figure | None:
    """One row's column over another's; None where either is empty."""
    if not above[column] or not below[column]:
        return None
    numerator, denominator = float(above[column]), float(below[column])
    if not denominator:
        return Figure(1.0 if not numerator else float("inf"))
    return Figure(numerator / denominator)


# ---- every comparison there is

NO_BIASES = "tokenflex, no biases"
SPARSE = "tokenflex, sparse_grad"
_ENDINGS = ("frozen table", "trained table", "sparse table gradient")


@dataclass(frozen=True)
class Comparison:
    """Ours and one peer on one case.

    Attributes:
        ours, peer: their rows.
        figure: the peer's time over ours.
    """

    ours: Row
    peer: Row
    figure: Figure

    @property
    def kind(self) -> tuple[str, str, str]:
        """Op, mode, and which gradients packing takes."""
        ending = next((end for end in _ENDINGS if self.ours["case"].endswith(end)), "")
        return self.ours["op"], self.ours["mode"], ending


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Each measured row of a peer beside ours that does the same, in the order of the CSV."""
    found = Results(rows)
    pairs = []
    for row in found.rows:
        if row["status"] != "ok" or row["variant"].startswith(OURS):
            continue
        ours = found.beside(row, variant=_counterpart(row))
        if ours and (figure := speed_up(ours, row)):
            pairs.append(Comparison(ours, row, figure))
    return pairs


def _counterpart(row: Row) -> str:
    if row["variant"].endswith("no biases"):
        return NO_BIASES
    return SPARSE if row["case"].endswith("sparse table gradient") else OURS
