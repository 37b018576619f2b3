"""The model to serve, from a folder of any kind that holds one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.dropin.replace import from_pretrained
from tokenflex.files import checkpoint_folder, excerpt, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.loading import load_checkpoint
from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO


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
        model, processor = from_pretrained(folder)
        return model.eval(), processor
    raise ValueError(
        f"{folder} must hold a TokenFLEX checkpoint or a converted model, got model_type "
        f"{excerpt(kind)} with its stock projector: convert it first, with "
        "tokenflex.from_pretrained(...) and save_pretrained"
    )
