"""Weight files of a checkpoint folder: which tensors there are, and whether a model fits them."""

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

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, each opened once to see that it is whole.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
        ValueError: a file is cut off, or the index is not one of files in the folder.
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
    """The files that an index names, each once.

    Their names must stay in the folder. What they are links to is not looked at: in the hub's cache
    every file is a link that leads out of its folder.
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
    """Name and value of every tensor of a safetensors file, read one at a time."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no dict)
            yield name, opened.get_tensor(name)


def widest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The float type that holds every value of these; float32 for float16 with bfloat16."""
    return reduce(torch.promote_types, (dtype for dtype in dtypes if dtype.is_floating_point))


def smaller_tensors(files: Iterable[Path], config: TokenFlexConfig) -> list[str]:
    """Return the names of saved tensors with fewer elements than a model of ``config`` gives them.

    Of a wrong config transformers would allocate such tensors, however large, before it compares
    them. Here nothing is allocated and no tensor is read.

    Args:
        files: safetensors files of the checkpoint.
        config: of the model. Of a quantized one no tensors are compared: they are saved packed.
    """
    if getattr(config, "quantization_config", None) is not None:
        return []
    elements = {
        name: tensor.numel() for name, tensor in _model_without_memory(config).state_dict().items()
    }
    smaller = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if prod(opened.get_slice(name).get_shape()) < elements.get(name, 0):
                    smaller.append(name)
    return smaller


def _model_without_memory(config: TokenFlexConfig) -> Any:
    """Return a model on the meta device, whose tensors have shapes alone."""
    from tokenflex.models.modeling import TokenFlexForConditionalGeneration

    with torch.device("meta"):
        return TokenFlexForConditionalGeneration(config)


def check_fit(folder: Path, config: TokenFlexConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly those of a model of this config.

    Args:
        folder: where they come from, for errors.
        config: of the model.
        shapes: name in our model -> shape.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the first is named.
    """
    model = _model_without_memory(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
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
