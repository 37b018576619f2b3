"""An ablation from its plan to its report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from experiments.ablation.extremes import format_extremes
from experiments.ablation.figures import write_figures
from experiments.ablation.gap import format_gap, write_gap_figure
from experiments.ablation.jobs import plan_jobs
from experiments.ablation.limited import format_limited, write_limited_figure
from experiments.ablation.report import format_report
from experiments.ablation.results import collect
from experiments.ablation.runner import run_jobs
from experiments.ablation.scales import Scale
from experiments.ablation.suites import regimes_of
from experiments.ablation.unseen import format_unseen
from tokenflex.files import write_json, write_text

ASKED_AGAIN = 300
"""Training canvases that the models of the suite "limited" are asked about: its smallest data."""


def ablate(
    scale: Scale,
    output: Path,
    *,
    suite: str = "paper",
    seeds: int | None = None,
    at_once: int | None = None,
    show_bar: bool = True,
) -> dict[str, Any]:
    """Train every regime of a suite on every seed, and write the results into ``output``.

    Besides a folder for each run, the suite "paper" writes ``report.md``, ``report.json``,
    ``claim.png``, ``figure1.png``, ``figure3.png`` and ``odds.png``; "gap" writes ``gap.md``,
    ``gap.json`` and ``gap.png``, and "limited" likewise; "unseen" writes ``unseen.md`` and
    ``unseen.json``, and "extremes" likewise. Runs that are done are not repeated: an interrupted
    ablation continues, more seeds are added, and suites share runs, but for "limited" and
    "extremes", whose folders are their own.

    Args:
        scale: Task, model and budget.
        output: The folder.
        suite: The compared regimes, see :mod:`experiments.ablation.suites`.
        seeds: Number of seeds; the scale's if None.
        at_once: Parallel runs; one per core, or one on a GPU, if None.
        show_bar: Show a progress bar.

    Returns:
        The content of the JSON file, see :func:`experiments.ablation.results.collect`.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM; the same call continues.
        JobFailedError: A run failed.
        ValueError: The suite is unknown, the folder holds another ablation, or one is running in
            it.
    """
    chosen = regimes_of(suite, scale)
    on_gpu = torch.cuda.is_available()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    at_once = at_once or (1 if on_gpu else cores)
    # On a GPU, canvases are drawn by the free cores; on a CPU, all cores train.
    workers = max(cores // at_once - 1, 0) if on_gpu else 0
    jobs = plan_jobs(
        scale,
        chosen,
        range(seeds or scale.seeds),
        on_gpu=on_gpu,
        workers=min(workers, 16),
        asked_again=ASKED_AGAIN if suite == "limited" else 0,
    )
    run_jobs(jobs, output, at_once=at_once, on_gpu=on_gpu, show_bar=show_bar)
    machine = f"{at_once} run{'s' * (at_once > 1)} at once on " + (
        torch.cuda.get_device_name() if on_gpu else f"{cores} CPU cores, one thread each"
    )
    report = collect(scale, chosen, jobs, output, machine)
    if suite == "gap":
        write_gap_figure(report, output / "gap.png")
        name, page = "gap", format_gap(report)
    elif suite == "limited":
        write_limited_figure(report, output / "limited.png")
        name, page = "limited", format_limited(report)
    elif suite == "unseen":
        name, page = "unseen", format_unseen(report)
    elif suite == "extremes":
        name, page = "extremes", format_extremes(report)
    else:
        write_figures(report, output)
        name, page = "report", format_report(report)
    write_text(output / f"{name}.md", page)
    write_json(output / f"{name}.json", report)
    return report
