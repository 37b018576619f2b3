"""``tokenflex ablate``: plan, run, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tokenflex.ablation.figures import write_figures
from tokenflex.ablation.jobs import plan_jobs
from tokenflex.ablation.regimes import regimes
from tokenflex.ablation.report import format_report
from tokenflex.ablation.results import collect
from tokenflex.ablation.runner import run_jobs
from tokenflex.ablation.scales import Scale
from tokenflex.training.checkpoint import write_atomically, write_json


def ablate(
    scale: Scale,
    output: Path,
    *,
    seeds: int | None = None,
    at_once: int | None = None,
    show_bar: bool = True,
) -> dict[str, Any]:
    """Train every regime of ``scale`` on every seed, and write what came of it into ``output``.

    ``report.md``, ``report.json``, ``figure1.png``, ``figure3.png`` and ``odds.png``; a folder for
    each run. What is done already is not done again: an interrupted ablation continues, and more
    seeds add to what is there.

    Args:
        scale: task, model and budget.
        output: the folder.
        seeds: how many; as many as ``scale`` says if None.
        at_once: runs at a time; one a core on the CPU, and one on a GPU, if None.
        show_bar: whether to show a progress bar.

    Returns:
        What ``report.json`` holds, see :func:`tokenflex.ablation.results.collect`.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the same call continues.
        JobFailedError: a run failed.
        ValueError: the folder holds another ablation, or one is at work in it.
    """
    on_gpu = torch.cuda.is_available()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    at_once = at_once or (1 if on_gpu else cores)
    known = regimes(scale.counts)
    chosen = [known[name] for name in scale.regimes] or [*known.values()]
    # Drawing canvases must keep up with a GPU; on the CPU the cores are busy with other runs.
    workers = max(cores // at_once - 1, 0) if on_gpu else 0
    jobs = plan_jobs(
        scale, chosen, range(seeds or scale.seeds), on_gpu=on_gpu, workers=min(workers, 16)
    )
    run_jobs(jobs, output, at_once=at_once, on_gpu=on_gpu, show_bar=show_bar)
    machine = f"{at_once} run{'s' * (at_once > 1)} at once on " + (
        torch.cuda.get_device_name() if on_gpu else f"{cores} CPU cores, one thread each"
    )
    report = collect(scale, chosen, jobs, output, machine)
    write_figures(report, output)
    page = format_report(report)
    write_atomically(output / "report.md", lambda path: path.write_text(page, encoding="utf-8"))
    write_json(output / "report.json", report)
    return report
