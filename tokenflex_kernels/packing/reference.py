"""Planning, packing and filling bins in plain Python and PyTorch.

The planner is one loop over the tokens; the movers are compositions of indexing ops, differentiable
by PyTorch's own autograd. Tests hold every other implementation to these. The functions take
arguments that the public ones have checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._C._functorch import is_functorch_wrapped_tensor

MAX_INT32 = 2**31 - 1  # rows, vision rows and token ids are int32 on the device


def plan_packing(
    samples: list[list[int]],
    counts: list[int],
    image_index: list[int] | None,
    image_token_id: int,
    labels: list[list[int]] | None,
    ignore_index: int,
    expanded: bool,
) -> dict[str, Any]:
    """Return the tensors of a ``PackPlan`` as arrays, ``max_token_id`` and ``num_token_ids``."""
    _check_counts(counts, expanded)
    images = list(range(len(counts))) if image_index is None else image_index
    _check_images(images, len(counts))
    _check_tokens(samples, image_token_id)
    placeholders = sum(token == image_token_id for sample in samples for token in sample)
    name = "token_counts" if image_index is None else "image_index"
    if expanded:
        _check_expanded(name, samples, counts, images, image_token_id, placeholders)
    else:
        _check_compact(name, samples, images, image_token_id, placeholders)
    text = sum(len(sample) for sample in samples) - placeholders
    vision = sum(counts[image] for image in images)
    if text + vision > MAX_INT32:
        raise ValueError(
            f"input_ids and token_counts make {text} text and {vision} vision rows, but at "
            f"most {MAX_INT32} rows can be packed"
        )

    rows: list[tuple[int, int, int, int]] = []  # token, position, label, source
    cu_seqlens = [0]
    # The vision tokens in order of appearance: for each placeholder those that it stands for.
    tokens = [list(range(sum(counts[:image]), sum(counts[: image + 1]))) for image in images]
    shown = iter([[token] for image in tokens for token in image] if expanded else tokens)
    for index, sample in enumerate(samples):
        first = len(rows)
        for at, token in enumerate(sample):
            if token != image_token_id:
                label = token if labels is None else labels[index][at]
                rows.append((token, len(rows) - first, label, token))
                continue
            for vision_token in next(shown):
                rows.append((token, len(rows) - first, ignore_index, ~vision_token))
        if len(rows) > first:  # the row before it belongs to another sample
            token, position, _, source = rows[first]
            rows[first] = (token, position, ignore_index, source)
        cu_seqlens.append(len(rows))

    text_ids = {source for *_, source in rows if source >= 0}
    vision_rows = sorted((~source, at) for at, (*_, source) in enumerate(rows) if source < 0)
    columns = np.array(rows, np.int64).reshape(-1, 4).T.copy()
    return {
        "input_ids": columns[0],
        "position_ids": columns[1],
        "labels": columns[2],
        "source": columns[3].astype(np.int32),
        "vision_rows": np.array([at for _, at in vision_rows], np.int32),
        "cu_seqlens": np.array(cu_seqlens, np.int32),
        "max_token_id": max(text_ids, default=-1),
        "num_token_ids": len(text_ids),
    }


def _check_counts(counts: list[int], expanded: bool) -> None:
    least = 1 if expanded else 0
    total = 0
    for image, count in enumerate(counts):
        if count < least:
            when = " when expanded=True" if expanded else ""
            raise ValueError(f"token_counts[{image}] must be at least {least}{when}, got {count}")
        total += count
        if total > MAX_INT32:
            raise ValueError(
                f"token_counts must add up to at most {MAX_INT32} rows, but token_counts[{image}] "
                f"= {count} goes beyond"
            )


def _check_tokens(samples: list[list[int]], image_token_id: int) -> None:
    for index, sample in enumerate(samples):
        for at, token in enumerate(sample):
            if token != image_token_id and not 0 <= token <= MAX_INT32:
                raise ValueError(
                    f"input_ids[{index}][{at}] must be in [0, {MAX_INT32}] or the image_token_id "
                    f"{image_token_id}, got {token}"
                )


def _check_images(images: list[int], num_images: int) -> None:
    for shown, image in enumerate(images):
        if not 0 <= image < num_images:
            raise ValueError(
                f"image_index[{shown}] must be an image of token_counts, in [0, {num_images}), "
                f"got {image}"
            )


def _check_compact(
    name: str,
    samples: list[list[int]],
    images: list[int],
    image_token_id: int,
    placeholders: int,
) -> None:
    if placeholders == len(images):
        return
    where = ""
    left = len(images)
    for index, sample in enumerate(samples):
        left -= sample.count(image_token_id)
        if left < 0:
            where = f"; the counts run out in sample {index}"
            break
    raise ValueError(
        f"{name} has {len(images)} counts, but input_ids has {placeholders} placeholders "
        f"(token {image_token_id}){where}"
    )


def _check_expanded(
    name: str,
    samples: list[list[int]],
    counts: list[int],
    images: list[int],
    image_token_id: int,
    placeholders: int,
) -> None:
    mismatch = (
        f"{name} adds up to {sum(counts[image] for image in images)} over {len(images)} images, "
        f"but input_ids has {placeholders} placeholders (token {image_token_id})"
    )
    shown = 0
    for index, sample in enumerate(samples):
        for run in _runs(sample, image_token_id):
            while run > 0:
                if shown == len(images):
                    raise ValueError(f"{mismatch}; the counts run out in sample {index}")
                image = images[shown]
                if run < counts[image]:
                    raise ValueError(
                        f"token_counts[{image}] = {counts[image]}, but input_ids[{index}] has a "
                        f"run of placeholders that leaves {run} for image {image}"
                    )
                run -= counts[image]
                shown += 1
    if shown < len(images):
        raise ValueError(mismatch)


def _runs(sample: list[int], image_token_id: int) -> list[int]:
    """Return the lengths of the runs of neighbouring placeholders."""
    runs = [0]
    for token in sample:
        if token == image_token_id:
            runs[-1] += 1
        else:
            runs.append(0)
    return runs


def pack_embeddings(
    embedding: torch.Tensor,
    vision: torch.Tensor,
    source: torch.Tensor,
    vision_rows: torch.Tensor,
    sparse_grad: bool,
) -> torch.Tensor:
    """[V, D], [vision tokens, D] -> [total, D]: text rows from the table, the others of vision."""
    text_rows = (source >= 0).nonzero().squeeze(1)
    packed = embedding.new_zeros(source.shape[0], embedding.shape[1])
    text = F.embedding(source[text_rows], embedding, sparse=sparse_grad)
    packed = packed.index_copy(0, text_rows, text)
    shown = vision.index_select(0, ~source[vision_rows])
    return packed.index_copy(0, vision_rows.long(), shown)


def unpack_vision(packed: torch.Tensor, vision_rows: torch.Tensor) -> torch.Tensor:
    """[total, D] -> [vision, D]."""
    return packed.index_select(0, vision_rows)


def merge_vision(
    inputs_embeds: torch.Tensor, vision: torch.Tensor, vision_rows: torch.Tensor
) -> torch.Tensor:
    """[rows, D] with the rows ``vision_rows`` replaced by those of ``vision`` [n, D]."""
    # Row numbers that differ from example to example of a vmap cannot be read.
    if vision_rows.device.type == "cpu" and not is_functorch_wrapped_tensor(vision_rows):
        _check_vision_rows(vision_rows.tolist(), inputs_embeds.shape[0])
    return inputs_embeds.index_copy(0, vision_rows.long(), vision)


def _check_vision_rows(vision_rows: list[int], rows: int) -> None:
    taken: dict[int, int] = {}
    for at, row in enumerate(vision_rows):
        if not 0 <= row < rows:
            raise ValueError(
                f"vision_rows[{at}] must be a row of inputs_embeds, in [0, {rows}), got {row}"
            )
        if row in taken:
            raise ValueError(
                f"vision_rows must hold no row twice, but vision_rows[{taken[row]}] and "
                f"vision_rows[{at}] are both {row}"
            )
        taken[row] = at
