"""Load a saved model and its processor, or say in one line what is wrong with the folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenflex.files import checkpoint_folder, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO
from tokenflex.models.ristretto import load_ristretto
from tokenflex.models.weights import read_config_values, smaller_tensors, weight_files

NEW_WITH_POSITION = ("model.projector.position.weight",)


def is_conversion(folder: Path) -> bool:
    """Return whether a folder holds a saved conversion of a stock model.

    Raises:
        FileNotFoundError: It has no config.json.
        ValueError: Its config.json is broken.
    """
    return is_conversion_config(read_json(folder / "config.json", "checkpoint file"))


def is_conversion_config(values: Any) -> bool:
    """Return whether the content of a ``config.json`` is that of a saved conversion."""
    return (
        isinstance(values, dict)
        and values.get("model_type") != TokenFlexConfig.model_type
        and isinstance(values.get("tokenflex"), dict)
    )


def load_checkpoint(
    path: str | Path, **changes: Any
) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """Load a model, in evaluation mode, and its processor.

    A released Ristretto checkpoint is read as :func:`tokenflex.load_ristretto` does.

    Args:
        path: the folder.
        **changes: values for fields of a TokenFLEX checkpoint's config, in place of the saved ones.
            With a ``projector_position`` that the checkpoint lacks, its term begins at zero.

    Raises:
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: a file is cut off, or the weights do not fit the config.
    """
    folder = checkpoint_folder(path)
    values = read_json(folder / "config.json", "checkpoint file")
    if isinstance(values, dict) and values.get("model_type") == RISTRETTO:
        return load_ristretto(folder)
    config = read_config(folder / "config.json")
    new = NEW_WITH_POSITION if config.projector_position is None else ()
    config.update(changes)
    for file in sorted(folder.glob("*.json")):
        read_json(file, "checkpoint file")  # transformers ignores a broken optional file
    files = weight_files(folder)
    try:
        too_small = smaller_tensors(files, config)
    except Exception as error:  # the parts of a model raise their own kinds
        reason = str(error).partition("\n")[0]  # PyTorch adds a traceback, line by line
        raise ValueError(
            f"checkpoint {folder} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    refuse_faults(folder, {"mismatched_keys": too_small})
    try:
        model, loading = TokenFlexForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        processor = TokenFlexProcessor.from_pretrained(folder)
    except Exception as error:  # tokenizers and templates raise their own kinds
        raise ValueError(
            f"checkpoint {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    refuse_faults(folder, loading, allowed=new)
    return model.eval(), processor


def refuse_faults(
    checkpoint: object, loading: Mapping[str, Iterable[Any]], allowed: Collection[str] = ()
) -> None:
    """Refuse faulty keys in transformers' loading information, except those ``allowed``."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in loading.get(problem, ()) if name not in allowed]
        if names:
            raise ValueError(
                f"checkpoint {checkpoint} has {len(names)} {problem.replace('_', ' ')}, "
                f"the first is {min(names)}"
            )


def check_length(config: Any, vision_tokens: int) -> None:
    """Refuse a prompt whose images alone exceed the positions of the language model.

    Raises:
        ValueError: ``vision_tokens`` exceeds the language model's positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and vision_tokens > positions:
        raise ValueError(
            f"vision tokens of a prompt must not exceed the language model's {positions} "
            f"positions, got {vision_tokens}"
        )


def read_config(path: Path) -> TokenFlexConfig:
    """Read a TokenFLEX config.json.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is another model's, or not valid.
    """
    values = read_config_values(path, TokenFlexConfig.model_type, "vision_config", "text_config")
    try:
        return TokenFlexConfig.from_dict(values)
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ValueError(f"checkpoint file {path} is no valid configuration: {error}") from error
