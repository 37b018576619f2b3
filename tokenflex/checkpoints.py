"""The model of a command, from a folder of any kind that holds one.

Converted models need a newer transformers than our own, so their room is imported for them alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.files import checkpoint_folder, excerpt, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.loading import is_conversion, load_checkpoint
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
    if is_conversion(folder):
        return _load_conversion(folder)
    values = read_json(folder / "config.json", "checkpoint file")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if isinstance(values, dict) and kind not in (TokenFlexConfig.model_type, RISTRETTO):
        from tokenflex.dropin.families import supported_families

        if kind in supported_families():
            raise ValueError(
                f"{folder} holds a stock {kind}: convert it first, with `tokenflex convert "
                f"{folder} OUT --images FOLDER`"
            )
        raise ValueError(
            f"{folder} must hold a TokenFLEX checkpoint, a released Ristretto or a conversion made "
            f"by `tokenflex convert`, got model_type {excerpt(kind)}"
        )
    return load_checkpoint(folder)


def _load_conversion(folder: Path) -> tuple[Any, Any]:
    from tokenflex.dropin.replace import from_pretrained

    for file in sorted(folder.glob("*.json")):
        read_json(file, "checkpoint file")  # transformers ignores a broken optional file
    try:
        model, processor = from_pretrained(folder)
    except Exception as error:  # weights, tokenizers and templates raise their own kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"conversion {folder} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    return model.eval(), processor
