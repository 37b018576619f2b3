"""The released checkpoint, LiAutoAD/Ristretto-3B: its config, its tensors and its image processing.

All knowledge of its layout, from its public configuration and modelling code, is in this module: to
read it as a TokenFLEX model, and to write a model in that layout.
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

from tokenflex.files import checkpoint_folder, excerpt
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.generation import never_generate
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.models.weights import (
    check_fit,
    read_config_values,
    tensors,
    weight_files,
    widest_dtype,
)

MODEL_TYPE = "ristretto"
TRAINED_COUNTS = (64, 144, 256)
IMAGE_TOKEN, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
LANGUAGE_MODELS = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}

# The release's names -> ours; the first prefix that fits is taken. Newer releases of transformers
# save the encoder without the second "vision_model.".
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
# Fields of the release's config about images, and their defaults.
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

# ChatML, for tokenizers without a template and for another system message.
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
    """Load a model, in evaluation mode, and its processor from the released checkpoint.

    Args:
        path: folder with config.json, safetensors files and the tokenizer's files.
        system_message: the system message of conversations; None keeps the tokenizer's template.
        **kwargs: for ``from_pretrained``, for example ``dtype`` and ``device_map``. The default
            ``dtype`` is that of the files, the widest where they hold several.

    Raises:
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: a file is cut off, or the checkpoint is of another layout; the message names it.
    """
    folder = checkpoint_folder(path)
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
    """Return our name of a tensor of the release."""
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    raise ValueError(f"tensor {name} is not of the released layout; expected {', '.join(_NAMES)}")


def ristretto_name(name: str) -> str:
    """Return the release's name of one of our tensors."""
    for theirs, ours in _NAMES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise ValueError(f"tensor {name} is not one of a TokenFLEX model")


# ---- configs


def read_ristretto_config(folder: Path) -> dict[str, Any]:
    """Read the release's config.json.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is another model's, or needs something that TokenFLEX does not do.
    """
    path = folder / "config.json"
    values = read_config_values(path, MODEL_TYPE, "vision_config", "llm_config")
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
    for name, (value, allowed) in supported.items():
        if value not in allowed:
            raise ValueError(
                f"checkpoint file {path} has {name} {excerpt(value)}, and we know "
                + " and ".join(map(repr, allowed))
            )
    return values


def tokenflex_config(
    released: Mapping[str, Any], image_token_id: int, names: Mapping[str, Any]
) -> TokenFlexConfig:
    """Return our config of a released one.

    The names of our tensors tell whether the encoder has its pooling head.
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
            ristretto=rest,  # unused fields, to write them back
        )
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ValueError(f"released configuration is not valid: {error}") from error


def ristretto_config(config: TokenFlexConfig, processor: TokenFlexProcessor) -> dict[str, Any]:
    """Return the release's config.json for one of our models.

    Raises:
        ValueError: that layout cannot hold the model; the message names the field.
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
    """Read the folder's, or make one that ends answers at the tokenizer's end of a turn."""
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
        return 1, 1  # the limits have no effect
    return _value(released, "min_dynamic_patch"), _value(released, "max_dynamic_patch")


# ---- images and prompts


def ristretto_processor(
    folder: Path, released: Mapping[str, Any], system_message: str | None = None
) -> TokenFlexProcessor:
    """Make a processor of RGB tiles of the encoder's size, with mean and std 0.5.

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
