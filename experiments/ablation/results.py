"""What the runs of an ablation found, over its seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from experiments.ablation.jobs import Job
from experiments.ablation.regimes import Regime, Start
from experiments.ablation.scales import Scale
from tokenflex.counts import tokens_of
from tokenflex.evaluation.counts import label_of


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value), and the values."""
    mean = sum(values) / len(values)
    spread = None
    if len(values) > 1:
        spread = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {"mean": mean, "spread": spread, "values": [*values]}


def collect(
    scale: Scale, regimes: Collection[Regime], jobs: Sequence[Job], output: Path, machine: str
) -> dict[str, Any]:
    """``report.json`` of an ablation whose jobs are all done.

    Returns:
        ``regimes``: by name, the starts first, each with ``title``, ``is_start``, ``accuracy``
        (count -> :func:`spread_of` over seeds), ``accuracy_by_kind`` (kind -> count -> the same),
        ``steps`` and ``views`` (images shown), ``vision_tokens`` (a teacher's included) and
        ``seconds`` of the training that is its own, over seeds. Beside it ``scale``, ``counts``,
        ``unseen``, ``seeds``, ``questions`` (kind -> how many), ``samples``, ``standard_error``
        (the largest of any model at any count, from the questions asked) and ``machine``.
    """
    reports = {job.name: job.report(output) for job in jobs}
    starts = {regime.start.name: regime.start for regime in regimes}
    compared: list[Start | Regime] = [*starts.values(), *regimes]
    rows: dict[str, dict[str, Any]] = {
        one.name: {
            "title": one.title,
            "is_start": isinstance(one, Start),
            **_row([job for job in jobs if job.regime == one.name], reports),
        }
        for one in compared
    }
    first = next(iter(reports.values()))
    return {
        "scale": scale.name,
        "counts": [str(count) for count in scale.counts],
        "unseen": [label_of(count) for count in scale.unseen],
        "seeds": sorted({job.seed for job in jobs}),
        "start": {"warm_up_steps": scale.warm_up_steps, "steps": scale.start_steps},
        "batch_size": scale.batch_size,
        "questions": first["questions"],
        "samples": first["samples"],
        "standard_error": max(
            error for report in reports.values() for error in report["standard_error"].values()
        ),
        "machine": machine,
        "regimes": rows,
    }


def _row(jobs: Sequence[Job], reports: Mapping[str, Any]) -> dict[str, Any]:
    found = [reports[job.name] for job in jobs]
    # The last stage is the regime's own; before a start's there is the encoder's warm-up.
    stages = [report["stages"][-1] for report in found]
    shown = [job.steps * job.config["stages"][0]["batch_size"] for job in jobs]
    return {
        "accuracy": {
            count: spread_of([report["accuracy"][count] for report in found])
            for count in found[0]["accuracy"]
        },
        "accuracy_by_kind": {
            kind: {
                count: spread_of([report["accuracy_by_kind"][kind][count] for report in found])
                for count in row
            }
            for kind, row in found[0]["accuracy_by_kind"].items()
        },
        "steps": jobs[0].steps,
        "views": shown[0],
        "vision_tokens": spread_of(
            [
                views * (stage["tokens_per_image"] + _teacher_tokens(job))
                for views, stage, job in zip(shown, stages, jobs, strict=True)
            ]
        ),
        "seconds": spread_of([stage["seconds"] for stage in stages]),
    }


def _teacher_tokens(job: Job) -> int:
    """What a teacher sees of every image: it is shown each at the largest count."""
    stage = job.config["stages"][0]
    return max(map(tokens_of, stage["counts"])) if stage.get("distillation") else 0


def difference(report: Mapping[str, Any], first: str, second: str, count: str) -> dict[str, Any]:
    """Accuracy of ``first`` minus that of ``second`` at ``count``, paired by seed."""
    one, other = (report["regimes"][name]["accuracy"][count]["values"] for name in (first, second))
    return spread_of([a - b for a, b in zip(one, other, strict=True)])
