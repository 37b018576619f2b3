"""The model of a playground, and the report of its accuracy, from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.files import checkpoint_folder, excerpt, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.loading import load_checkpoint
from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO

REPORT = "report.json"


def load_model(path: str | Path) -> tuple[Any, Any]:
    """Load a TokenFLEX checkpoint, a released Ristretto, or a saved conversion of a stock model.

    Args:
        path: The folder.

    Returns:
        (model, processor), the model in evaluation mode.

    Raises:
        FileNotFoundError: The folder or one of its files does not exist.
        ValueError: The folder holds another model, or a broken one.
    """
    folder = checkpoint_folder(path)
    values = read_json(folder / "config.json", "checkpoint file")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind in (TokenFlexConfig.model_type, RISTRETTO):
        return load_checkpoint(folder)
    if isinstance(values, dict) and isinstance(values.get("tokenflex"), dict):
        from tokenflex.dropin.replace import from_pretrained

        model, processor = from_pretrained(folder)
        return model.eval(), processor
    raise ValueError(
        f"{folder} must hold a TokenFLEX checkpoint or a converted model, got model_type "
        f"{excerpt(kind)} with its stock projector: convert it first, with "
        "tokenflex.from_pretrained(...) and save_pretrained"
    )


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
