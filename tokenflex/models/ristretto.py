"""The released checkpoint, LiAutoAD/Ristretto-3B: its config, its names, its way with images.

What is known of its layout (its public configuration, modelling code and callers) stands here and
nowhere else: to read it as a TokenFLEX model, and to write one in that layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    SiglipImageProcessorPil,
)
from transformers.image_utils import PILImageResampling

from tokenflex.files import excerpt, read_json
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.generation import never_generate
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.models.weights import check_fit, tensors, weight_files, widest_dtype

MODEL_TYPE = "ristretto"
TRAINED_COUNTS = (64, 144, 256)
IMAGE_TOKEN, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
LANGUAGE_MODELS = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}

# The release's names -> ours. The first that fits is taken: newer releases of transformers save the
# encoder without the second "vision_model.".
_NAMES = {
    "vision_model.vision_model.": "model.vision_model.",
    "vision_model.": "model.vision_model.",
    "projector.mlp.layernorm.": "model.projector.layernorm.",
    "projector.mlp.f1.": "model.projector.gate.",
    "projector.mlp.f2.": "model.projector.up.",
    "projector.mlp.g.": "model.projector.down.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
# What the release's config says of images, and what it is where it says nothing.
_DEFAULTS = {
    "num_image_token": 256,
    "select_layer": -1,
    "force_image_size": None,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
}

# ChatML, for tokenizers without a template and for a system message of one's own.
_CHATML = (
    "{{% if {system!r} and messages[0]['role'] != 'system' %}}"
    "{{{{ '<|im_start|>system\n' + {system!r} + '<|im_end|>\n' }}}}{{% endif %}}"
    "{{% for message in messages %}}"
    "{{{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)


def load_ristretto(
    path: str | Path, *, system_message: str | None = None, **kwargs: Any
) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """Model, in evaluation mode, and processor from a local copy of the released checkpoint.

    Args:
        path: folder with config.json, safetensors files and the tokenizer's files.
        system_message: what conversations begin with; None takes the tokenizer's own template.
        **kwargs: for ``from_pretrained``, for example ``dtype`` and ``device_map``; ``dtype`` is
            that of the files if it is not given, the widest where they hold several.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        ValueError: a file is cut off or the checkpoint is of another layout; the message names
            what is.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist")
    released = read_ristretto_config(folder)
    processor = ristretto_processor(folder, released, system_message)
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        weights.update((tokenflex_name(name), tensor) for name, tensor in tensors(file))
    config = tokenflex_config(released, processor.image_token_id, weights)
    check_fit(folder, config, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    kwargs.setdefault("dtype", widest_dtype(tensor.dtype for tensor in weights.values()))
    model = TokenFlexForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, **kwargs
    )
    model.generation_config = generation_config(folder, processor.tokenizer)
    never_generate(model.generation_config, model.config.image_token_id)
    return model.eval(), processor


# ---- names


def tokenflex_name(name: str) -> str:
    """Our name of a tensor of the release.

    Raises:
        ValueError: the release has no tensor of that name.
    """
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    raise ValueError(f"tensor {name} is not of the released layout; expected {', '.join(_NAMES)}")


def ristretto_name(name: str) -> str:
    """The release's name of one of our tensors.

    Raises:
        ValueError: a TokenFLEX model has no tensor of that name.
    """
    for theirs, ours in _NAMES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise ValueError(f"tensor {name} is not one of a TokenFLEX model")


# ---- configs


def read_ristretto_config(folder: Path) -> dict[str, Any]:
    """The release's config.json, checked.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another model's, or asks for something that we do not do.
    """
    path = folder / "config.json"
    values = read_json(path, "checkpoint file")
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"checkpoint file {path} must have model_type {MODEL_TYPE!r}, got {excerpt(model_type)}"
        )
    for part in ("vision_config", "llm_config"):
        if not isinstance(values.get(part), dict):
            given = excerpt(values.get(part))
            raise ValueError(f"checkpoint file {path} must hold {part}, got {given}")
    architectures = values["llm_config"].get("architectures") or ["none"]
    supported: dict[str, tuple[Any, list[Any]]] = {
        "select_layer": (values.get("select_layer", -1), [-1]),
        "pad2square": (values.get("pad2square", False), [False, None]),
        "vision_config.model_type": (
            values["vision_config"].get("model_type", "siglip_vision_model"),
            ["siglip_vision_model"],
        ),
        "llm_config.architectures": (architectures[0], list(LANGUAGE_MODELS)),
    }
    for name, (value, known) in supported.items():
        if value not in known:
            raise ValueError(
                f"checkpoint file {path} has {name} {excerpt(value)}, and we know {known[0]!r}"
                + "".join(f" and {other!r}" for other in known[1:])
            )
    return values


def tokenflex_config(
    released: Mapping[str, Any], image_token_id: int, names: Mapping[str, Any]
) -> TokenFlexConfig:
    """Our config of a released one.

    Args:
        released: what :func:`read_ristretto_config` gives.
        image_token_id: of the tokenizer's ``<IMG_CONTEXT>``.
        names: our names of the tensors: they tell whether the encoder's pooling head is there.
    """
    vision = dict(released["vision_config"])
    vision["vision_use_head"] = any(name.startswith("model.vision_model.head.") for name in names)
    text = dict(released["llm_config"])
    text["model_type"] = LANGUAGE_MODELS[text["architectures"][0]]
    rest = {k: v for k, v in released.items() if k not in ("vision_config", "llm_config")}
    try:
        return TokenFlexConfig(
            _part("siglip_vision_model", vision),
            _part(text["model_type"], text),
            image_token_id=image_token_id,
            num_image_tokens=_value(released, "num_image_token"),
            pooling="resize",
            trained_num_image_tokens=TRAINED_COUNTS,
            ristretto=rest,  # what we have no use for: to write it back
        )
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ValueError(f"released configuration is not valid: {error}") from error


def ristretto_config(config: TokenFlexConfig, processor: TokenFlexProcessor) -> dict[str, Any]:
    """The release's config.json for one of our models.

    Raises:
        ValueError: that layout cannot hold the model; the message names what does not fit.
    """
    vision, text = config.vision_config, config.text_config
    model_types = {name: architecture for architecture, name in LANGUAGE_MODELS.items()}
    width = config.projector_hidden_width
    conditions = {
        "vision_config.model_type": (vision.model_type, ["siglip_vision_model"]),
        "text_config.model_type": (text.model_type, list(model_types)),
        "pooling": (config.pooling, ["resize"]),
        "projector_hidden_width": (width, [None, 3 * vision.hidden_size]),
        "projector_eps": (config.projector_eps, [1e-5]),
        "projector_position": (config.projector_position, [None]),
        "image_positions": (config.image_positions, ["sequential"]),
        "image_token": (processor.image_token, [IMAGE_TOKEN]),
        "image_start": (processor.image_start, [IMAGE_START]),
    }
    for name, (value, allowed) in conditions.items():
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {allowed} in the released layout, got {value!r}"
            )
    if not isinstance(config.num_image_tokens, int):
        raise ValueError(
            "num_image_tokens must be one int in the released layout, got "
            f"{config.num_image_tokens}"
        )
    original = {**_DEFAULTS, **getattr(config, "ristretto", {})}
    tiles: dict[str, Any] = {}
    if _tile_limits(original) != (processor.min_tiles, processor.max_tiles):
        tiles = {
            "dynamic_image_size": processor.max_tiles > 1,
            "min_dynamic_patch": processor.min_tiles,
            "max_dynamic_patch": processor.max_tiles,
        }
    return {
        **original,
        **tiles,
        "model_type": MODEL_TYPE,
        "num_image_token": config.num_image_tokens,
        "use_thumbnail": processor.use_thumbnail,
        "vision_config": vision.to_dict(),
        "llm_config": {**text.to_dict(), "architectures": [model_types[text.model_type]]},
    }


def generation_config(folder: Path, tokenizer: Any) -> GenerationConfig:
    """That of the folder, or one that ends answers at the tokenizer's end of a turn."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def _part(model_type: str, fields: dict[str, Any]) -> PretrainedConfig:
    fields = {key: value for key, value in fields.items() if key != "model_type"}
    return CONFIG_MAPPING[model_type](**fields)


def _value(released: Mapping[str, Any], name: str) -> Any:
    value = released.get(name)
    return _DEFAULTS[name] if value is None else value


def _tile_limits(released: Mapping[str, Any]) -> tuple[int, int]:
    if not _value(released, "dynamic_image_size"):
        return 1, 1  # whatever numbers stand beside it
    return _value(released, "min_dynamic_patch"), _value(released, "max_dynamic_patch")


# ---- images and prompts


def ristretto_processor(
    folder: Path, released: Mapping[str, Any], system_message: str | None = None
) -> TokenFlexProcessor:
    """Tiles of the encoder's size in RGB, mean and std 0.5, between ``<img>`` and ``</img>``.

    Raises:
        ValueError: the tokenizer cannot be read, or lacks the tokens of images.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raise their own kinds
        raise ValueError(f"tokenizer in {folder} cannot be loaded: {error}") from error
    for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"tokenizer in {folder} must know {token} as one token")
    if system_message is not None or not tokenizer.chat_template:
        tokenizer.chat_template = _CHATML.format(system=system_message or "")
    size = _value(released, "force_image_size") or released["vision_config"].get("image_size", 384)
    min_tiles, max_tiles = _tile_limits(released)
    return TokenFlexProcessor(
        SiglipImageProcessorPil(
            size={"height": size, "width": size},
            resample=PILImageResampling.BICUBIC,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            do_convert_rgb=True,
        ),
        tokenizer,
        num_image_tokens=_value(released, "num_image_token"),
        image_token=IMAGE_TOKEN,
        image_start=IMAGE_START,
        image_end=f"{IMAGE_END}\n",
        max_tiles=max_tiles,
        min_tiles=min_tiles,
        use_thumbnail=_value(released, "use_thumbnail"),
    )
