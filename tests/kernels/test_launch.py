"""Launching: the device of a kernel, and the precision of float32 products."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from tokenflex_kernels import relaunch
from tokenflex_kernels.launch import launch, pair_source, pair_stride


@pytest.fixture
def launches(monkeypatch):
    """A kernel, and (current device, programs, arguments, options) of each of its launches."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    current, made = [0], []

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: made.append((current[0], grid, args, options))

    monkeypatch.setattr(relaunch, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    return Kernel(), made


def on_device(index, kind="cuda"):
    kinds = {f"is_{name}": name == kind for name in ("cuda", "cpu", "meta")}
    return SimpleNamespace(device=SimpleNamespace(type=kind, index=index), **kinds)


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_runs_on_the_device_of_its_tensors(launches, index):
    kernel, made = launches
    launch(kernel, 3, on_device(index), 5, num_warps=4)
    launch(kernel, 2, on_device(0), 6)
    fused = {"enable_fp_fusion": True}
    assert made == [(index, (3,), (5,), {"num_warps": 4, **fused}), (0, (2,), (6,), fused)]


@pytest.mark.parametrize("kind", ["cuda", "meta"])
def test_the_environment_decides_on_fusing_where_it_says_so(launches, monkeypatch, kind):
    kernel, made = launches
    kernel.warmup = lambda *args, grid, **options: made.append((0, grid, args, options))
    kernel.__name__ = "a_kernel"
    launch(kernel, 3, on_device(0, kind), 5, num_warps=4)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    launch(kernel, 3, on_device(0, kind), 5, num_warps=4)
    assert [options for _, _, _, options in made] == [
        {"num_warps": 4, "enable_fp_fusion": True},
        {"num_warps": 4},
    ]


def test_no_programs_are_no_launch(launches):
    kernel, made = launches
    launch(kernel, 0, on_device(0))
    assert made == []


def test_another_kind_of_device_is_refused(launches):
    kernel, _ = launches
    with pytest.raises(ValueError, match=r"CUDA tensors.*got xpu tensors"):
        launch(kernel, 1, on_device(0, "xpu"))


SETTINGS = {
    "pass": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
}
PRECISIONS = """
import os, sys, torch
from tokenflex_kernels.launch import dot_precision
for setting in sys.argv[1:]:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, setting
    else:
        exec(setting)
        print(dot_precision(torch.float32), dot_precision(torch.bfloat16), flush=True)
        os._exit(0)
"""


def test_tf32_is_used_only_if_the_user_allows_it():
    """Each setting in a process of its own: PyTorch refuses to mix its older and newer switches."""
    command = [sys.executable, "-c", PRECISIONS, *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{expected} ieee" for expected in SETTINGS.values()]


@pytest.mark.parametrize("beyond", [False, True])
def test_a_descriptor_holds_no_pair_that_is_2_to_the_40_bytes_apart(beyond):
    first, second = torch.zeros(2, 4, 16).unbind()
    distance = 2**40 if beyond else 2**40 - 16
    second.data_ptr = lambda: first.data_ptr() + distance
    assert pair_stride(first, second) == (None if beyond else distance // 4)
    assert (pair_source(second, first, [2, 4, 16]) is None) == beyond
