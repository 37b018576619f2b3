"""An ablation of a few steps on a model of a few weights, and a report that was made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.ablation.regimes import regimes
from experiments.ablation.results import spread_of
from experiments.ablation.scales import LARGE, SMALL
from experiments.ablation.suites import SUITES

TINY = replace(
    SMALL,
    name="tiny",
    unseen=(1, (2, 3)),
    width=16,
    layers=1,
    heads=2,
    warm_up_steps=2,
    warm_up_batch=2,
    start_steps=3,
    steps=40,
    batch_size=3,
    evaluated=6,
    seeds=1,
    regimes=("fixed-large", "all-counts"),
)
TINY_LARGE = replace(
    LARGE,
    width=16,
    layers=1,
    heads=2,
    warm_up_steps=2,
    warm_up_batch=2,
    start_steps=2,
    steps=2,
    batch_size=3,
    evaluated=4,
    regimes=("stochastic",),
)

COUNTS = ("4", "9", "16")
UNSEEN = ("25", "2x3")
# At 4, 9, 16, 25 and 2x3: how a fixed and a stochastic model would look.
CURVES = {
    "start": (0.2, 0.3, 0.9, 0.4, 0.2),
    "fixed-small": (0.85, 0.5, 0.55, 0.3, 0.4),
    "fixed-middle": (0.45, 0.93, 0.6, 0.3, 0.4),
    "fixed-large": (0.25, 0.3, 0.99, 0.4, 0.3),
    "stochastic": (0.8, 0.9, 0.995, 0.6, 0.7),
    "odds-1-1-1": (0.82, 0.88, 0.96, 0.6, 0.7),
    "odds-5-3-2": (0.84, 0.86, 0.94, 0.6, 0.7),
    "per-step": (0.79, 0.85, 0.97, 0.6, 0.7),
    "all-counts": (0.78, 0.85, 0.95, 0.6, 0.7),
    "positions": (0.83, 0.91, 0.97, 0.9, 0.86),
    "positions-spread": (0.84, 0.9, 0.96, 0.95, 0.75),
}
OTHERS = {
    **dict.fromkeys(
        (*SUITES["gap"], *SUITES["unseen"], *SUITES["extremes"]), (0.7, 0.8, 0.9, 0.5, 0.5)
    ),
    **{name: (0.86, 0.92, 0.99, 0.5, 0.5) for name in SUITES["gap"] if "fixed" in name},
}


def canned_report(*, seeds: int = 3, names: tuple[str, ...] = tuple(CURVES)) -> dict[str, Any]:
    """As ``report.json`` of a whole ablation; seeds differ by a point from each other."""
    titles = {name: one.title for name, one in regimes(SMALL).items()}
    curves = {**OTHERS, **CURVES}
    for name in SUITES["limited"]:
        general = name.startswith(("stochastic", "positions"))
        curves[name] = CURVES["stochastic"] if general else (0.85, 0.93, 0.99, 0.5, 0.5)

    def row(name: str, shift: float = 0.0) -> dict[str, Any]:
        return {
            count: spread_of([value + shift + 0.01 * seed for seed in range(seeds)])
            for count, value in zip((*COUNTS, *UNSEEN), curves[name], strict=True)
        }

    return {
        "scale": "small",
        "counts": [*COUNTS],
        "unseen": [*UNSEEN],
        "seeds": [*range(seeds)],
        "start": {"warm_up_steps": 300, "steps": 600},
        "batch_size": 18,
        "questions": {"colour": 30, "odd": 31, "read": 39},
        "samples": 20,
        "standard_error": 0.0042,
        "machine": "2 runs at once on 2 CPU cores, one thread each",
        "regimes": {
            name: {
                "title": titles.get(name, "the start"),
                "is_start": name == "start",
                "accuracy": row(name),
                **({"trained_accuracy": row(name, 0.05)} if name in SUITES["limited"] else {}),
                "accuracy_by_kind": {
                    "colour": row(name),
                    "odd": row(name, 0.005),
                    "read": row(name, -0.2),
                },
                "steps": 600 if name == "start" else 1000,
                "views": 10800 if name == "start" else 18000,
                "vision_tokens": spread_of(
                    [18000.0 * (4 if name == "fixed-small" else 16)] * seeds
                ),
                "seconds": spread_of([60.0 + seed for seed in range(seeds)]),
            }
            for name in names
        },
    }
