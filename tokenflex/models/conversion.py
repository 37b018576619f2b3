"""Conversion of a checkpoint folder between the released model's layout and ours.

Tensors are copied from file to file, one file at a time, unchanged; no model is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenflex.files import checkpoint_folder, excerpt, new_folder, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.generation import never_generate
from tokenflex.models.loading import read_config
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO
from tokenflex.models.ristretto import (
    generation_config,
    read_ristretto_config,
    ristretto_config,
    ristretto_name,
    ristretto_processor,
    tokenflex_config,
    tokenflex_name,
)
from tokenflex.models.weights import (
    INDEX,
    check_fit,
    tensors,
    weight_files,
    widest_dtype,
)
from tokenflex.terminal import watched


def convert(source: str | Path, target: str | Path, *, system_message: str | None = None) -> str:
    """Write a released checkpoint as a TokenFLEX checkpoint, or the reverse.

    Args:
        source: folder with a checkpoint; its config.json tells the layout.
        target: folder to write. It appears whole or not at all.
        system_message: as :func:`tokenflex.load_ristretto` takes it; from the released layout only.

    Returns:
        The layout that was written, "tokenflex" or "ristretto".

    Raises:
        FileNotFoundError: the source, or one of its files, does not exist.
        FileExistsError: the target exists.
        ValueError: the source is of neither layout, broken, or the other layout cannot hold it.
    """
    source, target = checkpoint_folder(source), Path(target)
    if target.exists():
        raise FileExistsError(f"target folder {target} exists; name one that does not")
    config = read_json(source / "config.json", "checkpoint file")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in (RISTRETTO, TokenFlexConfig.model_type):
        raise ValueError(
            f"checkpoint file {source / 'config.json'} must have model_type 'ristretto' or "
            f"'tokenflex', got {excerpt(model_type)}"
        )
    if system_message is not None and model_type != RISTRETTO:
        raise ValueError(
            "system_message is for a source in the released layout, got one for a TokenFLEX source"
        )
    with new_folder(target) as folder:
        if model_type == RISTRETTO:
            _write_tokenflex(source, folder, system_message)
        else:
            _write_ristretto(source, folder)
    return TokenFlexConfig.model_type if model_type == RISTRETTO else RISTRETTO


def _write_tokenflex(source: Path, target: Path, system_message: str | None) -> None:
    released = read_ristretto_config(source)
    processor = ristretto_processor(source, released, system_message)
    shapes, dtype = _write_weights(source, target, tokenflex_name)
    config = tokenflex_config(released, processor.image_token_id, shapes)
    check_fit(source, config, shapes)
    config.dtype = dtype
    config.architectures = ["TokenFlexForConditionalGeneration"]
    config.save_pretrained(target)
    processor.save_pretrained(target)
    generation = generation_config(source, processor.tokenizer)
    never_generate(generation, processor.image_token_id)
    generation.save_pretrained(target)


def _write_ristretto(source: Path, target: Path) -> None:
    config = read_config(source / "config.json")
    try:
        processor = TokenFlexProcessor.from_pretrained(source)
    except Exception as error:  # tokenizers and templates raise their own kinds
        raise ValueError(f"processor in {source} cannot be loaded: {error}") from error
    released = ristretto_config(config, processor)
    shapes, _ = _write_weights(source, target, ristretto_name)
    check_fit(source, config, {tokenflex_name(name): shape for name, shape in shapes.items()})
    text = json.dumps(released, indent=2, sort_keys=True) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    processor.tokenizer.save_pretrained(target)
    processor.image_processor.save_pretrained(target)
    generation_config(source, processor.tokenizer).save_pretrained(target)


def _write_weights(
    source: Path, target: Path, rename: Callable[[str], str]
) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
    """Write every tensor under its other name, in as many files.

    Returns:
        The shapes by the new names, in the order of the files, and the widest dtype.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes, size = set(), 0
    weight_map: dict[str, str] = {}
    files = weight_files(source)
    shown = watched(files, "copying weights", len(files), unit="file")
    for number, file in enumerate(shown, start=1):
        renamed: dict[str, Any] = {}
        for name, tensor in tensors(file):
            new = rename(name)
            if new in shapes:
                raise ValueError(f"checkpoint {source} holds two tensors of the name {new}")
            renamed[new], shapes[new] = tensor, tuple(tensor.shape)
            dtypes.add(tensor.dtype)
            size += tensor.numel() * tensor.element_size()
        written = "model.safetensors"
        if len(files) > 1:
            written = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map.update(dict.fromkeys(renamed, written))
        save_file(renamed, target / written, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return shapes, widest_dtype(dtypes)
