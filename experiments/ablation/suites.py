"""Suites: the regimes that are compared with each other."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.ablation.regimes import BUDGETS, LONGER, SIZES, Regime, regimes
from experiments.ablation.scales import Scale

SPECIALISTS = tuple(f"fixed-{size}" for size in SIZES)
MAIN = (*SPECIALISTS, "stochastic")
ODDS = ("odds-5-3-2", "odds-1-1-1", "stochastic")
MIXING = ("stochastic", "per-step", "all-counts")
ANY_COUNT = ("positions", "positions-spread")
"""Regimes beyond the paper, for counts that were not trained."""

UNSEEN = (
    "stochastic",
    "stochastic-spread",
    "stochastic-projector",
    "stochastic-projector-spread",
    *ANY_COUNT,
)
SMALL_SPECIALIST = f"{SPECIALISTS[0]}-positions"
FEWEST_SPECIALISTS = ("fixed-fewest-positions", "fixed-fewest-positions-ready")
FINER = "positions-spread-finer"
"""Regime of the suite ``extremes``, at scales whose counts do not reach the encoder's grid."""
EXTREMES = (
    "positions-spread",
    FINER,
    "positions-spread-narrow",
    "positions-spread-fewest",
    "positions-spread-fewest-longer",
)
"""Regimes of one model for every count, the far ones too."""


@dataclass(frozen=True)
class Lever:
    """A measure that may bring one model up to three specialists.

    Attributes:
        title: Description in tables.
        general: Name of the model for all counts.
        specialists: Names of the models for the small, middle and large count; those of the larger
            counts may be missing.
    """

    title: str
    general: str
    specialists: tuple[str, ...]


def _changed(suffix: str) -> tuple[str, ...]:
    return tuple(f"{name}-{suffix}" for name in SPECIALISTS)


POSITIONED = _changed("positions")
LEVERS = (
    Lever("as in the paper", "stochastic", SPECIALISTS),
    Lever("positions, for both", "positions", POSITIONED),
    Lever("and odds 1:1:1", "odds-1-1-1-positions", POSITIONED),
    Lever("and odds 5:3:2", "odds-5-3-2-positions", POSITIONED),
    Lever("and KL to its answers at the largest count", "positions-distilled", POSITIONED),
    Lever(f"and {LONGER:g} x the steps, for the one", "positions-longer", POSITIONED),
    Lever(
        f"and {LONGER:g} x the steps, for both",
        "positions-longer",
        _changed("positions-longer")[:2],
    ),
    Lever("and twice as wide, for both", "positions-wide", _changed("positions-wide")[:2]),
    Lever(
        "positions; specialists aligned at their own count",
        "positions",
        tuple(f"{name}-own-start" for name in POSITIONED[:2]),
    ),
)

SUITES: dict[str, tuple[str, ...]] = {
    "paper": (*SPECIALISTS, *dict.fromkeys((*reversed(ODDS), *MIXING, *ANY_COUNT))),
    "gap": tuple(
        dict.fromkeys(name for lever in LEVERS for name in (lever.general, *lever.specialists))
    ),
    "unseen": UNSEEN,
    "extremes": (SMALL_SPECIALIST, *FEWEST_SPECIALISTS, *EXTREMES),
    # Steps of one budget after those of another, so that an unfinished ablation has whole ones.
    "limited": tuple(
        f"{name}-{budget.name}" for budget in BUDGETS for name in (*MAIN, *POSITIONED, "positions")
    ),
}
"""Names of each suite's regimes, in the order of the runs."""


def regimes_of(suite: str, scale: Scale) -> list[Regime]:
    """Return the regimes of a suite at ``scale``.

    Raises:
        ValueError: The suite is unknown.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    known = regimes(scale)
    names = (scale.regimes if suite == scale.suite else ()) or SUITES[suite]
    return [known[name] for name in names if name != FINER or name in known]
