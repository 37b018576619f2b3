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


T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t below which 97.5 % lie, for 1, 2, ... 20 degrees of freedom. More take the last."""
PLACES = ("ahead", "undecided", "behind")
SHOWN = 0.0005
"""Largest difference of accuracies that is shown as 0."""


def half_width(spread: Mapping[str, Any]) -> float | None:
    """Return the half width of the 95 % confidence interval of a mean, by Student's t.

    Of differences that are paired by seed it is the interval of the paired t test, with a degree of
    freedom less than seeds.

    Args:
        spread: What :func:`spread_of` returns.

    Returns:
        None for a single value.
    """
    if spread["spread"] is None:
        return None
    number = len(spread["values"])
    quantile = T_QUANTILES[min(number - 1, len(T_QUANTILES)) - 1]
    return float(quantile * spread["spread"] / sqrt(number))


def place(gain: Mapping[str, Any]) -> str:
    """Return "ahead" or "behind" where :func:`half_width` leaves out 0, otherwise "undecided".

    A single value decides nothing, and what is shown as 0 is neither.
    """
    half = half_width(gain)
    if half is None or abs(gain["mean"]) <= max(half, SHOWN):
        return "undecided"
    return "ahead" if gain["mean"] > 0 else "behind"


def places_of(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Return gains by count in words: ``"ahead at 4 (+5.4), 9 (+4.9); undecided at 16 (-2.6)"``."""
    words: dict[str, list[str]] = {word: [] for word in PLACES}
    for count, gain in gains.items():
        words[place(gain)].append(f"{count} ({100 * gain['mean']:+.1f})")
    return "; ".join(f"{word} at {', '.join(at)}" for word, at in words.items() if at)


PLACES_EXPLAINED = (
    "*Ahead* and *behind* are means over seeds whose 95 % confidence interval (paired t test, a "
    "degree of freedom less than seeds) leaves out 0; all others are *undecided*. Each interval is "
    "alone at 95 %: of 20 differences that are 0, about one is called ahead or behind."
)


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
