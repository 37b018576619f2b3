"""Build what a configuration names: data sets and their order, processor, model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

# Before transformers 5.18 the package's own name of it needs torchvision, the class does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tokenflex.counts import TokenCount, token_grid
from tokenflex.data.mixture import Mixture, order_of
from tokenflex.data.order import Order
from tokenflex.data.samples import SampleDataset
from tokenflex.files import excerpt
from tokenflex.formats import FRESH_PARTS
from tokenflex.hub import local_checkpoint, refuse_missing_folder
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.loading import load_checkpoint, read_config
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.training.config import ModelConfig, PartConfig, TrainConfig
from tokenflex.training.data_config import DataConfig
from tokenflex.videos import EACH_FRAME, FrameSampling

# What the model's architecture consists of beside its encoder and its language model.
_ARCHITECTURE = ("pooling", "projector_hidden_width", "projector_position", "image_positions")

_FRAME_KEYS = ("max_frames", "fps")


def build_dataset(config: DataConfig) -> SampleDataset:
    """Open the data set that ``config`` names."""
    if config.parts:
        return Mixture([build_dataset(part) for part in config.parts])
    return config.format.open(config.format.options_of(config))


def build_order(config: DataConfig, dataset: SampleDataset, seed: int) -> Order:
    """Return the order in which training walks through the ``dataset`` of ``config``.

    A stream keeps its order itself: it is set to that of ``seed`` here.
    """
    if isinstance(dataset, Mixture):
        return dataset.order(
            [part.weight for part in config.parts], seed, [part.epochs for part in config.parts]
        )
    return order_of(dataset, seed, config.epochs)


def check_supply(config: TrainConfig, orders: Mapping[DataConfig, Order]) -> None:
    """Raise ValueError for a stage that needs more samples than the ``epochs`` of its data hold."""
    needed = dict.fromkeys(orders, 0)
    for stage in config.stages:
        data = config.data_of(stage)
        if data not in orders:
            continue
        # The steps of a budget in tokens are not known before: at least none.
        needed[data] += (stage.steps or 0) * stage.samples_read
        end = orders[data].end
        if end is not None and needed[data] > end:
            raise ValueError(
                f"stage {stage.name!r} goes on to sample {needed[data]} of its data, but its "
                f"epochs end at {end}; give it fewer steps or more epochs"
            )


def check_processes(config: TrainConfig, processes: int) -> None:
    """Raise ValueError for a stage with fewer samples a step than there are processes."""
    for stage in config.stages:
        if stage.batch_size < processes:
            raise ValueError(
                f"batch_size of stage {stage.name!r} must be at least one sample a process, "
                f"{processes}, got {stage.batch_size}"
            )


def check_dropout(model: Any, config: TrainConfig) -> None:
    """Raise ValueError for a stage that trains dropout in attention: packed attention has none."""
    dropout = getattr(model.config.text_config, "attention_dropout", 0.0)
    if dropout and model.takes_shared_prefixes:
        for stage in config.stages:
            if "text" in stage.learning:
                raise ValueError(
                    f"attention_dropout of model.text must be 0 to be trained in stage "
                    f"{stage.name!r}, got {dropout}"
                )


def build_processor(config: ModelConfig, data: Iterable[DataConfig] = ()) -> TokenFlexProcessor:
    """Return the processor, with ``image_token`` known to its tokenizer.

    It shows the frames of a video that training on ``data`` shows, see :func:`frames_of`.
    """
    processor = _new_processor(config)
    sampling = frames_of(data)
    processor.max_frames, processor.fps = sampling.max_frames, sampling.fps
    return processor


def frames_of(data: Iterable[DataConfig]) -> FrameSampling:
    """Return one rule for the frames of all videos in some data.

    It has the largest ``max_frames`` and the first ``fps`` of the data sets that state one of these
    keys. Data without videos states neither. If none does, the rule is the default.
    """
    rules = [
        FrameSampling(part.max_frames, part.fps)
        for config in data
        for part in config.parts or (config,)
        if not part.model_fields_set.isdisjoint(_FRAME_KEYS)
    ]
    if not rules:
        return EACH_FRAME
    return FrameSampling(max(rule.max_frames for rule in rules), rules[0].fps)


def _new_processor(config: ModelConfig) -> TokenFlexProcessor:
    if config.processor is not None:
        image_size = _vision_config(config.vision).image_size
        processor = FRESH_PARTS[config.processor].processor(config.num_image_tokens, image_size)
        processor.max_tiles, processor.use_thumbnail = config.max_tiles, config.use_thumbnail
        return processor
    assert config.vision.path is not None  # checked by ModelConfig, as is the other
    assert config.text.path is not None
    tokenizer = pretrained(AutoTokenizer, config.text.path)
    tokenizer.add_special_tokens({"additional_special_tokens": [config.image_token]})
    return TokenFlexProcessor(
        pretrained(AutoImageProcessor, config.vision.path),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        image_token=config.image_token,
        max_tiles=config.max_tiles,
        use_thumbnail=config.use_thumbnail,
    )


def empty_model(config: ModelConfig) -> TokenFlexForConditionalGeneration:
    """Return the model on the meta device, from configurations alone: shapes without weights."""
    model_config = TokenFlexConfig(
        vision_config=_vision_config(config.vision),
        text_config=_text_config(config.text),
        image_token_id=0,
        **_own_keys(config),
    )
    with torch.device("meta"), _architecture_named("vision and model.text"):
        return TokenFlexForConditionalGeneration(model_config)


def build_model(
    config: ModelConfig, processor: TokenFlexProcessor, counts: Collection[TokenCount] = ()
) -> TokenFlexForConditionalGeneration:
    """Return the model: from ``config.start``, or of parts that are fresh or pretrained.

    Args:
        config: The configuration.
        processor: The processor.
        counts: Token counts that it will be trained at. A saved model warns of others.

    Raises:
        FileNotFoundError: ``config.start`` does not exist.
        ValueError: A part cannot be loaded, or ``config.start`` has another architecture.
    """
    if config.start is not None:
        return _ending_answers(_started_model(config, processor, counts), processor.tokenizer)
    vision, vision_config = _build_vision(config.vision)
    language_model = _build_language_model(config.text)
    if len(processor.tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(processor.tokenizer))
    model_config = TokenFlexConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_id=processor.image_token_id,
        trained_num_image_tokens=sorted(counts, key=token_grid) or None,
        **_own_keys(config),
    )
    model = TokenFlexForConditionalGeneration.from_parts(model_config, vision, language_model)
    return _ending_answers(model, processor.tokenizer)


def _own_keys(config: Any) -> dict[str, Any]:
    """Return the keys of a model that neither its encoder nor its language model has."""
    return {key: getattr(config, key) for key in ("num_image_tokens", *_ARCHITECTURE)}


def _ending_answers(
    model: TokenFlexForConditionalGeneration, tokenizer: Any
) -> TokenFlexForConditionalGeneration:
    """Let ``generate`` stop at the tokenizer's end of answers, unless the model knows its ends."""
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    return model


def _started_model(
    config: ModelConfig, processor: TokenFlexProcessor, counts: Collection[TokenCount]
) -> TokenFlexForConditionalGeneration:
    """Return the model of ``config.start``, which must be as the configuration describes it.

    Positions may be switched on, as their term begins at zero.
    """
    assert config.start is not None
    folder = local_checkpoint(config.start)
    saved = read_config(folder / "config.json")
    positions = {}
    if saved.projector_position is None:
        positions = {
            "projector_position": config.projector_position,
            "image_positions": config.image_positions,
        }
        saved.update(positions)
    actual = {**_architecture(saved), "image_token_id": saved.image_token_id}
    described = _architecture(empty_model(config).config)
    for key, expected in {**described, "image_token_id": processor.image_token_id}.items():
        if actual.get(key) != expected:
            raise ValueError(
                f"model.start {str(config.start)!r} has {key} = {actual.get(key)!r}, but the "
                f"configuration states {expected!r}"
            )
    model, _ = load_checkpoint(
        folder,
        num_image_tokens=config.num_image_tokens,
        trained_num_image_tokens=sorted(counts, key=token_grid) or None,
        **positions,
    )
    return model


def _architecture(config: TokenFlexConfig) -> dict[str, Any]:
    """Return the architecture of a model by key, without what notes how it was saved."""
    parts = {
        f"{part}.{key}": value
        for part in ("vision_config", "text_config")
        for key, value in getattr(config, part).to_dict().items()
        # A vocabulary grows where the image's placeholder is added to it.
        if key not in ("architectures", "dtype", "transformers_version", "vocab_size")
        and not key.startswith("_")
    }
    return {**parts, **{key: getattr(config, key) for key in _ARCHITECTURE}}


def modules_of(model: Any) -> dict[str, list[nn.Module]]:
    """Return the modules that the names of a stage's ``learning_rate`` stand for."""
    inner = model.model
    return {
        "vision": [inner.vision_model],
        "projector": [inner.projector],
        "text": [inner.language_model, model.lm_head],
    }


def _build_vision(part: PartConfig) -> tuple[PreTrainedModel, PretrainedConfig]:
    if part.path is None:
        config = _fresh_config(part)
        with _architecture_named("vision"):
            return AutoModel.from_config(config), config
    config = saved_vision_config(part.path)
    _check_architecture(part, config)
    return pretrained(AutoModel, part.path, config=config, dtype=torch.float32), config


def _build_language_model(part: PartConfig) -> PreTrainedModel:
    if part.path is None:
        config = _fresh_config(part)
        with _architecture_named("text"):
            return AutoModelForCausalLM.from_config(config)
    _check_architecture(part, pretrained(AutoConfig, part.path))
    return pretrained(AutoModelForCausalLM, part.path, dtype=torch.float32)


@contextmanager
def _architecture_named(parts: str) -> Iterator[None]:
    """Turn whatever transformers or torch raises into a ValueError that names the part."""
    try:
        yield
    except (MemoryError, OSError, ValueError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "alloc" in str(error):
            raise  # too large for this machine
        raise ValueError(
            f"no model can be built as model.{parts} describes it: {type(error).__name__}: {error}"
        ) from error


def _vision_config(part: PartConfig) -> PretrainedConfig:
    return saved_vision_config(part.path) if part.config is None else _fresh_config(part)


def _text_config(part: PartConfig) -> PretrainedConfig:
    return pretrained(AutoConfig, part.path) if part.config is None else _fresh_config(part)


def saved_vision_config(path: str | None) -> PretrainedConfig:
    """Return the config of a saved encoder, also of one within an image-text pair."""
    config = pretrained(AutoConfig, path)
    # A checkpoint of an image-text pair (SigLIP, CLIP) holds the encoder's config inside its own.
    return getattr(config, "vision_config", config)


def patch_grid(config: Any) -> tuple[int, int] | None:
    """Return rows and columns of an encoder's patches; None if its images have no fixed size."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if not isinstance(patch, int) or patch < 1 or len(sides) != 2:
        return None
    if not all(isinstance(side, int) for side in sides):
        return None
    return sides[0] // patch, sides[1] // patch


def _check_architecture(part: PartConfig, config: PretrainedConfig) -> None:
    """Raise ValueError for a pretrained part that is not as the configuration describes it."""
    for key, expected in (part.config or {}).items():
        actual = getattr(config, key, None)
        if actual != expected:
            raise ValueError(
                f"config of {part.path!r} must have {key} = {expected!r} as it states, but the "
                f"checkpoint has {actual!r}"
            )


def pretrained(auto_class: Any, path: str | None, **options: Any) -> Any:
    """Call ``auto_class.from_pretrained``, with an error that names the path.

    As for checkpoints, a path in a folder that exists is never looked for on the Hub.
    """
    try:
        refuse_missing_folder(path)
    except FileNotFoundError as error:
        raise ValueError(f"path {path!r} cannot be loaded: {error}") from None
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        is_name = path is not None and not Path(path).exists()
        reason = "no such folder exists, and as a name on the Hub: " if is_name else ""
        raise ValueError(f"path {path!r} cannot be loaded: {reason}{error}") from error


# Keys that models read although their configs do not declare them before transformers 5.23.
_UNDECLARED = {
    "siglip_vision_model": ["vision_use_head"],
    "siglip2_vision_model": ["vision_use_head"],
}


def _fresh_config(part: PartConfig) -> PretrainedConfig:
    fields: dict[str, Any] = dict(part.config or {})
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config must name a model_type that transformers knows, got {excerpt(model_type)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    # transformers keeps unknown keys silently: a misspelt width would train the default.
    known = {
        *config_class().to_dict(),
        *config_class.attribute_map,
        *_UNDECLARED.get(model_type, ()),
    }
    for key, value in fields.items():
        if key not in known:
            near = ", ".join(get_close_matches(key, known)) or "a field of its transformers config"
            raise ValueError(
                f"config of model_type {model_type!r} has no key {excerpt(key)} (got "
                f"{excerpt(value)}; expected {near})"
            )
    try:
        return config_class(**fields)
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ValueError(f"config of model_type {model_type!r} is not valid: {error}") from error
