"""Load a saved model and its processor, or say in one line what is wrong with the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.files import excerpt, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO
from tokenflex.models.ristretto import load_ristretto
from tokenflex.models.weights import smaller_tensors, weight_files

NEW_WITH_POSITION = ("model.projector.position.weight",)


def load_checkpoint(
    path: str | Path, **changes: Any
) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """The model, in evaluation mode, and the processor saved in ``path``.

    A released Ristretto checkpoint is read as :func:`tokenflex.load_ristretto` does.

    Args:
        path: the folder.
        changes: values for fields of a TokenFLEX checkpoint's config, in place of the saved ones.
            With a ``projector_position`` that the checkpoint lacks, its term begins at zero.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        ValueError: a file is cut off, or the weights do not fit the config.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist")
    if _model_type(folder / "config.json") == RISTRETTO:
        return load_ristretto(folder)
    config = read_config(folder / "config.json")
    new = NEW_WITH_POSITION if config.projector_position is None else ()
    config.update(changes)
    for file in sorted(folder.glob("*.json")):
        read_json(file, "checkpoint file")  # a broken optional file would be passed over in silence
    files = weight_files(folder)
    try:
        too_small = smaller_tensors(files, config)
    except Exception as error:  # the parts of a model raise their own kinds
        reason = str(error).partition("\n")[0]  # PyTorch adds where it happened, line by line
        raise ValueError(
            f"checkpoint {folder} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    _refuse_keys(folder, "mismatched_keys", too_small)
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
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _refuse_keys(folder, problem, [str(n) for n in loading[problem] if n not in new])
    return model.eval(), processor


def _refuse_keys(folder: Path, problem: str, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"checkpoint {folder} has {len(names)} {problem.replace('_', ' ')}, "
            f"the first is {min(names)}"
        )


def check_length(config: TokenFlexConfig, vision_tokens: int) -> None:
    """Refuse a prompt whose images alone are longer than what the language model was made for.

    Raises:
        ValueError: ``vision_tokens`` exceeds the language model's positions.
    """
    positions = getattr(config.text_config, "max_position_embeddings", None)
    if positions is not None and vision_tokens > positions:
        raise ValueError(
            f"vision tokens of a prompt must not exceed the language model's {positions} "
            f"positions, got {vision_tokens}"
        )


def _model_type(path: Path) -> Any:
    values = read_json(path, "checkpoint file")
    return values.get("model_type") if isinstance(values, dict) else None


def read_config(path: Path) -> TokenFlexConfig:
    """A TokenFLEX config.json.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another model's, or not valid.
    """
    model_type = _model_type(path)
    values = read_json(path, "checkpoint file")
    if model_type != TokenFlexConfig.model_type:
        raise ValueError(
            f"checkpoint file {path} must have model_type 'tokenflex', got {excerpt(model_type)}"
        )
    for part in ("vision_config", "text_config"):
        if not isinstance(values.get(part), dict):
            given = excerpt(values.get(part))
            raise ValueError(f"checkpoint file {path} must hold {part}, got {given}")
    try:
        return TokenFlexConfig.from_dict(values)
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ValueError(f"checkpoint file {path} is no valid configuration: {error}") from error
