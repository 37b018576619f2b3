"""Study of the router of ``tokenflex route``: the curve of all selectors, and the calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflex.cli import route
from tokenflex.cli.parser import CommandLine

if TYPE_CHECKING:
    from tokenflex.routing.grading import Grades
    from tokenflex.routing.router import Router


def add_to(commands: CommandLine) -> None:
    """Add the study to ``tokenflex route``."""
    route.study = _study


def _study(grades: Grades, router: Router) -> tuple[dict[str, Any], Callable[[Path], str]]:
    from experiments.routing.curve import as_rows, format_curve, selection_curve
    from experiments.routing.figures import plot_selection
    from experiments.routing.reliability import format_calibration, summary
    from tokenflex.routing.storage import CURVE

    points = selection_curve(grades, router)
    calibration = summary(router, grades)

    def draw(folder: Path) -> str:
        plot_selection(points, folder / CURVE)
        return f"{format_curve(points)}\n{format_calibration(calibration)}"

    return {"curve": as_rows(points), "calibration": calibration}, draw
