"""What is compared: ways to choose the vision-token count while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

PAPER_ODDS = (0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Regime:
    """One way to train, as what it changes; all else is the same for all.

    Attributes:
        name: of its folders, and in ``report.json``.
        title: in tables and figures.
        stage: keys of the stage (:class:`tokenflex.training.config.StageConfig`).
        model: keys of the model (:class:`tokenflex.training.config.ModelConfig`).
        start_model: those of them that its start has too; regimes of the same share a start.
    """

    name: str
    title: str
    stage: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    start_model: Mapping[str, Any] = field(default_factory=dict)


MAIN = ("fixed-small", "fixed-middle", "fixed-large", "stochastic")
ODDS = ("odds-5-3-2", "odds-1-1-1", "stochastic")
MIXING = ("stochastic", "per-step", "all-counts")
ANY_COUNT = ("positions", "positions-spread")
"""Made to answer at counts that they never trained with; not of the paper."""

POSITIONS = {"projector_position": "normalized", "image_positions": "shared"}
SPREAD = 0.3  # of the images, over grids that no model is asked at


def regimes(counts: tuple[int, int, int]) -> dict[str, Regime]:
    """By name, those of the paper and two of others, at the small, middle and large count."""
    fixed = [
        Regime(f"fixed-{size}", f"fixed {count}", {"counts": [count], "weights": [1.0]})
        for size, count in zip(("small", "middle", "large"), counts, strict=True)
    ]

    def mixed(name: str, title: str, weights: tuple[float, ...], **stage: Any) -> Regime:
        return Regime(name, title, {"counts": [*counts], "weights": [*weights], **stage})

    several = [
        mixed("stochastic", "stochastic 2:3:5", PAPER_ODDS),
        mixed("odds-1-1-1", "stochastic 1:1:1", (1.0, 1.0, 1.0)),
        mixed("odds-5-3-2", "stochastic 5:3:2", (0.5, 0.3, 0.2)),
        # One count for all of a batch: what MQT does on each rank, and the released code asserts.
        mixed("per-step", "one count a step, 2:3:5", PAPER_ODDS, draw="step"),
        # Every image at every count: what M3 does.
        mixed("all-counts", "every image at all counts", (1.0, 1.0, 1.0), draw="all"),
    ]
    grids = other_grids(counts)
    spread = {
        "counts": [*counts, *map(list, grids)],
        "weights": [
            *((1 - SPREAD) * odds for odds in PAPER_ODDS),
            *[SPREAD / len(grids)] * len(grids),
        ],
    }
    any_count = [
        replace(several[0], name="positions", title="2:3:5, positions", model=POSITIONS),
        Regime("positions-spread", "2:3:5, positions, other grids", spread, POSITIONS),
    ]
    return {one.name: one for one in [*fixed, *several, *any_count]}


def other_grids(counts: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Eight grids around the trained squares, none of which a scale asks at.

    For 4, 9 and 16: 1 x 2, 2 x 5, 3 x 5 and 4 x 5, each also on its side.
    """
    small, middle, large = map(isqrt, counts)
    pairs = [(small - 1, small), *((side, large + 1) for side in (small, middle, large))]
    return [grid for height, width in pairs for grid in ((height, width), (width, height))]
