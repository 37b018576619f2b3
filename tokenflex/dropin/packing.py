"""Samples of one padded batch in one row without padding, for families where that is exact.

transformers keeps packed samples apart by their positions, which start again with each, but only
where there is neither an attention mask nor a cache; otherwise samples see each other, and nothing
says so. What :func:`pack_inputs` returns has neither, and a converted model refuses a packed row
that has.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenflex.dropin import seam
from tokenflex.dropin.families import family_of

_PER_TOKEN = ("input_ids", "labels", "mm_token_type_ids")


def pack_inputs(model: Any, inputs: Any) -> dict[str, Any]:
    """One padding-free row from a padded batch.

    Args:
        model: a converted model, with or without PEFT; Qwen's positions are its to compute.
        inputs: what the processor returned for the samples, padded on either side: ``input_ids``
            and ``attention_mask`` [B, L], image inputs, ``num_image_tokens``, and ``labels`` where
            there are any.

    Returns:
        Keyword arguments of the model: ``input_ids`` (and ``labels``, -100 at the first row of each
        sample) int64 [1, total], ``position_ids`` [1, total] (with M-RoPE [4, 1, total]),
        ``cu_seq_lens_q`` and ``_k`` int32 [B + 1], ``max_length_q`` and ``_k`` ints,
        ``use_cache=False``, and the image inputs as they were.

    Raises:
        ValueError: the model is not converted, its family cannot be packed (with the reason), or
            ``inputs`` is no padded batch.
    """
    model = seam.unwrapped(model)
    if not seam.is_converted(model):
        raise ValueError("model must have a token-adaptive projector: call replace_projector first")
    family = family_of(model.config)
    if family.no_packing:
        raise ValueError(f"{family.model_type} cannot be packed: {family.no_packing}")
    packed = dict(inputs)
    mask = packed.pop("attention_mask", None)
    ids = packed.get("input_ids")
    if not isinstance(ids, torch.Tensor) or mask is None or mask.shape != ids.shape:
        raise ValueError(
            "inputs must hold input_ids and attention_mask as tensors [B, L], got "
            f"{_shape(ids)} and {_shape(mask)}"
        )
    seen = mask.bool()
    lengths = mask.sum(-1).tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = (mask.cumsum(-1) - 1)[seen][None]
    if hasattr(model.base_model, "get_rope_index"):
        # The rows of text positions come first: they say where samples start.
        rope = _rope_positions(model.base_model, packed, mask)
        positions = torch.cat([positions[None], rope[:, seen][:, None]])
    for name in _PER_TOKEN:
        if packed.get(name) is not None:
            packed[name] = packed[name][seen][None]
    if packed.get("labels") is not None:
        labels = packed["labels"].clone()  # a sample's last row must not predict the next sample
        firsts = [start for start, length in zip(starts.tolist(), lengths, strict=False) if length]
        labels[0, firsts] = -100
        packed["labels"] = labels
    boundaries = starts.to(torch.int32).to(ids.device)
    packed |= {
        "position_ids": positions,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths, default=0),
        "max_length_k": max(lengths, default=0),
        "use_cache": False,
    }
    return packed


def _rope_positions(base: Any, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """[3, B, L]"""
    types = inputs.get("mm_token_type_ids")
    if types is None:
        types = (inputs["input_ids"] == base.config.image_token_id).long()
    positions, _ = base.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=types,
        image_grid_thw=inputs.get("image_grid_thw"),
        num_image_tokens=inputs.get("num_image_tokens"),
        attention_mask=mask,
    )
    return positions


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
