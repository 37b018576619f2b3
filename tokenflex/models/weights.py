"""Files of a checkpoint folder: its config, its tensors, and whether a model fits them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokenflex.files import excerpt, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.modeling import TokenFlexForConditionalGeneration

INDEX = "model.safetensors.index.json"


def read_config_values(path: Path, model_type: str, *parts: str) -> dict[str, Any]:
    """Read a config.json of a model type, which holds a config for each of its parts.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is another model's, or lacks a part.
    """
    values = read_json(path, "checkpoint file")
    given = values.get("model_type") if isinstance(values, dict) else None
    if given != model_type:
        raise ValueError(
            f"checkpoint file {path} must have model_type {model_type!r}, got {excerpt(given)}"
        )
    for part in parts:
        if not isinstance(values.get(part), dict):
            raise ValueError(
                f"checkpoint file {path} must hold {part}, got {excerpt(values.get(part))}"
            )
    config: dict[str, Any] = values
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors files, once each was opened to see that it is whole.

    Raises:
        FileNotFoundError: no file exists, or one that the index names is missing.
        ValueError: a file is cut off, or the index names files outside of the folder.
    """
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, "checkpoint file")
        files = [folder / name for name in _indexed(index, folder / INDEX)]
    if not files:
        raise FileNotFoundError(f"checkpoint folder {folder} holds no *.safetensors file")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"checkpoint file {file} does not exist")
        try:
            with safe_open(file, framework="pt"):
                pass  # opening checks the header and the length
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint file {file} cannot be read: {error}") from error
    return files


def _indexed(index: Any, path: Path) -> list[str]:
    """Return the files that an index names, each once.

    Their names must stay in the folder. Links are followed: in the hub's cache every file is a link
    that leads out of its folder.
    """
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError(
            f"checkpoint file {path} must hold a weight_map of names, got {excerpt(names)}"
        )
    for tensor, name in names.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or len(name) > 4096:
            raise ValueError(
                f"checkpoint file {path} must name a file in its folder for {excerpt(tensor)}, got "
                f"{excerpt(name)}"
            )
    return sorted(set(names.values()))


def tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of every tensor of a safetensors file, read one at a time."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no dict)
            yield name, opened.get_tensor(name)


def widest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the float type that holds every value of these; float32 for float16 with bfloat16."""
    return reduce(torch.promote_types, (dtype for dtype in dtypes if dtype.is_floating_point))


def _shapes_of_model(config: TokenFlexConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model, without allocating any."""
    with torch.device("meta"):
        model = TokenFlexForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def smaller_tensors(files: Iterable[Path], config: TokenFlexConfig) -> list[str]:
    """Return the names of saved tensors with fewer elements than a model of ``config`` gives them.

    With a wrong config transformers would allocate such tensors, however large, before it compares
    them. This function allocates nothing and reads no tensor. Tensors of a quantized model, which
    are saved packed, are not compared.
    """
    if getattr(config, "quantization_config", None) is not None:
        return []
    shapes = _shapes_of_model(config)
    smaller = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                saved = prod(opened.get_slice(name).get_shape())
                if name in shapes and saved < prod(shapes[name]):
                    smaller.append(name)
    return smaller


def check_fit(folder: Path, config: TokenFlexConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly those of a model of this config, by name and shape.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the first is named.
    """
    expected = _shapes_of_model(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = {
        "missing tensors": [name for name in expected if name not in shapes and name not in tied],
        "unexpected tensors": [name for name in shapes if name not in expected],
        "tensors of another shape": [
            f"{name}: {shapes[name]} where the config makes it {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"checkpoint {folder} has {len(names)} {problem}, the first is {names[0]}"
            )
