"""The model of a command, from a folder of any kind that holds one, or from the Hugging Face Hub.

Converted models need a newer transformers than our own, so their room is imported for them alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.files import excerpt, read_json
from tokenflex.hub import checkpoint_config, local_checkpoint
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.loading import is_conversion_config, load_checkpoint
from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO
from tokenflex.terminal import working


def load_model(path: str | Path) -> tuple[Any, Any]:
    """Load a TokenFLEX checkpoint, a released Ristretto, or a saved conversion of a stock model.

    Args:
        path: The folder, or ``org/name`` on the Hugging Face Hub.

    Returns:
        (model, processor), the model in evaluation mode.

    Raises:
        FileNotFoundError: The folder or one of its files does not exist, or the Hub has none.
        ValueError: The folder holds another model, or a broken one.
    """
    values = checkpoint_config(path)
    if is_conversion_config(values):
        folder = local_checkpoint(path)
        with working(f"loading {path}"):
            return _load_conversion(folder)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if isinstance(values, dict) and kind not in (TokenFlexConfig.model_type, RISTRETTO):
        from tokenflex.dropin.families import supported_families

        if kind in supported_families():
            raise ValueError(
                f"{path} holds a stock {kind}: convert it first, with `tokenflex convert "
                f"{path} OUT --images FOLDER`"
            )
        raise ValueError(
            f"{path} must hold a TokenFLEX checkpoint, a released Ristretto or a conversion made "
            f"by `tokenflex convert`, got model_type {excerpt(kind)}"
        )
    folder = local_checkpoint(path)
    with working(f"loading {path}"):
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
