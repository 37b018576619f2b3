"""``extremes.md``: accuracy at one token and at a token for each patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.ablation.regimes import fewest_count
from experiments.ablation.results import difference, spread_of
from experiments.ablation.suites import EXTREMES, FEWEST_SPECIALISTS, FINER, SMALL_SPECIALIST
from experiments.ablation.tables import (
    accuracy_rows,
    asked_and_seeds,
    beside_nearest,
    markdown_table,
    points,
)

_BOUND = 0.05
"""Distance to the specialist for the small count that is asked for, as a share."""


def format_extremes(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""
    counts = [*report["counts"], *report["unseen"]]
    models = [name for name in EXTREMES if name in report["regimes"]]
    trained_too = "" if FINER not in models else ", or at grids that reach the encoder's"
    sections = [
        f"# Counts far from the trained ones, scale {report['scale']}",
        asked_and_seeds(report),
        "Every model has positions (`projector_position: normalized`, `image_positions: shared`). "
        "Those of *other grids* draw the count of each training image, 30 % of them on grids that "
        "nobody is asked at; each row after the first changes one thing, the odds of images at "
        f"fewer tokens{trained_too}, or the number of steps.",
        markdown_table(
            ["trained with", *(f"at {count}" for count in counts)],
            accuracy_rows(report, models, counts),
        ),
        *beside_nearest(report, models),
        *_at_the_fewest(report),
    ]
    return "\n\n".join(sections) + "\n"


def _at_the_fewest(report: Mapping[str, Any]) -> list[str]:
    """Compare the specialists for the fewest tokens with that for the small count.

    Returns:
        The parts of the section; none if the report's models were not asked there.
    """
    small, regimes = report["counts"][0], report["regimes"]
    fewest = str(fewest_count(int(small)))
    if fewest not in report["unseen"]:
        return []
    models = [name for name in EXTREMES if name in regimes and name != FINER]
    kinds = list(report["questions"])
    asked = [
        (SMALL_SPECIALIST, small),
        ("positions-spread", small),
        *((name, fewest) for name in (*FEWEST_SPECIALISTS, *models)),
    ]
    rows = [
        [
            regimes[name]["title"],
            count,
            points(regimes[name]["accuracy"][count]),
            *(points(regimes[name]["accuracy_by_kind"][kind][count]) for kind in kinds),
        ]
        for name, count in asked
    ]
    differences = [
        f"- {regimes[name]['title']}: {points(_below_small(report, name, fewest), signed=True)} "
        f"points beside {regimes[SMALL_SPECIALIST]['title']}, paired by seed."
        for name in (*FEWEST_SPECIALISTS, *models)
    ]
    return [
        f"## Fewer tokens than the small count: {fewest}",
        f"Specialists, which are trained at {fewest} alone, tell what {fewest} can reach. By kind "
        "of question:",
        markdown_table(["trained with", "asked at", "mean", *kinds], rows),
        "\n".join(differences),
        _ceiling(report, fewest),
    ]


def _below_small(report: Mapping[str, Any], name: str, fewest: str) -> dict[str, Any]:
    """Return the accuracy of ``name`` at ``fewest`` minus that of the small count's specialist."""
    small = report["regimes"][SMALL_SPECIALIST]["accuracy"][report["counts"][0]]["values"]
    values = report["regimes"][name]["accuracy"][fewest]["values"]
    return spread_of([a - b for a, b in zip(values, small, strict=True)])


def _ceiling(report: Mapping[str, Any], fewest: str) -> str:
    """Say what the best specialist reaches, and how near to it one model is."""
    title = {name: report["regimes"][name]["title"] for name in report["regimes"]}
    best = max(
        FEWEST_SPECIALISTS, key=lambda name: report["regimes"][name]["accuracy"][fewest]["mean"]
    )
    model = max(
        (name for name in EXTREMES if name in title and name != FINER),
        key=lambda name: report["regimes"][name]["accuracy"][fewest]["mean"],
    )
    below = -_below_small(report, best, fewest)["mean"]
    reached = (
        f"The best specialist ({title[best]}) is within {100 * _BOUND:.0f} points"
        if below <= _BOUND
        else f"The best specialist ({title[best]}) stays {100 * below:.1f} points below: at this "
        f"size and budget {fewest} does not reach what {report['counts'][0]} does"
    )
    gain = points(difference(report, model, best, fewest), signed=True)
    return f"{reached}. The best of the models for every count ({title[model]}): {gain} beside it."
