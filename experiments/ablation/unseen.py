"""``unseen.md``: accuracy at counts that were not trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.ablation.suites import UNSEEN
from experiments.ablation.tables import (
    accuracy_rows,
    asked_and_seeds,
    beside_nearest,
    markdown_table,
)


def format_unseen(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""
    counts, unseen = report["counts"], report["unseen"]
    names = [name for name in UNSEEN if name in report["regimes"]]
    head = ["trained with", *(f"at {count}" for count in counts)]
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
        *beside_nearest(report, names),
    ]
    return "\n\n".join(sections) + "\n"
