"""Replace a model's projector by a token-adaptive one, bring it back, load conversions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from tokenflex.counts import TokenCount
from tokenflex.dropin import seam
from tokenflex.dropin.families import family_of
from tokenflex.dropin.fitting import fit_projector
from tokenflex.dropin.processor import check_default_count, convert_processor, restore_processor
from tokenflex_kernels.checks import check_count
from tokenflex_kernels.pool_norm.axis_weights import check_mode

_LOGGER = logging.getLogger(__name__)
# What config.tokenflex holds: all that a projector is made from.
_OPTIONS = frozenset(
    ["hidden_width", "num_image_tokens", "patch_merge", "pooling", "text_width", "vision_width"]
)
# What says where a checkpoint is, for its config and processor as for its weights.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


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
    """Give a vision-language model of transformers a token-adaptive projector, in place.

    Afterwards ``processor(..., num_image_tokens=...)``, ``model(**inputs)`` and
    ``model.generate(**inputs)`` take an int, an (h, w), or one of those per image. Everything else
    of the model stays: its class's name, its other weights, saving, ``generate``.

    A count is per input of the vision encoder: an image cut into five tiles has five times as many.

    Args:
        model: a model for image-text-to-text of a supported family
            (:func:`tokenflex.dropin.supported_families`).
        processor: its processor, changed in place too; None if you write placeholders yourself.
        num_image_tokens: vision tokens per image where a call names no count.
        init: "fit": imitate the stock projector on ``images``
            (:func:`tokenflex.dropin.fit_projector`); "random": PyTorch's initialisation. None is
            "fit" where images are given.
        images: for "fit", a handful of pictures for the processor, or image inputs of the model as
            a dict.
        patch_merge: m; the projector sees m x m patches side by side as one, on a grid m times
            coarser. None is what the stock projector does (2 for InternVL or Qwen, 1 for LLaVA):
            as much detail per token as before. 1 pools the patches themselves, with m * m times
            narrower weights.
        hidden_width: of the projector's gated unit; 3 * m times the width of a patch if None.
        pooling: "adaptive" (the paper) or "resize" (the released model).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a whole transformers model, or an argument not of its kind.
        ValueError: an unsupported family (the message lists the supported ones), a model that is
            converted already, or arguments that do not fit together.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        raise TypeError(
            "model must be a transformers model with its language-model head (wrap it for PEFT "
            f"afterwards), got {type(model).__name__}"
        )
    family = family_of(model.config)
    if seam.is_converted(model):
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
    if images is not None and not isinstance(images, Mapping) and processor is None:
        raise ValueError("pictures need a processor; give one, or image inputs as a dict")
    if patch_merge is None:
        patch_merge = family.stock_patch_merge(model.config)
    patch_width = family.width(model.config)
    if hidden_width is None:
        hidden_width = 3 * check_count("patch_merge", patch_merge) * patch_width
    options = {
        "num_image_tokens": num_image_tokens,
        "patch_merge": check_count("patch_merge", patch_merge),
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
    projector = seam.new_projector(model.config).to(reference.device, dtype).train(model.training)
    seam.install(model, projector, keep_stock=True)
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
    """Bring the stock projector back, in place: the model as before :func:`replace_projector`.

    Args:
        model: a model converted in place, with or without PEFT.
        processor: its processor.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not converted, or was loaded as a conversion, which does not hold
            the stock projector.
    """
    inner = seam.unwrapped(model)
    if not seam.is_converted(inner):
        raise ValueError("model has its stock projector: there is nothing to restore")
    stock = seam.stock_projector_of(inner)
    if stock is None:
        raise ValueError(
            "model was loaded as a conversion, which does not hold the stock projector: load the "
            "stock model instead"
        )
    family = family_of(inner.config)
    reference = next(inner.base_model.get_submodule(family.projector).parameters())
    # What moved or changed dtype since then did so without the stock projector.
    stock.to(reference.device, reference.dtype).train(inner.training)
    seam.uninstall(inner)
    del inner.config.tokenflex
    if processor is not None:
        restore_processor(processor)
    return model


def projector_name(model: Any) -> str:
    """The dotted name of the projector in a converted model, for PEFT's ``modules_to_save``.

    Raises:
        ValueError: the model is of no supported family.
    """
    model = seam.unwrapped(model)
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
    """A vision-language model with a token-adaptive projector, and its processor.

    Args:
        name_or_path: stock weights of a supported family, which get a fresh projector, or a
            conversion saved with ``save_pretrained``.
        num_image_tokens: vision tokens per image where a call names no count; None is the saved
            one, or 256.
        init, images: how a fresh projector starts, see :func:`replace_projector`; a conversion has
            no use for images, and refuses ``init``.
        processor: use this one instead of loading it from ``name_or_path``.
        **kwargs: for ``AutoModelForImageTextToText.from_pretrained``, for example ``dtype``.

    Returns:
        (model, processor).

    Raises:
        ValueError: an unsupported family, or a conversion whose weights are not complete.
    """
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(name_or_path, **where)
    family = family_of(config)
    if processor is None:
        processor = AutoProcessor.from_pretrained(name_or_path, **where)
    if getattr(config, "tokenflex", None) is None:
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, config=config, **kwargs)
        count = 256 if num_image_tokens is None else num_image_tokens
        replace_projector(model, processor, num_image_tokens=count, init=init, images=images)
        return model, processor
    if init is not None:
        raise ValueError(
            f"init is for stock weights, but {name_or_path} holds a token-adaptive projector; got "
            f"init={init!r}"
        )
    missing = sorted(_OPTIONS - set(config.tokenflex))
    if missing:
        raise ValueError(
            f"config of {name_or_path} must have {', '.join(sorted(_OPTIONS))} in tokenflex, but "
            f"{', '.join(missing)} is missing"
        )
    if num_image_tokens is not None:
        check_default_count(num_image_tokens, name="num_image_tokens")
        config.tokenflex["num_image_tokens"] = num_image_tokens
    stock_class = AutoModelForImageTextToText._model_mapping[type(config)]
    model, loading = seam.model_variant(stock_class, family).from_pretrained(
        name_or_path, config=config, output_loading_info=True, **kwargs
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(problem):
            names = sorted(str(name) for name in loading[problem])
            raise ValueError(
                f"checkpoint {name_or_path} has {len(names)} {problem.replace('_', ' ')}, the "
                f"first is {names[0]}"
            )
    convert_processor(processor, config, seam.default_count(config))
    return model, processor
