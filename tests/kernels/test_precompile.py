"""Compiling in processes of their own: what comes back, and what is not worth measuring."""

from __future__ import annotations

import pytest

from tests.kernels.test_aot import compiled
from tokenflex_kernels.gpus import blocks_at_once
from tokenflex_kernels.launch_configs import RowConfig, TileConfig
from tokenflex_kernels.precompile import Built, Launch, build, unfit

pytest.importorskip("triton")

GOOD = Launch("scale_shift", "bfloat16", RowConfig(4, 1, 1, 4, 64))


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_what_compiles_and_what_does_not():
    bad = Launch("pointwise", "bfloat16", TileConfig(48, 64, 0, 8, 4, 1))
    built = dict(build("sm_90", [GOOD, bad], jobs=1))
    ((kernel, warps),) = built[GOOD].kernels
    assert (kernel.kernel, kernel.stack, warps) == ("scale_shift_kernel", 0, 4)
    assert built[GOOD].error == ""
    assert built[bad].kernels == ()
    assert built[bad].error.startswith("CompilationError: ")


def test_without_time_nothing_comes_back():
    assert list(build("sm_90", [GOOD], seconds=0.0)) == []
    assert list(build("sm_90", [])) == []


@pytest.mark.parametrize(
    ("changes", "warps", "reason"),
    [
        ({}, 8, ""),
        ({"shared": 232_448}, 8, ""),
        ({"stack": 8}, 8, "spills: 8 bytes of stack"),
        ({"shared": 232_449}, 8, "232449 bytes of shared memory, a block has 232448"),
        ({"registers": 255}, 16, "255 registers of 16 warps do not fit a multiprocessor"),
        ({"architecture": "gfx942", "registers": 512, "shared": 65536}, 16, ""),
        ({"architecture": "gfx942", "shared": 65537}, 4, "65537 bytes of shared memory"),
    ],
)
def test_what_is_not_worth_measuring(changes, warps, reason):
    kernel = compiled(**changes)
    found = unfit(kernel.architecture, Built(((kernel, warps),)))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_an_error_is_the_reason():
    assert unfit("sm_90", Built((), "OutOfResources: no")) == "OutOfResources: no"


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (255, 8, 0, 1),  # 256 x 256 registers are all
        (128, 8, 0, 2),
        (85, 8, 0, 2),  # allocated in eights
        (80, 8, 0, 3),
        (64, 8, 0, 4),
        (32, 8, 0, 8),
        (24, 8, 0, 8),  # 64 warps
        (64, 8, 100_000, 2),
        (64, 8, 232_448, 1),
        (64, 8, 232_449, 0),
        (255, 16, 0, 0),
    ],
)
def test_blocks_at_once_on_hopper(registers, warps, shared, blocks):
    assert blocks_at_once("sm_90", registers, warps, shared) == blocks
