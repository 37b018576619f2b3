"""Results: the columns of a CSV, reading and writing it, and how two of its rows compare."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import environment, machine_name
from tokenflex.files import write_atomically

COLUMNS = (
    *("op", "case", "tokens", "mode", "variant", "status", "backend", "dtype", "timing"),
    *("p20_us", "p50_us", "p80_us", "eager_us", "samples", "sets", "tokens_per_s"),
    *("ideal_bytes", "gb_per_s", "share_of_copy", "flops", "tflop_per_s", "share_of_matmul"),
    *("share_of_sheet", "peak_bytes", "saved_bytes", "synchronisations", "error", "seed", "note"),
)

OURS = "tokenflex"
NO_BIASES = "tokenflex, no biases"
LEAN = "tokenflex, save=input"
SPARSE = "tokenflex, sparse_grad"
EAGER = "PyTorch eager"
COMPILED = "torch.compile, max-autotune"
WALL_CLOCK = "wall clock"

NewRow = dict[str, Any]  # as it is measured
Row = dict[str, str]  # as the CSV has it


def new_row(**values: Any) -> NewRow:
    """Return a row with every column, empty but for ``values``."""
    return dict.fromkeys(COLUMNS, "") | values


def write_csv(
    path: Path, rows: Sequence[Mapping[str, object]], shared: Mapping[str, object]
) -> None:
    """Write rows of the same columns, each followed by the columns of ``shared``.

    The file appears whole or not at all.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *shared], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **shared} for row in rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a CSV, every value as it is written there.

    Raises:
        ValueError: It has no row, lacks one of ``columns``, or one of its rows is torn.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header, rows = reader.fieldnames or (), list(reader)
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"{path} must have the columns of a result, got none called {missing[0]}")
    if not rows:
        raise ValueError(f"{path} must have rows, got none")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} must have a value for every column, got a row without")
    return rows


def publish(
    rows: Sequence[NewRow], device: str, folder: Path, draw: Callable[[list[Row], Path], object]
) -> list[Row]:
    """Write the machine's CSV and the picture beside it, and return the rows as written."""
    shared = environment(device)
    path = folder / f"{machine_name(shared)}.csv"
    write_csv(path, rows, shared)
    published = read_csv(path)
    draw(published, path.with_suffix(".png"))
    print(f"{len(rows)} rows in {path}")
    return published


# ---- comparing


@dataclass(frozen=True)
class Figure:
    """A number, and what a reader must know beside it."""

    value: float
    remark: str = ""


class Results:
    """The rows of one machine, found by op, case, mode and variant."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._measured = {
            (row["op"], row["case"], row["mode"], row["variant"]): row
            for row in self.rows
            if row["status"] == "ok"
        }

    def has(self, variant: str) -> bool:
        """Return whether anything was measured of a variant."""
        return any(key[-1] == variant for key in self._measured)

    def beside(self, row: Row, *, variant: str = "", case: str = "") -> Row | None:
        """Return the measured row that differs from ``row`` in its variant or case alone."""
        key = (row["op"], case or row["case"], row["mode"], variant or row["variant"])
        return self._measured.get(key)


def speed_up(ours: Row, peer: Row) -> Figure | None:
    """Return the peer's time over ours; None where there is no such pair of times.

    The replay of a graph leaves the host out. Where only one of the two could be captured, the
    wall clock of both is compared, and the figure says so.
    """
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


@dataclass(frozen=True)
class Comparison:
    """Our row and a peer's of the same case, and the peer's time over ours."""

    ours: Row
    peer: Row
    figure: Figure

    @property
    def kind(self) -> tuple[str, str, str]:
        """Op, mode, and the gradients that packing takes."""
        gradients = ("frozen table", "trained table", "sparse table gradient")
        ending = next((end for end in gradients if self.ours["case"].endswith(end)), "")
        return self.ours["op"], self.ours["mode"], ending


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Return each measured row of a peer beside ours that does the same, in the CSV's order."""
    results = Results(rows)
    pairs = []
    for row in results.rows:
        if row["status"] != "ok" or row["variant"].startswith(OURS):
            continue
        ours = results.beside(row, variant=_counterpart(row))
        if ours and (figure := speed_up(ours, row)):
            pairs.append(Comparison(ours, row, figure))
    return pairs


def _counterpart(row: Row) -> str:
    if row["variant"].endswith("no biases"):
        return NO_BIASES
    return SPARSE if row["case"].endswith("sparse table gradient") else OURS
