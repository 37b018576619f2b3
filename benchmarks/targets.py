"""The targets that the project set before anything was measured, and whether a run meets them.

The table is ``targets.csv``: a line is a figure, its bound, and the rows it is about. A target is
judged by the worst of its cases, small batches included. A wrong result of ours misses the target;
cases that did not run are counted. A GPU's targets are judged by rows of a GPU only, and no target
by plain PyTorch (``reference``), except on a CPU, where ours may choose it. A case whose figure has
an interval is met, too, if the bound lies in it: the figure is then within noise.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparisons import Figure, Results, ratio, speed_up, where
from benchmarks.results import Row, suite_of

TABLE = Path(__file__).with_name("targets.csv")
NOT_MEASURED = "not measured here"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one target."""

    name: str
    met: bool | None  # None where nothing was measured
    value: float | None  # the worst that was measured; None if nothing was, or a row of ours failed
    text: str  # met or short, by how much, where, and on how many cases
    device: str  # that it is about; "" for any


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Return the verdict on every target of the table."""
    results = Results(rows)
    return [judge(target, results) for target in read_targets()]


def read_targets() -> list[Row]:
    """Return the lines of the table."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def judge(target: Row, results: Results) -> Verdict:
    """Judge one line of the table."""
    name, bound, at_least = target["target"], float(target["bound"]), target["sense"] == ">="
    device = target["device"]
    measured: list[tuple[Figure, Row]] = []
    failed: list[Row] = []
    not_run = 0
    for row in results.rows:
        if not is_about(target, row):
            continue
        if row["status"] == "ok":
            other = results.uniform(row)
            if target["figure"] != "over_uniform":
                other = results.beside(row, variant=target["peer"] or row["variant"])
            if other and (figure := FIGURES[target["figure"]](row, other)):
                measured.append((figure, row))
        elif row["variant"] and row["status"].startswith("failed"):
            failed.append(row)
        else:
            not_run += 1
    if target["peer"] and all(row["variant"] != target["peer"] for row in results.measured):
        failed = []  # without the peer there is no comparison
    left_out = f", {not_run} not run" if not_run else ""
    if did_not_end(target, results):  # the number of missing cases is unknown
        left_out += ", and the suite did not end"
    reached = [f.value >= bound if at_least else f.value <= bound for f, _ in measured]
    sides = [f.side_of(bound, results.margin(row)) for f, row in measured]
    equal = sum(side == 0 and not met for side, met in zip(sides, reached, strict=True))
    reached = [met or side == 0 for side, met in zip(sides, reached, strict=True)]
    total = len(measured) + len(failed) + not_run
    within = f" ({equal} within noise)" if equal else ""
    cases = f"met on {sum(reached)} of {total} cases{within}{left_out}"
    if failed:
        reason = f"{where(failed[0])}: {failed[0]['status']}"
        text = f"SHORT: {len(failed)} of ours failed ({reason}); {cases}"
        return Verdict(name, met=False, value=None, text=text, device=device)
    if not measured:
        return Verdict(name, met=None, value=None, text=NOT_MEASURED + left_out, device=device)
    figure, row = (min if at_least else max)(measured, key=lambda pair: pair[0].value)
    place = row["variant"] if row["op"] == "host_cost" else where(row)
    worst = f"{figure.value:.3g} at worst ({', '.join(filter(None, (place, figure.remark)))})"
    gap = f"{abs(figure.value / bound - 1):.1%}" if bound else ""
    if all(reached):
        spare = f", {gap} to spare" if gap and not equal else ""
        text = f"{cases}{spare}: {worst}"
    else:
        text = f"SHORT{f' by {gap}' if gap else ''}: {worst}; {cases}"
    return Verdict(name, met=all(reached), value=figure.value, text=text, device=device)


def did_not_end(target: Row, results: Results) -> bool:
    suites = {f"{suite_of({'op': op})} suite" for op in target["ops"].split("; ")}
    return any(
        row["op"] in suites and target["device"] in ("", row["device"]) for row in results.rows
    )


def is_about(target: Row, row: Row) -> bool:
    """Return whether a row counts: ours, with any status, or a case that did not run."""
    tokens = float(row["tokens"] or math.inf)
    return (
        row["op"] in target["ops"].split("; ")
        and row["mode"] in (target["modes"] or row["mode"]).split("; ")
        and row["variant"] in (*target["variants"].split("; "), "")
        and row["case"].endswith(target["case_ends"])
        and float(target["least_tokens"] or 0) <= tokens
        and tokens <= float(target["most_tokens"] or math.inf)
        and target["device"] in ("", row["device"])
        and (row["backend"] != "reference" or row["device"] == "cpu")
    )


# ---- figures of our row beside another: the peer's, or the uniform batch's


def share_of_copy(ours: Row, _: Row) -> Figure | None:
    if not ours["share_of_copy"]:
        return None
    sheet = ours["share_of_sheet"]
    remark = f"{float(sheet):.3g} of the data sheet" if sheet else ""
    return Figure(float(ours["share_of_copy"]), remark)


def slow_down(ours: Row, peer: Row) -> Figure | None:
    """Return our time over the peer's."""
    if not (figure := speed_up(ours, peer)):
        return None
    value, remark, low, high = figure
    return Figure(1 / value, remark, high and 1 / high, low and 1 / low)


def microseconds(ours: Row, _: Row) -> Figure | None:
    is_op = ours["case"] == "no grad" and ours["backend"]
    return Figure(float(ours["p50_us"])) if is_op else None


def synchronisations(ours: Row, _: Row) -> Figure | None:
    """As PyTorch counts them; a call that could not be captured has waited at least once."""
    if ours["synchronisations"] == "":
        return None
    counted = int(ours["synchronisations"])
    if ours["timing"] == "graph":
        return Figure(counted)
    return Figure(max(1, counted), "not captured in a graph")


FIGURES: dict[str, Callable[[Row, Row], Figure | None]] = {
    "faster": speed_up,
    "slower": slow_down,
    "faster_by_wall_clock": lambda ours, peer: ratio(peer, ours, "eager_us"),
    "saved": lambda ours, peer: ratio(ours, peer, "saved_bytes"),
    "inexact": lambda ours, peer: ratio(ours, peer, "error"),
    "over_uniform": lambda ours, uniform: speed_up(uniform, ours),
    "share_of_copy": share_of_copy,
    "microseconds": microseconds,
    "synchronisations": synchronisations,
}
