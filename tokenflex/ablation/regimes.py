"""What is compared: ways to choose the vision-token count while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PAPER_ODDS = (0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Regime:
    """One way to train, as what it changes; all else is the same for all.

    Attributes:
        name: of its folders, and in ``report.json``.
        title: in tables and figures.
        stage: keys of the stage (:class:`tokenflex.training.config.StageConfig`).
        model: keys of the model (:class:`tokenflex.training.config.ModelConfig`); regimes that
            change the same share a start.
    """

    name: str
    title: str
    stage: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)


MAIN = ("fixed-small", "fixed-middle", "fixed-large", "stochastic")
ODDS = ("odds-5-3-2", "odds-1-1-1", "stochastic")
MIXING = ("stochastic", "per-step", "all-counts")


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
    return {one.name: one for one in [*fixed, *several]}
