"""`plan_pooling`: the patch grids and output grids of a batch, checked once on the host.

A batch may mix grids freely. Its plan is made once, for example in a collator, and serves every op
and every call. A compiler treats a plan as one dynamic value, whereas it would compile anew for
each length of lists of grids.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

import torch

from tokenflex_kernels.checks import Grid, check_grids
from tokenflex_kernels.library import define
from tokenflex_kernels.set_once import SetOnce

Run = tuple[int, int, int, int, int]
RUN_FIELDS = 5
CACHED_PLANS = 1024
MARSHAL_VERSION = 2  # the last one whose bytes do not depend on how often an object is referred to
LARGE_BATCH = 4096  # images; 1024 cached plans of larger batches would take too much memory


@dataclass(eq=False, kw_only=True)
class PoolPlan(SetOnce):
    """The grids of one batch, made by :func:`plan_pooling`. Its fields never change.

    Attributes:
        runs: (images, H, W, h, w) for each run of equal images; a uniform batch has one.
        grids: ``runs`` as an int64 [5 * runs] tensor on the host; None while a compiler traces.
            It is flat because a compiler specialises dimensions of 1.
        num_images: images of the batch.
        num_patches: sum of H * W, the rows of the input.
        num_cells: sum of h * w, the rows of the result.
    """

    runs: tuple[Run, ...]
    grids: torch.Tensor | None
    num_images: int
    num_patches: int
    num_cells: int


def plan_pooling(in_grids: Sequence[Grid], out_grids: Sequence[Grid]) -> PoolPlan:
    """Plan the pooling of a batch, for :func:`pool_norm`, :func:`project_tokens`, the projector.

    Args:
        in_grids: one (H, W) per image, host ints.
        out_grids: one (h, w) per image, host ints.

    Raises:
        TypeError: an argument is not a sequence of (height, width) pairs of ints.
        ValueError: a side is below 1 or above 65536, or the lists differ in length.

    Example:
        >>> plan = plan_pooling([(27, 27), (27, 27)], [(8, 8), (16, 16)])
        >>> plan.num_patches, plan.num_cells
        (1458, 320)
    """
    if torch.compiler.is_compiling():
        return _plan_of_lists(in_grids, out_grids)
    return plan_eagerly(in_grids, out_grids)


def plan_eagerly(in_grids: Sequence[Grid], out_grids: Sequence[Grid]) -> PoolPlan:
    """Return what :func:`plan_pooling` does, for callers that no compiler traces."""
    if torch._C._len_torch_dispatch_stack() == 0:
        try:
            if len(in_grids) <= LARGE_BATCH:
                lists: Any = in_grids, out_grids
                return _plan_of_bytes(marshal.dumps(lists, MARSHAL_VERSION))
        except (TypeError, ValueError):
            pass  # of other types than Python's own, or wrong: see below
    return _plan_of_lists(in_grids, out_grids)


def _plan_of_lists(in_grids: Sequence[Grid], out_grids: Sequence[Grid]) -> PoolPlan:
    in_list = check_grids("in_grids", in_grids)
    out_list = check_grids("out_grids", out_grids)
    if len(in_list) != len(out_list):
        raise ValueError(
            "in_grids and out_grids must have one entry per image each, got "
            f"{len(in_list)} and {len(out_list)}"
        )
    if _is_traced():
        # Nothing is compared: it would make a graph for each outcome.
        images = zip(in_list, out_list, strict=True)
        return _plan(tuple((1, *in_grid, *out_grid) for in_grid, out_grid in images))
    runs = groupby(zip(in_list, out_list, strict=True))
    return _plan_of_runs(
        tuple((sum(1 for _ in alike), *in_grid, *out_grid) for (in_grid, out_grid), alike in runs)
    )


@lru_cache(CACHED_PLANS)
def _plan_of_bytes(lists: bytes) -> PoolPlan:
    """Return the plan of marshalled lists: bytes tell 1 and True apart, and are compared fast."""
    return _plan_of_lists(*marshal.loads(lists))


def plan_uniform(num_images: int, in_grid: Grid, out_grid: Grid) -> PoolPlan:
    """Plan ``num_images`` images of one grid, pooled to one grid; the arguments are not checked.

    The plan is one run, so a compiler need not know the number of images.
    """
    runs = ((num_images, *in_grid, *out_grid),)
    return _plan(runs) if _is_traced() else _plan_of_runs(runs)


def _is_traced() -> bool:
    """Return True while tracing or in a special mode, when a plan must not be cached."""
    return torch.compiler.is_compiling() or is_watched()


def is_watched() -> bool:
    """Return whether a PyTorch mode intercepts ops, such as that of fake tensors."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _plan_of_runs(runs: tuple[Run, ...]) -> PoolPlan:
    make = _cached_plan_with_grids if len(runs) <= LARGE_BATCH else _plan_with_grids
    return make(runs)


def _plan_with_grids(runs: tuple[Run, ...]) -> PoolPlan:
    with torch.inference_mode(False):  # backward may need it
        grids = torch.tensor(list(chain.from_iterable(runs)), dtype=torch.int64, device="cpu")
    return _plan(runs, grids)


_cached_plan_with_grids = lru_cache(CACHED_PLANS)(_plan_with_grids)


def _plan(runs: tuple[Run, ...], grids: torch.Tensor | None = None) -> PoolPlan:
    num_patches, num_cells = count_rows(runs)
    return PoolPlan(
        runs=runs,
        grids=grids,
        num_images=sum(run[0] for run in runs),
        num_patches=num_patches,
        num_cells=num_cells,
    )


def count_rows(runs: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Return the numbers of patches and of cells in the runs."""
    patches = cells = 0
    for images, in_h, in_w, out_h, out_w in runs:
        patches += images * in_h * in_w
        cells += images * out_h * out_w
    return patches, cells


def _grid_tensor(runs: list[int]) -> torch.Tensor:
    return torch.tensor(runs, dtype=torch.int64, device="cpu")


grid_tensor = define(
    "grid_tensor",
    lambda runs: torch.empty(len(runs), dtype=torch.int64, device="cpu"),
    _grid_tensor,
    keys=["CompositeExplicitAutograd"],
)


def grids_of(plan: PoolPlan) -> torch.Tensor:
    """Return ``plan.grids``, or an op's result where a graph or a mode must see how it is made."""
    if plan.grids is None or is_watched():
        grids: torch.Tensor = grid_tensor([field for run in plan.runs for field in run])
        return grids
    return plan.grids
