"""``python -m tests.ptx.page``: the executor's tables and planted bugs in ``docs/results/ptx``.

The page's text is written by hand, its tables between markers from the CSV files and the tests.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs/results"
FOLDER = RESULTS / "ptx"
PAGE = FOLDER / "README.md"
# The constants that a config of the table sets; the others are variants and widths.
TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "BLOCK_ROWS", "BLOCK", "COLUMNS", "CHANNELS")
# A stage of the table of predictions, its variant, what was predicted of the kernels before, and
# whether that is a share of the limit or a multiple of its time.
PREDICTIONS = (
    ("pool_norm_forward", "adaptive norm save", "38 to 75 %", False),
    ("pool_norm_forward", "adaptive norm", "38 to 75 %", False),
    ("gate_up", "bias product save", "1.20 to 1.35 x", True),
    ("gate_up", "bias product", "1.20 to 1.35 x", True),
    ("down_gradient", "product bias", "1.35 to 1.50 x", True),
)
OPTIONS = {
    "UNROLL": "unrolled by",
    "num_warps": "warps",
    "num_stages": "stages",
    "maxnreg": "registers",
}


def short_config(config: str) -> str:
    """Return the launch configuration among the constants and options of a launch, in short."""
    values = dict(part.split("=", 1) for part in config.split())
    sizes = "x".join(values[name] for name in TILES if name in values)
    parts = [
        f"{word} {values[name]}"
        for name, word in OPTIONS.items()
        if values.get(name, "None") != "None"
    ]
    descriptors = ["descriptors"] if values.get("TMA") == "True" else []
    return ", ".join(filter(None, [sizes, *parts, *descriptors]))


def table_of_launches(rows: Iterable[Mapping[str, str]]) -> str:
    """Return a row for each kernel and config: the worst error and the instructions of a program.

    Args:
        rows: of the executor's CSV files.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        kernel = row["kernel"].removesuffix("_kernel")
        groups[row["architecture"], kernel, short_config(row["config"])].append(row)
    lines = [
        "| architecture | kernel | config | launches | worst error / limit | races "
        "| warp-instructions of a program |",
        "|---|---|---|---|---|---|---|",
    ]
    for (architecture, kernel, config), group in sorted(groups.items()):
        worst = max(float(row["error_share"]) for row in group)
        races = sum(int(row["races"]) for row in group)
        counts = sorted(_instructions(row) for row in group)
        span = f"{counts[0]:,.0f}" + (f" to {counts[-1]:,.0f}" if counts[-1] > counts[0] else "")
        lines.append(
            f"| {architecture} | `{kernel}` | {config} | {len(group)} | {worst:.2f} | {races} "
            f"| {span} |"
        )
    return "\n".join(lines)


def _instructions(row: Mapping[str, str]) -> float:
    names = [name for name in row if name.endswith("_instructions")]
    return sum(int(row[name]) for name in names) / int(row["programs"])


def table_of_predictions(rows: Iterable[Mapping[str, str]]) -> str:
    """Return what was predicted of the kernels before, and is of those of today.

    Args:
        rows: of ``docs/results/kernels.csv``.
    """
    shares = {
        (row["stage"], row["variant"], row["side"]): float(row["share"])
        for row in rows
        if row["images"] == "128"
    }
    lines = ["| stage | before | n = 8 | n = 12 | n = 16 |", "|---|---|---|---|---|"]
    for stage, variant, before, is_multiple in PREDICTIONS:
        each = [shares[stage, variant, side] for side in ("8", "12", "16")]
        after = [f"{1 / share:.2f} x" if is_multiple else f"{share:.0%}" for share in each]
        lines.append(f"| `{stage}`, {variant} | {before} | {' | '.join(after)} |")
    return "\n".join(lines)


def table_of_bugs(bugs: Mapping[str, Sequence[tuple[str, str, str, str, int]]]) -> str:
    """Return a row for each class of planted bugs: how many there are, and their names."""
    lines = ["| class | bugs | such as |", "|---|---|---|"]
    for name, members in bugs.items():
        lines.append(
            f"| {name} | {len(members)} | {'; '.join(dict.fromkeys(b[0] for b in members))} |"
        )
    lines.append(f"| all | {sum(map(len, bugs.values()))} | each is found |")
    return "\n".join(lines)


def read_rows(*paths: Path) -> list[dict[str, str]]:
    """Return the rows of CSV files, by default all of the executor's."""
    rows: list[dict[str, str]] = []
    for path in paths or sorted(FOLDER.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with each table in its place, between ``<!-- NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has no such place.
    """
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page must have one place for {name}")
        page = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)
    return page


def tables() -> dict[str, str]:
    """Return the tables of the page by name."""
    from tests.ptx.test_planted_bugs import BUGS

    return {
        "launches": table_of_launches(read_rows()),
        "bugs": table_of_bugs(BUGS),
        "predictions": table_of_predictions(read_rows(RESULTS / "kernels.csv")),
    }


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
