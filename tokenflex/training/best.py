"""The best model of a run, by its evaluations during training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tokenflex.files import read_json
from tokenflex.training.checkpoint import RECORD
from tokenflex.training.config import EvaluationConfig


def best_record(
    settings: EvaluationConfig, position: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
    """Return what a report says of its best model: where in the run, by what, how good."""
    metric = settings.keep_best
    assert metric is not None
    return {**position, "metric": metric, "value": _mean(report[metric])}


def is_better(
    settings: EvaluationConfig, report: dict[str, Any], best: dict[str, Any] | None
) -> bool:
    """Return whether an evaluation is better than the best one before; False without keep_best."""
    metric = settings.keep_best
    if metric is None:
        return False
    value = _mean(report[metric])
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    return bool(value > best["value"] if metric == "accuracy" else value < best["value"])


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def compared(settings: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that two evaluations must share to be compared."""
    shared: dict[str, Any] = settings.model_dump(
        mode="json", include={"data", "counts", "samples", "keep_best"}
    )
    return shared


def read_best(
    folder: Path, settings: EvaluationConfig, place: tuple[int, int]
) -> dict[str, Any] | None:
    """Return the record of the best model that a run has saved up to a place.

    None if there is none, if other evaluations chose it, or if it was saved after the place: a run
    that continues before comes to that step once more.

    Args:
        folder: The folder of the best model.
        settings: The evaluations of the run that continues.
        place: Its stage, and its step in the stage.
    """
    try:
        saved = read_json(folder / RECORD)
        best = saved["best"]
        if saved["evaluation"] != compared(settings) or (best["stage"], best["step"]) > place:
            return None
        if not isinstance(best["value"], float):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(best)


def in_words(best: dict[str, Any]) -> str:
    """Return a sentence that says which weights of a run are its best."""
    return (
        f"These are the weights after step {best['global_step']} of the run (step {best['step']} "
        f"of stage {best['stage_name']!r}), the best of its evaluations by {best['metric']}: "
        f"{best['value']:.4g}, the mean over counts."
    )
