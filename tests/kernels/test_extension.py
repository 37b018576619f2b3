"""The compiled extension and its build: what it needs, what it exports, how a choice is refused."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenflex_kernels import pack_embeddings, plan_packing
from tokenflex_kernels._backend import extension

SETUP = Path(__file__).parents[2] / "setup.py"
PLAN = plan_packing([[1, 9]], [2], 9)


def test_extension_is_built():
    assert extension() is not None


def test_extension_loads_without_torch_or_a_driver():
    """Loaded by its file, in a process that has imported neither the package nor torch."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {extension().__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.cuda_device_count())"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert int(done.stdout) == torch.cuda.device_count()


def test_extension_says_what_it_was_built_for():
    compiled = extension()
    assert isinstance(compiled.has_cuda, bool)
    assert bool(compiled.cuda_architectures) == compiled.has_cuda
    if compiled.has_cuda:
        *machine_code, ptx = compiled.cuda_architectures
        assert all(name.startswith("sm_") for name in machine_code)
        assert ptx == machine_code[-1].replace("sm_", "compute_")
        assert callable(compiled.pack_rows_cuda)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols")
def test_extension_exports_its_entry_point_only():
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", extension().__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == {"PyInit__C"}


@pytest.mark.parametrize(
    ("bits", "widest"),
    [(0, 16), (16, 16), (48, 16), (8, 8), (4096 | 24, 8), (12, 4), (6, 2), (2**40 | 5, 1)],
)
def test_access_is_as_wide_as_every_address_and_stride_allow(bits, widest):
    assert extension().access_bytes(bits) == widest


def test_negative_strides_have_alignment_too():
    assert extension().access_bytes((-24) % 2**64) == 8


@pytest.mark.parametrize("size", [0, 1, 2, 7, 15, 16, 17, 31, 33, 100, 2310])
def test_a_row_is_split_into_the_widest_accesses_of_both_addresses(size):
    for start, other in itertools.product(range(32, 64), range(64, 96)):
        width, head, body, tail = extension().row_split(start, other, size)
        assert width == max(w for w in (1, 2, 4, 8, 16) if (start - other) % w == 0)
        assert head + width * body + tail == size
        assert 0 <= head < width
        assert 0 <= tail < width
        if body:
            assert (start + head) % width == (other + head) % width == 0
        else:
            assert size < 2 * width


@pytest.mark.parametrize("lanes", [1, 2, 32, 256])
@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 63, 130, 2310])
def test_the_lanes_of_a_row_move_every_byte_once(size, lanes):
    """As the device's threads do, for all ways two addresses can lie."""
    memory = np.random.default_rng(0).integers(0, 255, size + 16, np.uint8)
    source = np.empty(size + 32, np.uint8)
    target = np.empty(size + 64, np.uint8)
    source = source[-source.ctypes.data % 16 :][: size + 16]
    target = target[-target.ctypes.data % 16 :][: size + 32]
    source[:] = memory
    for start, other in itertools.product(range(16), range(16)):
        target[:] = 255
        extension().copy_row_by_lanes(
            source.ctypes.data + start, target.ctypes.data + other, size, lanes
        )
        assert np.array_equal(target[other : other + size], memory[start : start + size])
        assert (target[:other] == 255).all()
        assert (target[other + size :] == 255).all()


# ---- TOKENFLEX_BACKEND


def test_asking_for_cuda_on_cpu_tensors_is_refused(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match=r"TOKENFLEX_BACKEND=cuda .* pack_embeddings cannot run it on cpu tensors"
    ):
        pack_embeddings(torch.randn(2, 4), torch.randn(2, 4), PLAN)


def test_a_refused_backend_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "cuda")
    built = "built with nvcc" if extension().has_cuda else "built without nvcc"
    devices = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"extension is {built}.* sees {devices} CUDA devices"):
        pack_embeddings(torch.randn(2, 4), torch.randn(2, 4), PLAN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_a_gpu_is_an_error_in_cudas_words():
    if not extension().has_cuda:
        pytest.skip("needs an extension built with nvcc")
    with pytest.raises(
        RuntimeError, match=r"cudaGetDevice failed: cudaError\w+: .*(driver|device)"
    ):
        extension().gather_rows_cuda(0, 16, 0, 16, 0, 1, 16, 0, 0)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="one of auto, reference, triton, cuda, but is 'cudnn'"):
        plan_packing([[1]], [], 9)


# ---- setup.py


def build(folder: Path, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run our setup.py over one C++ file."""
    for package in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(package)
    shutil.copy(SETUP, folder)
    (folder / "csrc").mkdir()
    shutil.copy(SETUP.parent / "csrc" / "exports.map", folder / "csrc")
    (folder / "csrc" / "only.cpp").write_text(source)
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


needs_setup = pytest.mark.skipif(not SETUP.exists(), reason="needs the source checkout")


@needs_setup
def test_a_failed_compile_shows_the_compilers_message(tmp_path):
    done = build(tmp_path, "int broken = not_declared;", TOKENFLEX_CUDA="0")
    assert done.returncode != 0
    assert "without CUDA" in done.stdout
    assert "not_declared" in done.stdout
    assert "building tokenflex_kernels._C failed" in done.stderr


@needs_setup
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TOKENFLEX_CUDA": "yes"}, "TOKENFLEX_CUDA must be 0 or 1 where it is set, but is 'yes'"),
        ({"TOKENFLEX_CUDA_ARCHITECTURES": "90;7"}, "TOKENFLEX_CUDA_ARCHITECTURES asks for 7, but"),
    ],
)
def test_a_build_setting_that_cannot_be_met_is_refused(tmp_path, environment, message):
    if "TOKENFLEX_CUDA_ARCHITECTURES" in environment and not extension().has_cuda:
        pytest.skip("needs nvcc")
    done = build(tmp_path, "", **environment)
    assert done.returncode != 0
    assert message in done.stderr
