"""The report of a checkpoint's accuracy, and its curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.files import read_json

REPORT = "report.json"


def find_report(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return the report of a checkpoint's accuracy; None if there is none.

    ``tokenflex train`` writes it beside the checkpoint, ``tokenflex evaluate --output`` also into
    its folder.
    """
    folder = Path(checkpoint).resolve()
    for path in (folder / REPORT, folder.parent / REPORT):
        if path.is_file():
            try:
                report = read_json(path, "report")
            except (OSError, ValueError):
                continue
            if isinstance(report, dict) and isinstance(report.get("accuracy"), dict):
                return report
    return None


def draw_accuracy(checkpoint: str | Path, folder: Path) -> Path | None:
    """Draw the accuracy curve of a checkpoint's report.

    Args:
        checkpoint: The folder that holds the model.
        folder: Folder of the picture.

    Returns:
        The PNG file; None if there is no report, or one that holds no accuracy by count.
    """
    report = find_report(checkpoint)
    if report is None:
        return None
    from tokenflex.plots import plot_accuracy

    path = folder / "accuracy.png"
    try:
        plot_accuracy(report, path)
    except ValueError:  # another program's report
        return None
    return path
