"""Predict the time of a launch from what its blocks issue and move, for one reference GPU.

The time is the largest of these, each as if it were the only limit:

    issue      4 warp-instructions a cycle on each multiprocessor
    a pipe     its lanes a cycle: integers, special functions, loads and stores, ...
    shared     128 bytes of shared memory a cycle, operands of wgmma included
    tensor     the operations of the tensor cores, at the rate of the library's products
    latency    a block's time alone, for as many rounds of blocks as the multiprocessor must hold
    L2         the sectors that loads touch, whatever the first-level cache would save; no stores
    memory     the bytes of all arguments, each once, at copy bandwidth

The busiest multiprocessor counts: the tail of the grid is in every line but the last two. Limits
overlap less than perfectly in a real kernel, so a prediction is an optimistic one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenflex_kernels.budget.state import WARP, Totals
from tokenflex_kernels.budget.walk import ISSUES, LANES
from tokenflex_kernels.gpus import blocks_at_once, most_warps


@dataclass(frozen=True)
class ReferenceGpu:
    """The GPU of an architecture for which predictions are made.

    Attributes:
        name: of the GPU.
        capability: compute capability, 90 for sm_90.
        multiprocessors: of the GPU.
        clock: GHz. An assumption: power lowers the clock while tensor cores are busy, which counts
            in ``matmul`` alone.
        copy: GB/s of a large copy in its memory, read and written bytes together.
        l2: GB/s that the second-level cache delivers. An assumption.
        matmul: TFLOP/s of a large bfloat16 product of the library.
    """

    name: str
    capability: int
    multiprocessors: int
    clock: float
    copy: float
    l2: float
    matmul: float

    @property
    def architecture(self) -> str:
        """Its architecture, "sm_90" for instance."""
        return f"sm_{self.capability}"


# Copy and product as they were read on such a machine before this project; not measured with it.
REFERENCE_GPUS = {
    "sm_90": ReferenceGpu("H200", 90, 132, clock=1.75, copy=4300.0, l2=7500.0, matmul=770.0),
}


@dataclass(frozen=True)
class Resources:
    """Needs of a block of a kernel: registers of a thread, bytes of shared memory, warps."""

    registers: int
    shared: int
    warps: int

    def blocks(self, architecture: str) -> int:
        """Return the blocks that a multiprocessor holds at once."""
        return blocks_at_once(architecture, self.registers, self.warps, self.shared)


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one launch.

    Attributes:
        blocks: that a multiprocessor holds at once.
        occupancy: share of the threads that it could hold.
        waves: rounds of blocks until the grid is done, the last one as a part.
        times: microseconds by limit.
    """

    blocks: int
    occupancy: float
    waves: float
    times: dict[str, float]

    @property
    def bound_by(self) -> str:
        """The limit that takes longest."""
        return max(self.times, key=lambda limit: self.times[limit])

    @property
    def microseconds(self) -> float:
        """The predicted time."""
        return self.times[self.bound_by]


def predict(
    gpu: ReferenceGpu,
    resources: Resources,
    programs: int,
    walked: Sequence[Totals],
    unique_bytes: int,
) -> Prediction:
    """Predict the time of a launch.

    Args:
        resources: of a block.
        programs: blocks of the grid.
        walked: what some of the blocks do; the others are taken to do the same on average.
        unique_bytes: of all arguments, each counted once.
    """
    blocks = resources.blocks(gpu.architecture)
    if blocks == 0:
        raise ValueError(f"{resources} is more than a multiprocessor of {gpu.name} has")
    busiest = -(-programs // gpu.multiprocessors)  # blocks of the multiprocessor that has most
    mean = _Mean(walked)
    cycles = {
        "issue": busiest * mean.issued / ISSUES,
        **{f"{p} pipe": busiest * mean.pipe(p) * WARP / LANES[p] for p in LANES},
        "shared memory": busiest * mean.shared_cycles,
        "latency": -(-busiest // blocks) * mean.cycles,
    }
    times = {limit: count / (1e3 * gpu.clock) for limit, count in cycles.items()}
    times["tensor cores"] = busiest * mean.flops * gpu.multiprocessors / (1e6 * gpu.matmul)
    times["L2"] = 32 * mean.sectors * programs / (1e3 * gpu.l2)
    times["memory"] = unique_bytes / (1e3 * gpu.copy)
    return Prediction(
        blocks,
        occupancy=blocks * resources.warps / most_warps(gpu.architecture),
        waves=programs / (blocks * gpu.multiprocessors),
        times=times,
    )


class _Mean:
    """The mean of several blocks' totals."""

    def __init__(self, walked: Sequence[Totals]) -> None:
        self._walked = walked
        self.issued = self._mean("issued")
        self.sectors = self._mean("sectors")
        self.shared_cycles = self._mean("shared_cycles")
        self.flops = self._mean("flops")
        self.cycles = self._mean("cycles")

    def _mean(self, field: str) -> float:
        return sum(getattr(totals, field) for totals in self._walked) / len(self._walked)

    def pipe(self, name: str) -> float:
        return sum(totals.instructions[name] for totals in self._walked) / len(self._walked)
