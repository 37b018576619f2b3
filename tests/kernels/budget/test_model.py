"""The time that is predicted from counts, and the blocks that a multiprocessor holds."""

from __future__ import annotations

from collections import Counter

import pytest

from tokenflex_kernels.budget.model import REFERENCE_GPUS, Resources, predict
from tokenflex_kernels.budget.state import Totals

H200 = REFERENCE_GPUS["sm_90"]


def totals(**changes) -> Totals:
    nothing = Totals(Counter(), 0, 0, 0, 0.0, 0, 0.0)
    return nothing._replace(**changes)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (32, 0, 4, 16),  # threads: 2048 / 128
        (32, 0, 1, 32),  # the most that there are
        (64, 0, 8, 4),  # registers: 65536 / (64 * 256)
        (81, 0, 8, 2),  # a warp takes them in steps of 256, as 88 a thread
        (128, 0, 8, 2),
        (168, 0, 8, 1),
        (255, 0, 4, 2),
        (64, 115712, 4, 2),  # 1 KiB more each: 228 KiB hold two
        (64, 115713, 4, 1),
        (255, 0, 16, 0),
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, warps, blocks):
    assert Resources(registers, shared, warps).blocks("sm_90") == blocks


SMALL = Resources(64, 0, 8)


def predicted(programs=132, resources=SMALL, unique_bytes=0, **changes):
    return predict(H200, resources, programs, [totals(**changes)], unique_bytes)


class TestLimits:
    """Each limit alone, on a clock of 1.75 GHz."""

    def test_issue(self):
        counted = predicted(instructions=Counter(control=7_000_000))
        assert counted.bound_by == "issue"
        assert counted.microseconds == pytest.approx(7_000_000 / 4 / 1750)

    @pytest.mark.parametrize(
        ("pipe", "lanes"), [("integer", 64), ("imad", 64), ("special", 16), ("shared", 32)]
    )
    def test_pipes(self, pipe, lanes):
        counted = predicted(instructions=Counter({pipe: 1_750_000}))
        assert counted.bound_by == f"{pipe} pipe"
        assert counted.microseconds == pytest.approx(1000 * 32 / lanes)

    def test_shared_memory(self):
        assert predicted(shared_cycles=1750).microseconds == pytest.approx(1)

    def test_tensor_cores(self):
        flops = 2 * 10**9
        counted = predicted(flops=flops)
        assert counted.bound_by == "tensor cores"
        assert counted.microseconds == pytest.approx(132 * flops / 770e6)

    def test_latency_counts_rounds_of_blocks(self):
        assert predicted(programs=4 * 132, cycles=1750).microseconds == pytest.approx(1)
        assert predicted(programs=4 * 132 + 1, cycles=1750).microseconds == pytest.approx(2)

    def test_the_busiest_multiprocessor_counts(self):
        one = predicted(programs=132, shared_cycles=1750).microseconds
        assert predicted(programs=133, shared_cycles=1750).microseconds == 2 * one
        assert predicted(programs=1, shared_cycles=1750).microseconds == one

    def test_l2_and_memory(self):
        assert predicted(sectors=7_500_000 // 32 // 132).times["L2"] == pytest.approx(1, rel=1e-3)
        counted = predicted(unique_bytes=4_300_000_000)
        assert (counted.bound_by, counted.microseconds) == ("memory", pytest.approx(1000))

    def test_blocks_that_differ_are_averaged(self):
        mean = predict(
            H200, Resources(64, 0, 8), 132, [totals(cycles=1000.0), totals(cycles=2500.0)], 0
        )
        assert mean.times["latency"] == pytest.approx(1)


def test_occupancy_and_waves():
    counted = predicted(programs=132 * 10, resources=SMALL, cycles=1)
    assert (counted.blocks, counted.occupancy, counted.waves) == (4, 0.5, 2.5)


def test_a_block_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="more than a multiprocessor of H200 has"):
        predicted(resources=Resources(255, 0, 16))
