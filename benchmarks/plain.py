"""The projector in plain PyTorch, which is the eager peer and in float64 the truth, and its inputs.

Shapes are SigLIP's and Qwen2.5's: 27 x 27 patches of 1152 features, 3456 hidden, 2048 or 3584 out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Batch, Leaves

SIDE = 27
EPS = 1e-5
WIDTHS = (1152, 3456, 2048)  # of a patch, the hidden layer, and a token
BIASES = ("gate_bias", "up_bias", "down_bias")
Grid = tuple[int, int]
Shapes = dict[str, tuple[int, ...]]


def weight_shapes(vision: int, hidden: int, text: int) -> Shapes:
    return {
        "norm_weight": (vision,),
        "norm_bias": (vision,),
        "gate_weight": (hidden, vision),
        "gate_bias": (hidden,),
        "up_weight": (hidden, vision),
        "up_bias": (hidden,),
        "down_weight": (text, hidden),
        "down_bias": (text,),
    }


@dataclass(frozen=True)
class Grids:
    """The grids of a batch's images, and the indices of PyTorch's loop over kinds of grids."""

    inputs: list[Grid]  # (height, width) of each image, the same of all
    outputs: list[Grid]
    groups: list[tuple[Grid, torch.Tensor]]  # a grid, and int64 numbers of its images
    order: torch.Tensor | None  # row r of the result is row order[r] of the groups; None for one


def grids_of(out_grids: Sequence[Grid], device: str, side: int = SIDE) -> Grids:
    images: dict[Grid, list[int]] = defaultdict(list)
    for image, grid in enumerate(out_grids):
        images[grid].append(image)
    rows = torch.arange(number_of_tokens(out_grids)).split([h * w for h, w in out_grids])
    order = torch.cat([rows[i] for numbers in images.values() for i in numbers]).argsort()
    return Grids(
        inputs=[(side, side)] * len(out_grids),
        outputs=list(out_grids),
        groups=[(grid, torch.tensor(numbers, device=device)) for grid, numbers in images.items()],
        order=order.to(device) if len(images) > 1 else None,
    )


def number_of_tokens(grids: Sequence[Grid]) -> int:
    return sum(height * width for height, width in grids)


def square(images: int, side: int) -> list[Grid]:
    return [(side, side)] * images


def mixed(tens: int) -> list[Grid]:
    """Return 64, 144 and 256 tokens at 2 : 3 : 5 for 10 images, shuffled, ``tens`` times."""
    return [(side, side) for side in (16, 12, 16, 8, 16, 12, 16, 8, 12, 16)] * tens


def uniform(tens: int) -> list[Grid]:
    """Return as many images and tokens as ``mixed``, all of one kind: 184 = 8 x 23 tokens each."""
    return [(8, 23)] * (10 * tens)


def random_batches(
    shapes: Shapes, grids: Sequence[Grid] = (), side: int = SIDE
) -> Callable[..., Batch]:
    """Return a case's ``batch``: normal inputs, weights that keep their variance, norms around 1.

    Args:
        shapes: Shapes of the leaves, and of "grad".
        grids: The batch's ``fixed``.
        side: Of each image's square grid of patches.
    """

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        generator = torch.Generator(device).manual_seed(seed)
        leaves = {}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator, device=device)
            if name == "norm_weight":
                values = 1 + 0.1 * values
            elif name.endswith("weight"):
                values = values / shape[1] ** 0.5
            elif name.endswith("bias"):
                values = 0.1 * values
            leaves[name] = values.to(dtype)
        fixed = grids_of(grids, device, side) if grids else None
        return Batch(grad=leaves.pop("grad"), leaves=leaves, fixed=fixed)

    return batch


# ---- stages


def pool(x: torch.Tensor, grid: Grid, side: int = SIDE) -> torch.Tensor:
    """Pool flat patches to flat cells. Patches lie channels-last already: nothing is copied."""
    width = x.shape[-1]
    images = x.view(-1, side, side, width).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(images, grid).permute(0, 2, 3, 1).reshape(-1, width)


def by_group(
    x: torch.Tensor, grids: Grids, stage: Callable[[torch.Tensor, Grid], torch.Tensor]
) -> torch.Tensor:
    """Apply a stage to each kind of grid, and put the rows into the order of the images."""
    if grids.order is None:
        return stage(x, grids.groups[0][0])
    images = x.view(len(grids.inputs), -1, x.shape[1])
    parts = [stage(images[numbers].flatten(0, 1), grid) for grid, numbers in grids.groups]
    return torch.cat(parts)[grids.order]


def by_image(
    x: torch.Tensor, grids: Grids, stage: Callable[[torch.Tensor, Grid], torch.Tensor]
) -> torch.Tensor:
    """Apply a stage to each image: on a CPU, copying images into groups costs more than calls."""
    if grids.order is None:
        return stage(x, grids.groups[0][0])
    images = x.split(len(x) // len(grids.inputs))
    return torch.cat([stage(*pair) for pair in zip(images, grids.outputs, strict=True)])


def layer_norm(x: torch.Tensor, leaves: Leaves) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], leaves["norm_weight"], leaves["norm_bias"], EPS)


def gate_up(x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, torch.Tensor]:
    gate = F.linear(x, leaves["gate_weight"], leaves.get("gate_bias"))
    return gate, F.linear(x, leaves["up_weight"], leaves.get("up_bias"))


def down(product: torch.Tensor, leaves: Leaves) -> torch.Tensor:
    return F.linear(product, leaves["down_weight"], leaves.get("down_bias"))


# ---- ops


def pool_norm(leaves: Leaves, grids: Grids) -> torch.Tensor:
    x, (side, _) = leaves["x"], grids.inputs[0]
    loop = by_image if x.is_cpu else by_group
    return layer_norm(loop(x, grids, partial(pool, side=side)), leaves)


def swiglu(leaves: Leaves, _: object = None) -> torch.Tensor:
    gate, up = gate_up(leaves["x"], leaves)
    return F.silu(gate) * up


def project_tokens(leaves: Leaves, grids: Grids) -> torch.Tensor:
    return down(swiglu({**leaves, "x": pool_norm(leaves, grids)}), leaves)
