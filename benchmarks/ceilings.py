"""The rates at which this device copies and multiplies. All other rates are shares of these."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Entry, Run, Work, measure
from benchmarks.results import gpu_clocks, new_row

SHARES = {"cuda": 1, "cpu": 0.5}  # of a run's time


def suite(run: Run) -> None:
    copied = {"cuda": 2**31, "cpu": 2**27}[run.device] // (4 if run.quick else 1)
    side = {"cuda": 8192, "cpu": 1024}[run.device]
    source = torch.randn(copied // run.dtype.itemsize, device=run.device, dtype=run.dtype)
    factors = torch.randn(2, side, side, device=run.device, dtype=run.dtype)
    copy = partial(torch.empty_like(source).copy_, source)
    matmul = partial(torch.mm, *factors, out=torch.empty_like(factors[0]))
    for name, case, call, work in (
        ("copy", f"{copied / 2**30:g} GiB", copy, Work(bytes=2 * source.nbytes)),
        ("matmul", f"{side}^3", matmul, Work(flops=2 * side**3)),
    ):
        if ("ceiling", case, "forward") in run.done:
            continue
        row = new_row(op="ceiling", case=case, mode="forward", variant=name, sets=1)
        rows = measure([Entry(row, partial(list, [call]), work)], run, seconds=3.0)
        if speed := gpu_clocks(run.device):
            rows[0]["note"] = f"clocks right after: {speed}"
        run.emit(rows)
