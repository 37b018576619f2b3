"""Positions of vision tokens in their images, as features that are the same for every grid.

A language model that knows a token's position by its index alone learns the grids of its training
and misreads all others. The position of a cell in its image means the same on every grid.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from tokenflex_kernels.library import define
from tokenflex_kernels.pool_norm.plan import RUN_FIELDS, PoolPlan, grids_of
from tokenflex_kernels.tracing import is_exporting

IMAGE_POSITIONS = ("sequential", "shared")
OCTAVES = 4
NUM_FEATURES = 2 * 2 * OCTAVES


def cell_positions(plan: PoolPlan, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the position features of every cell of ``plan``: [sum of h*w, NUM_FEATURES].

    For each axis of an image from 0 to 1 they are the means over the cell of sin and cos of
    ``2^k pi y``, k = 0 .. 3. The features of a cell are the mean of those of its parts, as for
    pooled patches, and hold its position and its size. Means of Fourier features over a region are
    those of Mip-NeRF (Barron et al., 2021).
    """
    if is_exporting():  # as constants and plain ops, which other runtimes know
        images = [
            _grid_positions.__wrapped__(height, width, dtype, device).expand(number, -1, -1)
            for number, _, _, height, width in plan.runs
        ]
        return torch.cat([image.flatten(0, 1) for image in images])
    positions: torch.Tensor = _cell_positions(grids_of(plan), plan.num_cells, dtype, device)
    return positions


def check_position(position: object, *, name: str = "position") -> str | None:
    """Return ``position`` if it is None or "normalized"; raise a ValueError otherwise."""
    if position is not None and position != "normalized":
        raise ValueError(f"{name} must be None or 'normalized', got {position!r}")
    return None if position is None else str(position)


def check_image_positions(image_positions: object, projector_position: str | None) -> str:
    """Return ``image_positions`` if it fits ``projector_position``; raise a ValueError if not."""
    if image_positions not in IMAGE_POSITIONS:
        raise ValueError(
            f"image_positions must be one of {', '.join(IMAGE_POSITIONS)}, got {image_positions!r}"
        )
    if image_positions == "shared" and projector_position is None:
        raise ValueError(
            "image_positions='shared' needs projector_position='normalized', got None: nothing "
            "else tells an image's tokens apart"
        )
    return str(image_positions)


def check_sequential(name: str, config: Any) -> None:
    """Refuse ``name`` for a model whose images' tokens share a position.

    Raises:
        ValueError: ``image_positions`` of ``config`` is not "sequential". Converted stock models
            have no such field.
    """
    image_positions = getattr(config, "image_positions", "sequential")
    if image_positions != "sequential":
        raise ValueError(
            f"{name} needs a model with image_positions='sequential', got {image_positions!r}: a "
            "plain language model numbers the positions of embeddings one by one. tokenflex serve "
            "and vLLM with the plugin of tokenflex serve such a model whole"
        )


def _positions_of_grids(
    grids: torch.Tensor, cells: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    images = [
        _grid_positions(height, width, dtype, device).expand(number, -1, -1).flatten(0, 1)
        for number, _, _, height, width in grids.view(-1, RUN_FIELDS).tolist()
    ]
    return torch.cat(images) if images else _shape(grids, 0, dtype, device)


# Kept forever, a few kilobytes per grid, because a CUDA graph refers to their address.
@cache
def _grid_positions(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[h*w, NUM_FEATURES], row-major."""
    with torch.inference_mode(False):  # backward may save it
        rows = _axis_positions(height)[:, None].expand(-1, width, -1)
        columns = _axis_positions(width)[None].expand(height, -1, -1)
        return torch.cat([rows, columns], -1).flatten(0, 1).to(device, dtype)


def _axis_positions(cells: int) -> torch.Tensor:
    """float64 [cells, 2 * OCTAVES]."""
    octaves = 2.0 ** torch.arange(OCTAVES, dtype=torch.float64)
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    angles = centres[:, None] * math.pi * octaves
    # The mean of a wave over a cell is its value at the centre times this factor.
    damping = torch.sinc(octaves / (2 * cells))
    return torch.cat([angles.sin() * damping, angles.cos() * damping], -1)


def _shape(
    grids: torch.Tensor, cells: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.empty(cells, NUM_FEATURES, dtype=dtype, device=device)


_cell_positions = define(
    "cell_positions", _shape, _positions_of_grids, keys=["CompositeExplicitAutograd"]
)


def shared_image_positions(
    position_ids: torch.Tensor, rows: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """Return positions in which all tokens of an image have the position of its last token.

    The distance of text to an image before it then does not depend on the image's count. Text keeps
    its positions, tokens that are generated later included.

    Args:
        position_ids: int64 [total], 0, 1, 2, .. within each sequence.
        rows: int [vision], rows of the vision tokens, ascending.
        images: int [vision], index of each vision token's image.
    """
    if not len(rows):
        return position_ids
    # An image ends where the next one begins, or where text or another sequence does.
    ends = rows.new_ones(len(rows), dtype=torch.bool)
    ends[:-1] = (rows[1:] != rows[:-1] + 1) | (images[1:] != images[:-1])
    indices = torch.arange(len(rows), device=rows.device)
    last = torch.where(ends, indices, len(rows)).flip(0).cummin(0).values.flip(0)
    return position_ids.index_copy(0, rows.long(), position_ids[rows[last].long()])
