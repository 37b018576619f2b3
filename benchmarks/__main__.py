"""``python -m benchmarks``: measure this machine; write its CSV, its pictures and its report.

Each suite runs at each dtype and number of threads, in a process of its own with a share of the
time. Rows are written as they come, to a file beside the CSV of earlier runs. When all have ended,
they replace the rows of the same suites, dtypes and threads in that CSV, which keeps the others.
With ``--resume``, rows of the same commit stay, and what is missing is measured. Rows of a run that
was stopped count too. The exit status is then 75 if time ended before all was measured.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks import (
    ceilings,
    host_cost,
    packing,
    pool_norm,
    project_and_pack,
    project_tokens,
    swiglu,
)
from benchmarks.harness import NO_TIME, Deadline
from benchmarks.processes import LATE, watched_rows
from benchmarks.report import report
from benchmarks.results import (
    COLUMNS,
    OURS,
    RESULTS,
    ROOT,
    NewRow,
    add_shares,
    environment,
    machine_name,
    new_row,
    read_csv,
    suite_of,
    write_csv,
)
from tokenflex_kernels.journal import UNFINISHED
from tokenflex_kernels.options import output_folder

READ_COLUMNS = (*COLUMNS, "device", "cpu", "gpu", "threads", "torch", "commit")

SUITES = {
    "ceilings": ceilings,
    "host_cost": host_cost,
    "packing": packing,
    "pool_norm": pool_norm,
    "swiglu": swiglu,
    "project_and_pack": project_and_pack,
    "project_tokens": project_tokens,
}
# On a CPU what takes longest comes last: it has the time that the others leave.
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16", "float32"]}
THREADS = {"cuda": [torch.get_num_threads()], "cpu": [2, 1]}
ONCE = "host_cost"  # of small float32 tensors, where one thread is enough
INTERRUPTED_STATUS = 130  # the convention of shells
SECONDS = {True: 105.0, False: 560.0}  # quick or not

Piece = tuple[str, str, int]  # a suite, a dtype, a number of threads
Done = dict[Piece, set[tuple[str, str, str]]]  # (op, case, mode) of a piece's rows


def pieces_of(suites: Sequence[str], settings: Sequence[tuple[str, int]]) -> list[Piece]:
    """Return what is measured: each suite at each dtype and number of threads."""
    pieces = [(suite, *setting) for suite, setting in product(suites, settings)]
    once = (ONCE, *max(settings, key=lambda setting: (setting[0] == "float32", -setting[1])))
    return [piece for piece in pieces if piece[0] != ONCE or piece == once]


def run_pieces(
    pieces: Sequence[Piece],
    device: str,
    quick: bool,
    seconds: float,
    done: Done | None = None,
    for_targets: bool = False,
) -> Iterator[list[NewRow]]:
    """Yield the rows of each piece, one process after the other, without those that are done."""
    deadline = Deadline(seconds)
    for index, (name, dtype, threads) in enumerate(pieces):
        weights = [SUITES[other].SHARES[device] for other, *_ in pieces[index:]]
        share = deadline.left * weights[0] / sum(weights)
        title = f"{name}, {dtype}, threads: {threads}"
        setting = {"dtype": dtype, "threads": threads}
        if share < 1:
            yield [new_row(op=f"{name} suite", status=NO_TIME) | setting]
            continue
        print(f"{title}: up to {share:.0f} s", flush=True)
        rows = watched_rows(
            name,
            SUITES[name].suite,
            device,
            quick,
            share,
            dtype=getattr(torch, dtype),
            threads=threads,
            done=(done or {}).get((name, dtype, threads), ()),
            for_targets=for_targets,
        )
        for more in rows:
            yield [row | setting for row in more]
        print(f"{title}: ended after {seconds - deadline.left:.0f} s in all", flush=True)


def failed(row: NewRow) -> bool:
    """Return whether a suite did not end, or something of ours went wrong (a peer may)."""
    ours = row["variant"].startswith(OURS) or row["op"] == "host_cost"
    return row["op"].endswith(" suite") or (ours and row["status"].startswith("failed"))


def earlier_rows(path: Path, pieces: Sequence[Piece]) -> list[NewRow]:
    """Return the rows of earlier runs that these pieces do not measure again."""
    if not path.exists():
        return []
    again = {(suite, dtype, str(threads)) for suite, dtype, threads in pieces}
    return [dict(row) for row in read_csv(path, READ_COLUMNS) if setting_of(dict(row)) not in again]


def is_unfinished(row: NewRow) -> bool:
    """Return whether a row is one that another run would measure, given time."""
    return row["status"] in (NO_TIME, LATE) or row["status"].startswith("stopped after")


def finished_rows(path: Path, pieces: Sequence[Piece], commit: object) -> tuple[list[NewRow], Done]:
    """Return the rows of these pieces that need no other run, and what they are of.

    Rows of the run that was stopped last come first: of a row that is there twice, it is kept.
    """
    settings = {
        (suite, dtype, str(threads)): (suite, dtype, threads) for suite, dtype, threads in pieces
    }
    rows: list[NewRow] = []
    for source in (unfinished_path(path), path):
        rows += [dict(row) for row in read_csv(source, READ_COLUMNS)] if source.exists() else []
    rows = [row for row in rows if setting_of(row) in settings and row["commit"] == commit]
    missing = {(setting_of(row), case_of(row)) for row in rows if is_unfinished(row)}
    kept: dict[tuple[object, ...], NewRow] = {}
    done: Done = {piece: set() for piece in pieces}
    for row in rows:
        if row["op"].endswith(" suite") or (setting_of(row), case_of(row)) in missing:
            continue
        kept.setdefault((setting_of(row), case_of(row), row["variant"]), row)
        done[settings[setting_of(row)]].add(case_of(row))
    return list(kept.values()), done


def setting_of(row: NewRow) -> tuple[str, str, str]:
    return suite_of(row), row["dtype"], str(row["threads"])


def case_of(row: NewRow) -> tuple[str, str, str]:
    return row["op"], row["case"], row["mode"]


def unfinished_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def measure(
    pieces: Sequence[Piece],
    device: str,
    quick: bool,
    seconds: float,
    path: Path,
    kept: Sequence[NewRow] = (),
    done: Done | None = None,
    for_targets: bool = False,
) -> int:
    """Measure the pieces, write their rows beside ``kept``, and return the exit status.

    Args:
        pieces, device, quick, seconds: What is measured.
        path: Of the CSV.
        kept: Rows that stay in it.
        done: What ``kept`` has of these pieces; None measures all, and then the status is never 75.
        for_targets: Measure one case for each target.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the suites: ops and clocks of the CPU
    start = time.perf_counter()
    shared = environment(device)
    unfinished = unfinished_path(path)
    rows: list[NewRow] = []
    try:
        for more in run_pieces(pieces, device, quick, seconds, done, for_targets):
            rows += [row | shared | {"threads": row["threads"]} for row in more]
            add_shares([*kept, *rows], shared)
            if rows:
                write_csv(unfinished, [*rows, *kept], {})
    except KeyboardInterrupt:
        text = f"{len(rows)} rows in {unfinished}" if rows else "nothing was measured"
        print(f"interrupted: {text}", file=sys.stderr)
        return INTERRUPTED_STATUS
    rows = sorted([*rows, *kept], key=lambda row: list(SUITES).index(suite_of(row)))
    write_csv(unfinished, rows, {})
    os.replace(unfinished, path)
    report(read_csv(path), path)
    print(f"{len(rows)} rows in {path}, {time.perf_counter() - start:.0f} s")
    if done is not None and any(is_unfinished(row) for row in rows):
        return UNFINISHED
    return int(any(failed(row) for row in rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, under two minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    parser.add_argument(
        "--out",
        type=output_folder,
        default=str(RESULTS),
        help=f"folder for CSV, pictures and report, default: {RESULTS.relative_to(ROOT)}",
    )
    parser.add_argument("--seconds", type=float, help="time limit for all suites together")
    parser.add_argument("--only", default=",".join(SUITES), help="suites, default: %(default)s")
    parser.add_argument("--dtypes", help="default: bfloat16,float32; on a GPU bfloat16")
    parser.add_argument("--threads", help="default: 2,1; on a GPU PyTorch's own number")
    parser.add_argument(
        "--resume", action="store_true", help="keep rows of this commit, measure the others"
    )
    parser.add_argument(
        "--targets", action="store_true", help="one case for each target of targets.csv"
    )
    parser.add_argument("--report", type=Path, help="measure nothing: report on this CSV again")
    options = parser.parse_args(arguments)
    if options.report:
        try:
            rows = read_csv(options.report, READ_COLUMNS)
        except (OSError, ValueError) as error:
            parser.error(f"--report must be a CSV that was written here: {error}")
        report(rows, options.report)
        return 0
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and PyTorch sees none")
    seconds = SECONDS[options.quick] if options.seconds is None else options.seconds
    if not 0 < seconds < math.inf:
        parser.error(f"--seconds must be positive and finite, got {seconds:g}")
    names = options.only.split(",")
    dtypes = options.dtypes.split(",") if options.dtypes else DTYPES[device]
    for option, given, known in (("only", names, SUITES), ("dtypes", dtypes, DTYPES["cpu"])):
        if unknown := [name for name in given if name not in known]:
            text = ", ".join(unknown) or repr("")
            parser.error(f"--{option} must be of {', '.join(known)}, got {text}")
    try:
        threads = [int(number) for number in options.threads.split(",")] if options.threads else []
    except ValueError:
        threads = [0]
    if any(number < 1 for number in threads):
        parser.error(f"--threads must be numbers above 0, as 1,2, got {options.threads}")
    pair = zip if options.quick and not (options.dtypes or options.threads) else product
    pieces = pieces_of(names, list(pair(dtypes, threads or THREADS[device])))
    options.out.mkdir(parents=True, exist_ok=True)
    machine = environment(device)
    name = f"{machine_name(machine)}{'-quick' if options.quick else ''}.csv"
    path, done = options.out / name, None
    try:
        kept = earlier_rows(path, pieces)
        if options.resume:
            finished, done = finished_rows(path, pieces, machine["commit"])
            kept += finished
    except ValueError as error:
        parser.error(f"--out has the CSV of another version, to be deleted or moved: {error}")
    return measure(pieces, device, options.quick, seconds, path, kept, done, options.targets)


if __name__ == "__main__":
    sys.exit(main())
