"""Results of an ablation's runs, over its seeds."""

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
    """Return mean, sample standard deviation (None for a single value), and the values."""
    mean = sum(values) / len(values)
    spread = None
    if len(values) > 1:
        spread = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {"mean": mean, "spread": spread, "values": [*values]}


def collect(
    scale: Scale, regimes: Collection[Regime], jobs: Sequence[Job], output: Path, machine: str
) -> dict[str, Any]:
    """Return ``report.json`` of an ablation whose jobs are all done.

    Returns:
        ``regimes``: rows by name, the starts first. A row has ``title``, ``is_start``, ``accuracy``
        (count -> :func:`spread_of` over seeds), ``accuracy_by_kind`` (kind -> count -> the same),
        ``trained_accuracy`` (on training canvases, if the runs were asked about them), ``steps``,
        ``views`` (images shown), ``vision_tokens`` (a teacher's included) and ``seconds`` of its
        own training, over seeds. Besides, ``scale``, ``task``, ``counts``, ``unseen``, ``seeds``,
        ``questions`` (number by kind), ``samples``, ``standard_error`` (the largest of any model at
        any count, from the questions alone) and ``machine``.
    """
    reports = {job.name: job.report(output) for job in jobs}
    starts = {regime.start.name: regime.start for regime in regimes}
    compared: list[Start | Regime] = [*starts.values(), *regimes]
    rows: dict[str, dict[str, Any]] = {
        row.name: {
            "title": row.title,
            "is_start": isinstance(row, Start),
            **_row([job for job in jobs if job.regime == row.name], reports, output),
        }
        for row in compared
    }
    first = next(iter(reports.values()))
    return {
        "scale": scale.name,
        "task": scale.task,
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


def _row(jobs: Sequence[Job], reports: Mapping[str, Any], output: Path) -> dict[str, Any]:
    of_jobs = [reports[job.name] for job in jobs]
    # The last stage belongs to the regime; a start also has the encoder's warm-up before it.
    stages = [report["stages"][-1] for report in of_jobs]
    shown = [job.steps * job.config["stages"][0]["batch_size"] for job in jobs]
    tokens = [
        views * (stage["tokens_per_image"] + _teacher_tokens(job))
        for views, stage, job in zip(shown, stages, jobs, strict=True)
    ]
    asked_again = [job.trained_accuracy(output) for job in jobs]
    again = [accuracy for accuracy in asked_again if accuracy is not None]
    return {
        "accuracy": _over_seeds([report["accuracy"] for report in of_jobs]),
        **({"trained_accuracy": _over_seeds(again)} if again else {}),
        "accuracy_by_kind": {
            kind: _over_seeds([report["accuracy_by_kind"][kind] for report in of_jobs])
            for kind in of_jobs[0]["accuracy_by_kind"]
        },
        "steps": jobs[0].steps,
        "views": shown[0],
        "vision_tokens": spread_of(tokens),
        "seconds": spread_of([stage["seconds"] for stage in stages]),
    }


def _over_seeds(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {count: spread_of([row[count] for row in rows]) for count in rows[0]}


def _teacher_tokens(job: Job) -> int:
    """Return the tokens of an image that a teacher sees, at the largest count."""
    stage = job.config["stages"][0]
    return max(map(tokens_of, stage["counts"])) if stage.get("distillation") else 0


def difference(
    report: Mapping[str, Any], first: str, second: str, count: str, of: str = "accuracy"
) -> dict[str, Any]:
    """Return the accuracy of ``first`` minus that of ``second`` at ``count``, paired by seed.

    ``of`` is "accuracy", or "trained_accuracy" for that on training canvases.
    """
    values, others = (report["regimes"][name][of][count]["values"] for name in (first, second))
    return spread_of([a - b for a, b in zip(values, others, strict=True)])
