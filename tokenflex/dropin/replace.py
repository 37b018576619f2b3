"""Replace the projector of a model, restore the stock one, and load conversions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from tokenflex.counts import TokenCount
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import default_count
from tokenflex.dropin.fitting import fit_projector
from tokenflex.dropin.model import (
    ConvertedModel,
    install,
    new_projector,
    stock_projector_of,
    uninstall,
)
from tokenflex.dropin.processor import check_default_count, convert_processor, restore_processor
from tokenflex.dropin.saved import Conversion, stock_config_class
from tokenflex.dropin.variants import is_converted, unwrapped, variant_of
from tokenflex.hub import refuse_missing_folder
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.loading import refuse_faults
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex_kernels.checks import check_count
from tokenflex_kernels.pool_norm.axis_weights import check_mode

_LOGGER = logging.getLogger(__name__)
# The fields of config.tokenflex, from which a projector is built.
_OPTIONS = frozenset(
    ["hidden_width", "num_image_tokens", "patch_merge", "pooling", "text_width", "vision_width"]
)
# Arguments of from_pretrained that locate a checkpoint: for its config and processor, too.
_LOCATION = (
    *("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"),
    "trust_remote_code",
)


def replace_projector(
    model: Any,
    processor: Any = None,
    *,
    num_image_tokens: TokenCount = 256,
    init: str | None = None,
    images: Any = None,
    patch_merge: int | None = None,
    hidden_width: int | None = None,
    pooling: str = "adaptive",
) -> Any:
    """Replace the projector of a transformers vision-language model by a token-adaptive one.

    The model is changed in place. Afterwards ``processor(..., num_image_tokens=...)``,
    ``model(**inputs)`` and ``model.generate(**inputs)`` take an int, an (h, w), or one of those per
    image. A count is per input of the vision encoder: an image cut into five tiles has five times
    as many tokens. Everything else about the model stays the same.

    Args:
        model: A model for image-text-to-text of a supported family
            (:func:`tokenflex.dropin.supported_families`).
        processor: Its processor, also changed in place; None if you write placeholders yourself.
        num_image_tokens: Vision tokens per image where a call gives no count.
        init: "fit" to imitate the stock projector on ``images``
            (:func:`tokenflex.dropin.fit_projector`), or "random" for PyTorch's initialisation. The
            default is "fit" with images, and "random" without.
        images: For "fit": a few pictures for the processor, or image inputs of the model as a dict.
        patch_merge: m; m x m patches are concatenated to one before they are pooled, on a grid m
            times coarser. The default is that of the stock projector (2 for InternVL or Qwen, 1
            for LLaVA), which keeps as much detail per token as before. 1 pools the patches
            themselves, with weights m * m times narrower.
        hidden_width: Width of the gated unit; 3 * m times the width of a patch by default.
        pooling: "adaptive" (the paper) or "resize" (the released model).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a whole transformers model, or an argument has a wrong type.
        ValueError: The family is not supported (the message lists those that are), the model is
            already converted, or arguments do not fit together.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        raise TypeError(
            "model must be a transformers model with its language-model head (wrap it for PEFT "
            f"afterwards), got {type(model).__name__}"
        )
    family = family_of(model.config)
    if is_converted(model):
        raise ValueError(
            "model has a token-adaptive projector already; restore_projector brings the stock one "
            "back"
        )
    check_default_count(num_image_tokens, name="num_image_tokens")
    if init is None:
        init = "random" if images is None else "fit"
    if init not in ("fit", "random"):
        raise ValueError(f"init must be 'fit' or 'random', got {init!r}")
    if init == "fit" and images is None:
        raise ValueError("init='fit' needs images to fit on, got images=None")
    if patch_merge is None:
        patch_merge = family.stock_patch_merge(model.config)
    patch_merge = check_count("patch_merge", patch_merge)
    patch_width = family.width(model.config)
    if hidden_width is None:
        hidden_width = 3 * patch_merge * patch_width
    options = {
        "num_image_tokens": num_image_tokens,
        "patch_merge": patch_merge,
        "vision_width": patch_merge**2 * patch_width,
        "text_width": model.config.get_text_config().hidden_size,
        "hidden_width": check_count("hidden_width", hidden_width),
        "pooling": check_mode(pooling, name="pooling"),
    }
    if processor is not None:
        convert_processor(processor, model.config, num_image_tokens)
    model.config.tokenflex = options
    stock = model.base_model.get_submodule(family.stock_projector)
    reference = next(iter(stock.parameters()), model.get_input_embeddings().weight)
    dtype = reference.dtype if reference.dtype.is_floating_point else model.dtype
    projector = new_projector(model.config).to(reference.device, dtype).train(model.training)
    install(model, projector, keep_stock=True)
    if init == "fit":
        try:
            report = fit_projector(model, images, processor)
        except BaseException:
            restore_projector(model, processor)
            raise
        _LOGGER.info(
            "projector fitted on %d tokens: relative error %.3f, on images held out %s",
            report.tokens,
            report.after,
            report.held_out,
        )
    return model


def restore_projector(model: Any, processor: Any = None) -> Any:
    """Undo :func:`replace_projector`, in place.

    Args:
        model: A model that was converted in place, with or without PEFT.
        processor: Its processor.

    Returns:
        ``model``.

    Raises:
        ValueError: The model is not converted, or was loaded as a conversion, which does not hold
            the stock projector.
    """
    inner = unwrapped(model)
    if not is_converted(inner):
        raise ValueError("model has its stock projector: there is nothing to restore")
    stock = stock_projector_of(inner)
    if stock is None:
        raise ValueError(
            "model was loaded as a conversion, which does not hold the stock projector: load the "
            "stock model instead"
        )
    projector = inner.base_model.get_submodule(family_of(inner.config).projector)
    reference = next(projector.parameters())
    # The kept projector missed all changes of device, dtype and mode.
    stock.to(reference.device, reference.dtype).train(inner.training)
    uninstall(inner)
    del inner.config.tokenflex
    if hasattr(inner.config, "trained_num_image_tokens"):  # of the projector that is gone
        del inner.config.trained_num_image_tokens
    if processor is not None:
        restore_processor(processor)
    return model


def projector_name(model: Any) -> str:
    """Return the dotted name of a converted model's projector, for PEFT's ``modules_to_save``.

    Raises:
        ValueError: The model's family is not supported.
    """
    model = unwrapped(model)
    return f"{model.base_model_prefix}.{family_of(model.config).projector}"


def from_pretrained(
    name_or_path: str | Path,
    *,
    num_image_tokens: TokenCount | None = None,
    init: str | None = None,
    images: Any = None,
    processor: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a vision-language model with a token-adaptive projector, and its processor.

    Args:
        name_or_path: Stock weights of a supported family, which get a new projector; a conversion
            that was saved with ``save_pretrained``; or a TokenFLEX checkpoint. A folder, or
            ``org/name`` on the Hugging Face Hub.
        num_image_tokens: Vision tokens per image where a call gives no count; by default the saved
            count, or 256.
        init: Initialisation of a new projector, see :func:`replace_projector`. Refused where there
            is one already.
        images: Pictures for a new projector, see :func:`replace_projector`. Not used where there is
            one already.
        processor: Replaces the processor in ``name_or_path``.
        **kwargs: For ``AutoModelForImageTextToText.from_pretrained``, for example ``dtype``.
            Code of a repository is run only with ``trust_remote_code=True``.

    Returns:
        (model, processor).

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The family is not supported, or the weights of a conversion are incomplete.
    """
    kwargs.setdefault("trust_remote_code", False)  # None asks at the terminal
    refuse_missing_folder(name_or_path)
    location = {name: kwargs[name] for name in _LOCATION if name in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(name_or_path, **location)
    is_own = isinstance(config, TokenFlexConfig)
    if not is_own:
        family_of(config)  # refused before anything is loaded
    if processor is None:
        processor = AutoProcessor.from_pretrained(name_or_path, **location)
    if not is_own and getattr(config, "tokenflex", None) is None:
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, config=config, **kwargs)
        count = 256 if num_image_tokens is None else num_image_tokens
        replace_projector(model, processor, num_image_tokens=count, init=init, images=images)
        if init is None and images is None:
            _LOGGER.warning(
                "The new projector of %s has random weights: give images=pictures to fit it to the "
                "stock one, or train it (init='random' says that you mean to)",
                name_or_path,
            )
        return model, processor
    if init is not None:
        raise ValueError(
            f"init is for stock weights, but {name_or_path} holds a token-adaptive projector; got "
            f"init={init!r}"
        )
    if is_own:
        if num_image_tokens is not None:
            check_default_count(num_image_tokens, name="num_image_tokens")
            config.num_image_tokens = processor.num_image_tokens = num_image_tokens
        model, loading = TokenFlexForConditionalGeneration.from_pretrained(
            name_or_path, config=config, output_loading_info=True, **kwargs
        )
        refuse_faults(name_or_path, loading)
        return model, processor
    model, _ = load_conversion(name_or_path, config, num_image_tokens=num_image_tokens, **kwargs)
    convert_processor(processor, config, default_count(config))
    return model, processor


def conversion_class(config: Any) -> Any:
    """Return the class of the converted models of a config."""
    stock_class = AutoModelForImageTextToText._model_mapping[stock_config_class(config)]
    return variant_of(stock_class, family_of(config), (ConvertedModel,))


def load_conversion(
    name_or_path: str | Path,
    config: Any,
    *,
    num_image_tokens: TokenCount | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load the model of a saved conversion; the arguments are those of :func:`from_pretrained`.

    Returns:
        The model, and transformers' loading information.

    Raises:
        ValueError: The config or the weights of the conversion are incomplete.
    """
    missing = sorted(_OPTIONS - set(config.tokenflex))
    if missing:
        raise ValueError(
            f"config of {name_or_path} must have {', '.join(sorted(_OPTIONS))} in tokenflex, but "
            f"{', '.join(missing)} is missing"
        )
    if num_image_tokens is not None:
        check_default_count(num_image_tokens, name="num_image_tokens")
        config.tokenflex["num_image_tokens"] = num_image_tokens
    model, loading = conversion_class(config).from_pretrained(
        name_or_path, config=config, output_loading_info=True, **kwargs
    )
    refuse_faults(name_or_path, loading)
    return model, loading


Conversion.load, Conversion.class_of = staticmethod(load_conversion), staticmethod(conversion_class)
