"""The projector's stages and the whole of it: batches, truth, and how plain PyTorch does them.

Shapes are SigLIP's and Qwen2.5's: 27 x 27 patches of C = 1152 features, H = 3456, D = 2048 or 3584.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.harness import Batch, Call, Case, Leaves, Variant, Work
from tokenflex_kernels import pool_norm, project_tokens, swiglu

C, H, D = 1152, 3456, 2048
SIDE = 27
EPS = 1e-5
Grid = tuple[int, int]

NORM = ("norm_weight", "norm_bias")
GATE_UP = ("gate_weight", "gate_bias", "up_weight", "up_bias")
DOWN = ("down_weight", "down_bias")
BIASES = ("gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Grids:
    """The grids of a batch's images, and the images of each kind of grid for PyTorch's loop.

    Attributes:
        in_grids, out_grids: one (height, width) per image.
        groups: (grid, int64 numbers of the images that get it).
        order: int64 [rows], where each row of the groups' results, one after another, belongs; None
            for one group, whose rows are in order.
    """

    in_grids: list[Grid]
    out_grids: list[Grid]
    groups: list[tuple[Grid, torch.Tensor]]
    order: torch.Tensor | None


def grids_of(out_grids: Sequence[Grid], device: str) -> Grids:
    images: dict[Grid, list[int]] = defaultdict(list)
    for image, grid in enumerate(out_grids):
        images[grid].append(image)
    sizes = torch.tensor([height * width for height, width in out_grids])
    starts = sizes.cumsum(0) - sizes
    rows = [torch.arange(starts[i], starts[i] + sizes[i]) for one in images.values() for i in one]
    return Grids(
        in_grids=[(SIDE, SIDE)] * len(out_grids),
        out_grids=list(out_grids),
        groups=[(grid, torch.tensor(one, device=device)) for grid, one in images.items()],
        # Row r of the result is row order[r] of the groups'.
        order=torch.cat(rows).argsort().to(device) if len(images) > 1 else None,
    )


def random_leaves(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str, seed: int
) -> Leaves:
    """Normal numbers: inputs of variance 1, weights that keep it, norm weights around 1."""
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
    return leaves


# ---- plain PyTorch


def pool(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Flat patches to flat cells. Patches lie channels-last already, so nothing is copied."""
    width = x.shape[-1]
    images = x.view(-1, SIDE, SIDE, width).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(images, grid).permute(0, 2, 3, 1).reshape(-1, width)


def by_group(
    x: torch.Tensor, grids: Grids, one_grid: Callable[[torch.Tensor, Grid], torch.Tensor]
) -> torch.Tensor:
    """A loop over kinds of grids, and their rows back in the order of the images."""
    if grids.order is None:
        return one_grid(x, grids.groups[0][0])
    images = x.view(-1, SIDE * SIDE, x.shape[1])
    parts = [one_grid(images[numbers].flatten(0, 1), grid) for grid, numbers in grids.groups]
    return torch.cat(parts)[grids.order]


def layer_norm(x: torch.Tensor, leaves: Leaves) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], leaves["norm_weight"], leaves["norm_bias"], EPS)


def gated_unit(x: torch.Tensor, leaves: Leaves) -> torch.Tensor:
    gate = F.linear(x, leaves["gate_weight"], leaves.get("gate_bias"))
    up = F.linear(x, leaves["up_weight"], leaves.get("up_bias"))
    return F.silu(gate) * up


def down(product: torch.Tensor, leaves: Leaves) -> torch.Tensor:
    return F.linear(product, leaves["down_weight"], leaves.get("down_bias"))


def truth_pool(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The same from the definition: cell i of n averages [floor(i S / n), ceil((i + 1) S / n))."""

    def averages(cells: int) -> torch.Tensor:
        rows = torch.zeros(cells, SIDE, dtype=torch.float64)
        for i in range(cells):
            start, end = i * SIDE // cells, -(-(i + 1) * SIDE // cells)
            rows[i, start:end] = 1 / (end - start)
        return rows.to(x)

    images = x.view(-1, SIDE, SIDE, x.shape[-1])
    cells = torch.einsum("ih,bhwc,jw->bijc", averages(grid[0]), images, averages(grid[1]))
    return cells.reshape(-1, x.shape[-1])


def truth_pool_norm(leaves: Leaves, grids: Grids) -> torch.Tensor:
    return layer_norm(by_group(leaves["x"], grids, truth_pool), leaves)


def truth_project(leaves: Leaves, grids: Grids) -> torch.Tensor:
    return down(gated_unit(truth_pool_norm(leaves, grids), leaves), leaves)


def eager_pool_norm(leaves: Leaves, grids: Grids) -> torch.Tensor:
    return by_group(leaves["x"], grids, lambda x, grid: layer_norm(pool(x, grid), leaves))


def eager_gate_up(leaves: Leaves, _: object) -> torch.Tensor:
    return gated_unit(leaves["x"], leaves)


def eager_project(leaves: Leaves, grids: Grids) -> torch.Tensor:
    def one_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return down(gated_unit(layer_norm(pool(x, grid), leaves), leaves), leaves)

    return by_group(leaves["x"], grids, one_grid)


# ---- ours, through the public functions


def our_pool_norm(leaves: Leaves, grids: Grids) -> torch.Tensor:
    return pool_norm(
        leaves["x"],
        grids.in_grids,
        grids.out_grids,
        weight=leaves["norm_weight"],
        bias=leaves["norm_bias"],
        eps=EPS,
    )


def our_gate_up(leaves: Leaves, _: object) -> torch.Tensor:
    return swiglu(*(leaves[name] for name in ("x", "gate_weight", "up_weight", *BIASES[:2])))


def our_project(save: str) -> Call:
    def project(leaves: Leaves, grids: Grids) -> torch.Tensor:
        parameters = {name: leaves.get(name) for name in (*NORM, *GATE_UP, *DOWN)}
        return project_tokens(
            leaves["x"], grids.in_grids, grids.out_grids, **parameters, eps=EPS, save=save
        )

    return project


# ---- the bare product that gate/up is held against


def both_weights(leaves: Leaves) -> Leaves:
    weight = torch.cat([leaves["gate_weight"], leaves["up_weight"]])
    return {"x": leaves["x"], "weight": weight}


def bare_product(leaves: Leaves, _: object) -> torch.Tensor:
    return leaves["x"] @ leaves["weight"].T


def bare_product_truth(leaves: Leaves, fixed: object) -> torch.Tensor:
    return bare_product(both_weights(leaves), fixed)


OURS: dict[str, list[Variant]] = {
    "pool_norm": [Variant("tokenflex", our_pool_norm, op="pool_norm")],
    "swiglu": [Variant("tokenflex", our_gate_up, op="swiglu")],
    "project_tokens": [
        Variant("tokenflex", our_project("preactivation"), op="project_tokens"),
        Variant(
            "tokenflex, save=input",
            our_project("input"),
            op="project_tokens",
            modes=("backward", "forward+backward"),
        ),
    ],
}
EAGER: dict[str, Call] = {
    "pool_norm": eager_pool_norm,
    "swiglu": eager_gate_up,
    "project_tokens": eager_project,
}
BARE_PRODUCT = Variant(
    "bare product",
    bare_product,
    prepare=both_weights,
    truth=bare_product_truth,
    modes=("forward",),
)


# ---- cases


def pooling_case(name: str, out_grids: Sequence[Grid], peers: Sequence[Variant] = ()) -> Case:
    tokens = sum(height * width for height, width in out_grids)
    patches = len(out_grids) * SIDE * SIDE

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        leaves = random_leaves(
            {"x": (patches, C), "norm_weight": (C,), "norm_bias": (C,), "grad": (tokens, C)},
            dtype,
            device,
            seed,
        )
        return Batch(grad=leaves.pop("grad"), leaves=leaves, fixed=grids_of(out_grids, device))

    def work(itemsize: int) -> dict[str, Work]:
        # Forward reads patches and writes tokens; backward reads the tokens' gradient and the
        # normalised rows, and writes the patches' gradient.
        forward = (patches + tokens) * C * itemsize
        backward = (patches + 2 * tokens) * C * itemsize
        return {
            "forward": Work(forward),
            "backward": Work(backward),
            "forward+backward": Work(forward + backward),
        }

    return Case(
        op="pool_norm",
        name=name,
        tokens=tokens,
        batch=batch,
        truth=truth_pool_norm,
        variants=[*OURS["pool_norm"], Variant("PyTorch eager", eager_pool_norm), *peers],
        work=work,
    )


def gate_up_case(tokens: int, peers: Sequence[Variant] = ()) -> Case:
    shapes = {
        "x": (tokens, C),
        "gate_weight": (H, C),
        "gate_bias": (H,),
        "up_weight": (H, C),
        "up_bias": (H,),
        "grad": (tokens, H),
    }

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        leaves = random_leaves(shapes, dtype, device, seed)
        return Batch(grad=leaves.pop("grad"), leaves=leaves, fixed=None)

    flops = 2 * tokens * C * 2 * H
    return Case(
        op="swiglu",
        name=f"T={tokens}",
        tokens=tokens,
        batch=batch,
        truth=eager_gate_up,
        variants=[
            *OURS["swiglu"],
            BARE_PRODUCT,
            Variant("PyTorch eager", eager_gate_up),
            *peers,
        ],
        work=lambda _: products(flops),
    )


def projector_case(
    name: str, out_grids: Sequence[Grid], peers: Sequence[Variant] = (), width: int = D
) -> Case:
    tokens = sum(height * width for height, width in out_grids)
    shapes = {
        "x": (len(out_grids) * SIDE * SIDE, C),
        "norm_weight": (C,),
        "norm_bias": (C,),
        "gate_weight": (H, C),
        "gate_bias": (H,),
        "up_weight": (H, C),
        "up_bias": (H,),
        "down_weight": (width, H),
        "down_bias": (width,),
        "grad": (tokens, width),
    }

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        leaves = random_leaves(shapes, dtype, device, seed)
        return Batch(grad=leaves.pop("grad"), leaves=leaves, fixed=grids_of(out_grids, device))

    ours = list(OURS["project_tokens"])
    if any(peer.without for peer in peers):  # beside a peer that takes no biases, ours without
        ours.append(Variant("tokenflex, no biases", ours[0].call, ours[0].op, without=BIASES))
    flops = 2 * tokens * (C * 2 * H + H * width)
    return Case(
        op="project_tokens",
        name=name if width == D else f"{name}, D={width}",
        tokens=tokens,
        batch=batch,
        truth=truth_project,
        variants=[*ours, Variant("PyTorch eager", eager_project), *peers],
        work=lambda _: products(flops),
    )


def products(forward_flops: int) -> dict[str, Work]:
    """Backward of a product is two of the same size."""
    return {
        "forward": Work(flops=forward_flops),
        "backward": Work(flops=2 * forward_flops),
        "forward+backward": Work(flops=3 * forward_flops),
    }


def square(images: int, side: int) -> list[Grid]:
    return [(side, side)] * images


def mixed(tens: int) -> list[Grid]:
    """64, 144 and 256 tokens at 2 : 3 : 5 for 10 images, shuffled together, ``tens`` times."""
    sides = (16, 12, 16, 8, 16, 12, 16, 8, 12, 16)
    return [(side, side) for side in sides] * tens


def as_many(tens: int) -> list[Grid]:
    """As many images as ``mixed`` and as many tokens, all of one kind: 184 = 8 x 23 each."""
    return [(8, 23)] * (10 * tens)
