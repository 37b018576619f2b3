"""Packing: the samples of a padded batch in one row without padding.

transformers keeps packed samples apart by their positions, which start again with each, but only
where there is neither an attention mask nor a cache. Otherwise samples attend to each other without
an error. :func:`pack_inputs` returns neither, and a converted model refuses a packed row with one;
so does a stock model that :func:`tokenflex.packing.enable` has prepared.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenflex.dropin.inputs import is_token_type
from tokenflex.dropin.mrope import rope_positions
from tokenflex.dropin.variants import is_converted, unwrapped
from tokenflex.models.generation import cache_of

ENABLED = "_tokenflex_packing"
"""Attribute of a base model that :func:`tokenflex.packing.enable` has prepared."""

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The arguments of transformers' flash attention that say where samples start."""

PACKED_TEXT_TYPES = frozenset(
    {
        "aria_text",
        "cohere2",
        "cohere_compass_text",
        "cosmos3_edge_text",
        "deepseek_v3",
        "dots3_note_text",
        "ernie4_5_vl_moe_text",
        "exaone4",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr_text",
        "granite_docling_text",
        "hyperclovax",
        "llama",
        "minimax_m3_vl_text",
        "mistral",
        "mistral4",
        "mistral_large4_text",
        "muse_glimmer_text",
        "muse_spark_text",
        "paddleocr_vl_text",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "step3p5",
    }
)
"""The language models, by ``model_type``, whose packed rows are tested.

A wrapper such as LLaVA takes any language model, and some, such as gpt_oss, make their mask without
the positions: samples see each other without an error.
"""


def pack_inputs(model: Any, inputs: Any) -> dict[str, Any]:
    """Pack a padded batch into one row.

    Args:
        model: A converted model, or a stock one after :func:`tokenflex.packing.enable`, with or
            without PEFT. It computes the positions of Qwen-like models.
        inputs: Outputs of the processor, padded on either side: ``input_ids`` and
            ``attention_mask`` [B, L], image inputs, ``num_image_tokens`` of a converted processor
            and, optionally, ``labels``.

    Returns:
        Keyword arguments of the model: ``input_ids`` (and ``labels``, -100 at the first row of each
        sample) int64 [1, total], ``position_ids`` [1, total] (with M-RoPE [4, 1, total]),
        ``cu_seq_lens_q`` and ``_k`` int32 [B + 1], ``max_length_q`` and ``_k`` ints,
        ``use_cache=False``, and the image inputs unchanged.

    Raises:
        ValueError: The model is stock and not prepared, its family cannot be packed (with the
            reason), its language model is not tested and was not compared by
            :func:`tokenflex.packing.enable`, or ``inputs`` is not a padded batch.
    """
    return pack_padded(packable_base(model), inputs)


def packable_base(model: Any) -> Any:
    """Return the base model of a model whose rows may be packed.

    Raises:
        ValueError: The model is stock and not prepared, its family cannot be packed, or its
            language model is neither tested nor compared.
    """
    base = unwrapped(model).base_model
    if is_converted(base):
        _check_converted(base)
    elif not hasattr(base, ENABLED):
        raise ValueError(
            "model must be prepared for packed rows, or its samples would see each other: call "
            "tokenflex.packing.enable(model) first"
        )
    return base


def pack_padded(base: Any, inputs: Any) -> dict[str, Any]:
    """Do what :func:`pack_inputs` does, with a base model that has been checked.

    Of the base model only its class and its config are used, and none of its weights.
    """
    packed = dict(inputs)
    mask, ids = packed.pop("attention_mask", None), packed.get("input_ids")
    if not isinstance(ids, torch.Tensor) or mask is None or mask.shape != ids.shape:
        shapes = [
            f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            for value in (ids, mask)
        ]
        raise ValueError(
            "inputs must hold input_ids and attention_mask as tensors [B, L], got "
            f"{' and '.join(shapes)}"
        )
    seen = mask.bool()
    lengths = mask.sum(-1).tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = (mask.cumsum(-1) - 1)[seen][None]
    if hasattr(base, "get_rope_index"):
        # Text positions come first: they tell where samples start.
        rope = rope_positions(base, packed, mask)
        positions = torch.cat([positions[None], rope[:, seen][:, None]])
    for name, value in packed.items():
        if is_per_token(name) and value is not None:
            packed[name] = value[seen][None]
    if packed.get("labels") is not None:
        # The last row of a sample must not predict the first one of the next.
        firsts = [start for start, length in zip(starts.tolist(), lengths, strict=False) if length]
        packed["labels"][0, firsts] = -100
    boundaries = starts.to(torch.int32).to(ids.device)
    longest = max(lengths, default=0)
    return packed | {
        "position_ids": positions,
        **dict(zip(BOUNDARIES, (boundaries, boundaries, longest, longest), strict=True)),
        "use_cache": False,
    }


def is_per_token(name: str) -> bool:
    """Return whether an input of this name has an entry for each token, token types of any kind."""
    return name in ("input_ids", "attention_mask", "labels") or is_token_type(name)


def has_tested_text(base: Any) -> bool:
    """Return whether a base model's language model is one of :data:`PACKED_TEXT_TYPES`."""
    return base.get_decoder().config.model_type in PACKED_TEXT_TYPES


def check_packing(converted: Any, kwargs: dict[str, Any]) -> None:
    """Refuse the arguments of a forward whose packed samples would attend to each other.

    Args:
        converted: The converted base model; None if it is known that its samples can be packed.
        kwargs: The arguments by name. Those of rows with one sample each are not looked at.

    Raises:
        ValueError: The family cannot be packed; its language model is neither tested nor compared;
            or a packed row comes with a cache or a mask, or without positions of its text.
    """
    positions: Any = kwargs.get("position_ids")
    mask: Any = kwargs.get("attention_mask")
    boundaries: Any = kwargs.get("cu_seq_lens_q")
    start_again = _start_again(positions, mask, kwargs)
    if boundaries is None and not start_again:
        return
    if converted is not None:
        _check_converted(converted)
    if kwargs.get("use_cache") is not False or mask is not None:
        raise ValueError(
            "packed rows need use_cache=False and no attention_mask, or samples would see each "
            f"other; got use_cache={kwargs.get('use_cache')} and attention_mask "
            f"{'None' if mask is None else 'given'}"
        )
    if positions is None or (not start_again and len(boundaries) > 2):
        raise ValueError(
            "packed rows need position_ids that start again with each sample, or samples would see "
            f"each other; got {'None' if positions is None else 'positions that increase'}"
        )
    if start_again and _lack_text(positions):
        raise ValueError(
            "packed rows need position_ids [4, 1, total], text positions first, or samples would "
            f"see each other; got shape {tuple(positions.shape)}"
        )


def _check_converted(base: Any) -> None:
    family = type(base)._tokenflex_family
    if family.no_packing:
        raise ValueError(f"{family.model_type} cannot be packed: {family.no_packing}")
    if not hasattr(base, ENABLED) and not has_tested_text(base):
        raise ValueError(
            "model must be compared before its rows are packed, for its language model "
            f"{base.get_decoder().config.model_type!r} is not among those tested: call "
            "tokenflex.packing.enable(model, batch) with a padded batch first"
        )


def _lack_text(positions: torch.Tensor) -> bool:
    """Return whether M-RoPE positions have three rows: without those of text, which come first."""
    return positions.ndim == 3 and len(positions) == 3


def _start_again(positions: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a row holds several samples: its positions do not always increase."""
    cache = cache_of(kwargs)
    if positions is None or (cache is not None and cache.get_seq_length()):
        return False
    if mask is not None and not (
        isinstance(mask, torch.Tensor) and mask.shape[1:] == positions.shape[-1:]
    ):
        return False  # a mask [.., L, L], or one per kind of layer, keeps samples apart itself
    steps = (positions[0] if positions.ndim == 3 else positions).diff(dim=-1)
    # Without text positions, row 0 is of frames: the same within an image.
    starts = steps < (0 if _lack_text(positions) else 1)
    if mask is not None:  # padding is not a sample
        seen = mask.bool()
        starts = starts & seen[:, 1:] & seen[:, :-1]
    return bool(starts.any())
