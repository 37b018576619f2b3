"""``unseen.md``: accuracy at counts that were not trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.ablation.regimes import fewest_count
from experiments.ablation.results import spread_of
from experiments.ablation.suites import FEWEST, FINER, SPECIALISTS, UNSEEN
from experiments.ablation.tables import (
    accuracy_rows,
    asked_and_seeds,
    below_nearest,
    markdown_table,
    nearest_sentence,
    nearest_trained,
    points,
)

_SMALL = f"{SPECIALISTS[0]}-positions"
_BOUND = 0.05
"""Distance to the specialist for the small count that is asked for, as a share."""


def format_unseen(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""
    counts, unseen = report["counts"], report["unseen"]
    names = [name for name in (*UNSEEN, FINER) if name in report["regimes"]]
    head = ["trained with", *(f"at {count}" for count in counts)]
    beside = [
        "trained with",
        *(f"{count} (to {nearest_trained(report, count)})" for count in unseen),
    ]
    differences = [
        [
            report["regimes"][name]["title"],
            *(f"{100 * gain:+.1f}" for gain in below_nearest(report, name).values()),
        ]
        for name in names
    ]
    sections = [
        f"# Counts that were never trained, scale {report['scale']}",
        asked_and_seeds(report),
        "Every model draws the count of each training image. Positions are two settings, a "
        "position at the projector's output (`projector_position: normalized`) and one text "
        "position for all tokens of an image (`image_positions: shared`, which needs the first); "
        "other grids are 30 % of the images on grids that nobody is asked at.",
        "## At the counts that were trained",
        markdown_table(head, accuracy_rows(report, names, counts)),
        "## At others",
        markdown_table(
            ["trained with", *(f"at {count}" for count in unseen)],
            accuracy_rows(report, names, unseen),
        ),
        "Beside the trained count that has the most like tokens, in points (means over seeds):",
        markdown_table(beside, differences),
        "\n".join(f"- {nearest_sentence(report, name)}" for name in names),
        *_at_the_fewest(report),
    ]
    return "\n\n".join(sections) + "\n"


def _at_the_fewest(report: Mapping[str, Any]) -> list[str]:
    """Compare the specialists for fewer tokens than the small count with that for the small one.

    Returns:
        The parts of the section; none for a report without these specialists.
    """
    small, regimes = report["counts"][0], report["regimes"]
    fewest = str(fewest_count(int(small)))
    if fewest not in report["unseen"] or not {_SMALL, *FEWEST} <= {*regimes}:
        return []
    kinds = list(report["questions"])
    asked = [(_SMALL, small), ("positions-spread", small), *((name, fewest) for name in FEWEST)]
    rows = [
        [
            regimes[name]["title"],
            count,
            points(regimes[name]["accuracy"][count]),
            *(points(regimes[name]["accuracy_by_kind"][kind][count]) for kind in kinds),
        ]
        for name, count in asked
    ]
    return [
        f"## Fewer tokens than the small count: {fewest}",
        f"Whether {fewest} can be as good as {small} at all is what specialists tell, which are "
        f"trained at {fewest} alone. By kind of question:",
        markdown_table(["trained with", "asked at", "mean", *kinds], rows),
        "\n".join(f"- {_fewest_sentence(report, name, fewest)}" for name in FEWEST),
        _ceiling(report, fewest),
    ]


def _below_small(report: Mapping[str, Any], name: str, fewest: str) -> dict[str, Any]:
    """Return the accuracy of ``name`` at ``fewest`` minus that of the small count's specialist."""
    small = report["regimes"][_SMALL]["accuracy"][report["counts"][0]]["values"]
    values = report["regimes"][name]["accuracy"][fewest]["values"]
    return spread_of([a - b for a, b in zip(values, small, strict=True)])


def _fewest_sentence(report: Mapping[str, Any], name: str, fewest: str) -> str:
    gain = points(_below_small(report, name, fewest), signed=True)
    small = report["regimes"][_SMALL]["title"]
    return f"{report['regimes'][name]['title']}: {gain} points beside {small}, paired by seed."


def _ceiling(report: Mapping[str, Any], fewest: str) -> str:
    """Say whether a specialist reaches the small count's, and so whether one model could."""
    specialists = [name for name in FEWEST if name.startswith("fixed-")]
    best = max(specialists, key=lambda name: _below_small(report, name, fewest)["mean"])
    gain, title = _below_small(report, best, fewest)["mean"], report["regimes"][best]["title"]
    if gain >= -_BOUND:
        return (
            f"The best specialist ({title}) is within {100 * _BOUND:.0f} points: one model could "
            "be, too."
        )
    return (
        f"The best specialist ({title}) stays {-100 * gain:.1f} points below: at this size and "
        f"budget {fewest} is out of reach, for one model that never saw it as for one that did."
    )
