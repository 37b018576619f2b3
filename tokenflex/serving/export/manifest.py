"""``manifest.json``: what a program without PyTorch must know of the graphs and their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.image_utils import PILImageResampling

from tokenflex.counts import Grid
from tokenflex.dropin.variants import is_converted
from tokenflex.models.vision import blank_tile
from tokenflex.serving.export.parts import Part, count_name

MANIFEST = "manifest.json"


def tile_size(model: Any, processor: Any) -> Grid:
    """Return the (height, width) in pixels of what the encoder reads.

    Raises:
        ValueError: neither the processor nor the encoder has one size.
    """
    if not is_converted(model):
        size: Grid | None = processor._configured_size({})
        if size is not None:
            return size
    vision_config = model.config.vision_config
    if getattr(vision_config, "image_size", None) is None:
        raise ValueError(
            f"the vision encoder of {model.config.model_type} cannot be a graph of pixels of one "
            "size: its config has no image_size"
        )
    if is_converted(model):
        size_of_config = vision_config.image_size
        height, width = [size_of_config] * 2 if isinstance(size_of_config, int) else size_of_config
        return int(height), int(width)
    tile, _ = blank_tile(model.model.vision_model, vision_config)
    return int(tile.shape[-2]), int(tile.shape[-1])


def preprocessing(processor: Any, size: Grid) -> dict[str, Any]:
    """Return what makes a picture the encoder's input.

    A picture becomes RGB, is resized to ``resize`` with the filter ``resample``, cut to
    ``center_crop`` if that is not null, multiplied by ``rescale``, and normalised by ``mean`` and
    ``std``: [3, height, width] in that order of colours.
    """
    images = processor.image_processor
    resize = dict(getattr(images, "size", None) or {})
    crops = bool(getattr(images, "do_center_crop", False))
    normalizes = bool(getattr(images, "do_normalize", True))
    rescales = bool(getattr(images, "do_rescale", True))
    resample = getattr(images, "resample", None)
    if isinstance(resample, int):  # Pillow's number, in place of a name
        resample = PILImageResampling(resample).name.lower()
    if isinstance(resample, int):  # a name, or Pillow's number
        resample = PILImageResampling(resample).name.lower()
    return {
        "size": list(size),
        "resize": {name: value for name, value in resize.items() if value is not None},
        "resample": resample,
        "center_crop": dict(images.crop_size) if crops else None,
        "rescale": float(images.rescale_factor) if rescales else 1.0,
        "mean": [float(x) for x in images.image_mean] if normalizes else [0.0] * 3,
        "std": [float(x) for x in images.image_std] if normalizes else [1.0] * 3,
    }


def describe_part(part: Part, file: str, error: float) -> dict[str, Any]:
    """Return the entry of a graph: its file, the shapes of its inputs and outputs, its error."""
    return {
        "file": file,
        "inputs": {name: list(shape) for name, shape in part.inputs.items()},
        "outputs": {name: list(shape) for name, shape in part.outputs.items()},
        "max_error": error,
    }


def describe_model(model: Any, processor: Any, size: Grid) -> dict[str, Any]:
    """Return preprocessing, tokens and positions of a model."""
    eos = model.generation_config.eos_token_id
    tokenizer = processor.tokenizer
    entries: dict[str, Any] = {
        "model_type": model.config.model_type,
        "dtype": "float32",
        "preprocess": preprocessing(processor, size),
        "tokens": {
            "image": model.config.image_token_id,
            "eos": eos if isinstance(eos, list) else [eos] * (eos is not None),
            "pad": tokenizer.pad_token_id,
        },
        "image_positions": getattr(model.config, "image_positions", "sequential"),
    }
    if not is_converted(model):
        entries["prompt"] = {
            "image_token": processor.image_token,
            "image_start": processor.image_start,
            "image_end": processor.image_end,
        }
        entries["tiles"] = {
            "min": processor.min_tiles,
            "max": processor.max_tiles,
            "thumbnail": processor.use_thumbnail,
        }
    return entries


def describe_graphs(
    target: str, graphs: Mapping[str, tuple[Part, dict[str, Any]]]
) -> dict[str, Any]:
    """Return the manifest's entries of all graphs; projectors by their counts."""
    return {
        "target": target,
        "graphs": {name: entry for name, (part, entry) in graphs.items() if part.count is None},
        "projectors": {
            count_name(part.count): entry
            for part, entry in graphs.values()
            if part.count is not None
        },
    }
