"""A checkpoint folder rewritten in another layout: the released model's, or ours.

Tensors go from file to file, one file at a time, bit by bit; no model is built.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenflex.files import excerpt, read_json, settle_folder, sync_folder
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.generation import never_generate
from tokenflex.models.loading import read_config
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.models.ristretto import (
    MODEL_TYPE,
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


def convert(source: str | Path, target: str | Path, *, system_message: str | None = None) -> str:
    """Write a released checkpoint as a TokenFLEX checkpoint, or the reverse.

    Args:
        source: folder with a checkpoint; its config.json says of which layout.
        target: folder to write. It appears whole or not at all.
        system_message: as :func:`tokenflex.load_ristretto` takes it; from the released layout only.

    Returns:
        The layout that was written, "tokenflex" or "ristretto".

    Raises:
        FileNotFoundError: the source, or one of its files, is not there.
        FileExistsError: the target is.
        ValueError: the source is of neither layout, broken, or cannot be held by the other.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise FileNotFoundError(f"checkpoint folder {source} does not exist")
    if target.exists():
        raise FileExistsError(f"target folder {target} exists; name one that does not")
    config = read_json(source / "config.json", "checkpoint file")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    writers: dict[str, tuple[str, Callable[[Path], None]]] = {
        MODEL_TYPE: (
            TokenFlexConfig.model_type,
            lambda folder: _write_tokenflex(source, folder, system_message),
        ),
        TokenFlexConfig.model_type: (
            MODEL_TYPE,
            lambda folder: _write_ristretto(source, folder),
        ),
    }
    if model_type not in writers:
        raise ValueError(
            f"checkpoint file {source / 'config.json'} must have model_type 'ristretto' or "
            f"'tokenflex', got {excerpt(model_type)}"
        )
    if system_message is not None and model_type != MODEL_TYPE:
        raise ValueError(
            "system_message is for a source in the released layout, got one for a TokenFLEX source"
        )
    layout, write = writers[model_type]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        settle_folder(temporary)
        temporary.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return layout


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
    ours: dict[str, tuple[int, ...]] = {}
    _write_weights(source, target, ristretto_name, ours)
    check_fit(source, config, ours)
    text = json.dumps(released, indent=2, sort_keys=True) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    processor.tokenizer.save_pretrained(target)
    processor.image_processor.save_pretrained(target)
    generation_config(source, processor.tokenizer).save_pretrained(target)


def _write_weights(
    source: Path,
    target: Path,
    rename: Callable[[str], str],
    original_shapes: dict[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
    """Every tensor under its other name, in as many files; their new shapes and widest dtype.

    ``original_shapes`` is filled with the shapes under the old names.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes, size = set(), 0
    weight_map: dict[str, str] = {}
    files = weight_files(source)
    for number, file in enumerate(files, start=1):
        renamed: dict[str, Any] = {}
        for name, tensor in tensors(file):
            new = rename(name)
            if new in shapes:
                raise ValueError(f"checkpoint {source} holds two tensors of the name {new}")
            renamed[new], shapes[new] = tensor, tuple(tensor.shape)
            dtypes.add(tensor.dtype)
            size += tensor.numel() * tensor.element_size()
            if original_shapes is not None:
                original_shapes[name] = shapes[new]
        written = "model.safetensors"
        if len(files) > 1:
            written = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map.update(dict.fromkeys(renamed, written))
        save_file(renamed, target / written, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return shapes, widest_dtype(dtypes)
