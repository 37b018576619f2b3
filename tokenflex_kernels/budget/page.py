"""The table of predictions as a CSV file, and as a section of ``docs/kernels.md``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from tokenflex_kernels.budget.model import ReferenceGpu
from tokenflex_kernels.budget.table import SIDES, Row, Verdict
from tokenflex_kernels.budget.walk import LANES

BEGIN = "<!-- predictions: written by python -m tokenflex_kernels.budget -->"
END = "<!-- end of the predictions -->"


def write_csv(path: Path, judged: Sequence[Verdict], gpu: ReferenceGpu) -> None:
    """Write a line for each launch."""
    lines = [_line(verdict, row, gpu) for verdict in judged for row in verdict.rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _line(verdict: Verdict, row: Row, gpu: ReferenceGpu) -> dict[str, object]:
    import triton

    case, resources, prediction = row.case, row.recorded.resources, row.prediction
    return {
        "gpu": gpu.name,
        "triton": triton.__version__,
        "stage": case.stage,
        "variant": case.variant,
        "images": case.images,
        "side": case.side,
        "kernel": row.recorded.kernel,
        "config": row.config,
        "programs": row.recorded.launch.programs,
        "warps": resources.warps,
        "registers": resources.registers,
        "shared_bytes": resources.shared,
        "blocks_per_sm": prediction.blocks,
        "occupancy": f"{prediction.occupancy:.2f}",
        "waves": f"{prediction.waves:.2f}",
        # Of a block, on average.
        "warp_instructions": f"{mean(t.issued for t in row.totals):.0f}",
        **{pipe: f"{mean(t.instructions[pipe] for t in row.totals):.0f}" for pipe in LANES},
        "tensor": f"{mean(t.instructions['tensor'] for t in row.totals):.0f}",
        "bytes_loaded": f"{mean(t.loaded for t in row.totals):.0f}",
        "bytes_stored": f"{mean(t.stored for t in row.totals):.0f}",
        "cycles_alone": f"{mean(t.cycles for t in row.totals):.0f}",
        "predicted_us": f"{prediction.microseconds:.1f}",
        "bound_by": prediction.bound_by,
        # Of the stage, all its launches together.
        "limit_us": f"{verdict.limit:.1f}",
        "share": f"{verdict.share:.3f}",
        "budget": verdict.least_share,
        "target": "" if verdict.budget.target is None else verdict.budget.target,
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the lines of a table of predictions."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def section(lines: Sequence[dict[str, str]]) -> str:
    """Return the section of the documentation: a row for each stage, variant and batch size."""
    table = [
        "| stage | images | " + " | ".join(f"n = {side}" for side in SIDES) + " | target |",
        "|---" * (3 + len(SIDES)) + "|",
    ]
    stages = dict.fromkeys((line["stage"], line["variant"], line["images"]) for line in lines)
    for stage, variant, images in stages:
        cells = []
        for side in SIDES:
            key = stage, variant, images, str(side)
            launches = [
                line
                for line in lines
                if (line["stage"], line["variant"], line["images"], line["side"]) == key
            ]
            cells.append(_cell(launches))
        target = next(
            line["target"]
            for line in lines
            if (line["stage"], line["variant"], line["images"]) == (stage, variant, images)
        )
        name = f"`{stage}`" + (f", {variant}" if variant else "")
        shown = f"{float(target):.0%}" if target else ""
        table.append(f"| {name} | {images} | {' | '.join(cells)} | {shown} |")
    return "\n".join(table)


def _cell(launches: Sequence[dict[str, str]]) -> str:
    if not launches:
        return "library"
    predicted = sum(float(line["predicted_us"]) for line in launches)
    slowest = max(launches, key=lambda line: float(line["predicted_us"]))
    limit, share = float(launches[0]["limit_us"]), float(launches[0]["share"])
    return f"{_short(limit)} / {_short(predicted)} us, {share:.0%}, {slowest['bound_by']}"


def _short(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 10 else f"{microseconds:.1f}"


def replace_section(page: str, lines: Sequence[dict[str, str]]) -> str:
    """Return the page with its section of predictions written anew.

    Raises:
        ValueError: the page does not have both marks of the section.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n{section(lines)}\n{END}{after}"
