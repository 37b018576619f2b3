"""The compiled extension and its build: what it needs, what it exports, how a choice is refused."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenflex_kernels import pack_embeddings, plan_packing
from tokenflex_kernels.backend import extension

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


def test_an_extension_that_cannot_be_loaded_says_how_to_build_it(monkeypatch):
    def load(name):
        raise ImportError("libc.so.6: version `GLIBC_2.34' not found", name=name, path="_C.so")

    monkeypatch.setattr("tokenflex_kernels.backend.importlib.import_module", load)
    with pytest.raises(ImportError, match=r"GLIBC_2.34.* pip install .*--no-binary tokenflex"):
        extension.__wrapped__()


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


# ---- what threads share


@pytest.mark.parametrize(
    ("count", "bytes_in_all", "threads", "parts"),
    [
        (1000, 64 * 2**20, 1, 1),
        (1000, 64 * 2**20, 4, 4),  # as many as there are threads
        (1000, 3 * 2**18, 4, 3),  # with a quarter of a megabyte each
        (1000, 2**18 - 1, 4, 1),  # which is less than a thread is worth
        (2, 64 * 2**20, 4, 2),  # an item each at least
        (0, 0, 4, 1),
    ],
)
def test_threads_share_what_is_worth_a_thread(count, bytes_in_all, threads, parts):
    assert extension().worthwhile_parts(count, bytes_in_all, threads) == parts


MOVES_IN_PARTS = """
import os, numpy as np, torch, tokenflex_kernels as tk
from tokenflex_kernels.backend import extension

torch.set_num_threads(4)
plan = tk.plan_packing([torch.tensor([3, 9, 5])], [2047], 9)
table, vision = torch.randn(10, 256), torch.randn(2047, 256)
packed = lambda: tk.pack_embeddings(table, vision, plan)
expected = torch.cat([table[3:4], vision, table[5:6]]).numpy()
same = lambda result: np.testing.assert_array_equal(result.numpy(), expected)
"""


@pytest.mark.parametrize(
    "case",
    {
        "PyTorch's threads": "assert extension().has_torch_team(); same(packed())",
        "threads of its own": "extension().allow_torch_team(False); same(packed())",
        "a forked process": """
vision.exp()
child = os.fork()
if child == 0:
    same(packed())
    os._exit(0 if not extension().has_torch_team() else 3)
assert os.waitpid(child, 0)[1] == 0
""",
    }.items(),
    ids=lambda case: case[0],
)
def test_threads_are_torchs_where_it_has_some_and_a_fork_still_moves_rows(case):
    subprocess.run([sys.executable, "-c", MOVES_IN_PARTS + case[1]], check=True, timeout=60)


@dataclass
class Rows:
    """Rows in memory of their own: their bytes, and what the extension is told of them."""

    memory: np.ndarray
    offset: int
    stride: int
    row_bytes: int

    @classmethod
    def random(cls, rows, row_bytes, offset=0, gap=0):
        size = (row_bytes + gap) * rows + offset + 64
        memory = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        return cls(memory, -memory.ctypes.data % 32 + offset, row_bytes + gap, row_bytes)

    @property
    def place(self):
        return self.memory.ctypes.data + self.offset, self.stride

    def __getitem__(self, row):
        begin = self.offset + row * self.stride
        return self.memory[begin : begin + self.row_bytes]


SOURCE = np.array([2, ~0, ~3, 0, ~1, 1, 2, ~2] * 37, np.int32)  # 3 table and 4 vision rows
# How one of the rows may lie: aligned to 16 bytes, at another address, at another distance.
LIES = {"aligned": (0, 0), "address": (4, 0), "stride": (0, 8), "both": (2, 3)}


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("which", ["table", "vision", "packed"])
@pytest.mark.parametrize("row_bytes", [16, 48, 100, 4096, 70_000])
def test_the_threads_of_a_device_pack_every_row(row_bytes, which, lies):
    """All blocks and threads one after another, whichever rows lie apart from 16 bytes."""
    table, vision, packed = (
        Rows.random(rows, row_bytes, *(LIES[lies] if name == which else (0, 0)))
        for name, rows in [("table", 3), ("vision", 4), ("packed", len(SOURCE))]
    )
    job = (*table.place, *vision.place, *packed.place, SOURCE.ctypes.data, len(SOURCE), row_bytes)
    wide, threads_per_row, blocks = extension().pack_rows_by_threads(*job, True)
    assert wide == (row_bytes % 16 == 0 and lies == "aligned")
    assert 256 % threads_per_row == 0
    assert blocks == -(-len(SOURCE) // (256 // threads_per_row))
    for row, entry in enumerate(SOURCE.tolist()):
        assert np.array_equal(packed[row], table[entry] if entry >= 0 else vision[~entry])


@pytest.mark.parametrize("where", ["device", "host"])
def test_without_an_address_of_vision_its_rows_are_left_as_they_are(where):
    table, packed = Rows.random(3, 48), Rows.random(len(SOURCE), 48)
    before = [packed[row].copy() for row in range(len(SOURCE))]
    job = (*table.place, 0, 0, *packed.place, SOURCE.ctypes.data, len(SOURCE), 48)
    if where == "device":
        extension().pack_rows_by_threads(*job, True)
    else:
        extension().pack_rows(*job, 3, 4, False, 1)
    for row, entry in enumerate(SOURCE.tolist()):
        assert np.array_equal(packed[row], table[entry] if entry >= 0 else before[row])


@pytest.mark.parametrize("where", ["device", "host"])
def test_neighbours_in_the_table_around_vision_rows_are_two_runs(where):
    source = np.array([0, ~0, 1, 2, ~1, ~2, 0], np.int32)
    table, packed = Rows.random(3, 48), Rows.random(len(source), 48)
    before = [packed[row].copy() for row in range(len(source))]
    job = (*table.place, 0, 0, *packed.place, source.ctypes.data, len(source), 48)
    if where == "device":
        extension().pack_rows_by_threads(*job, True)
    else:
        extension().pack_rows(*job, 3, 4, False, 1)
    for row, entry in enumerate(source.tolist()):
        assert np.array_equal(packed[row], table[entry] if entry >= 0 else before[row])


def grid_of(stride, row_bytes, rows, offset=0):
    """(wide, threads_per_row, blocks) for a table at address ``offset``, and no row moved."""
    job = (offset, stride, 0, stride, 0, stride, 0, rows, row_bytes)
    return extension().pack_rows_by_threads(*job, False)


@pytest.mark.parametrize(
    ("row_bytes", "offset", "threads_per_row"),
    [
        (16, 0, 1),  # one access
        (64, 0, 1),  # four, which one thread has in flight
        (80, 0, 2),
        (4096, 0, 64),
        (2**20, 0, 256),  # a block
        (4096, 8, 128),  # of 8 bytes each
        (4096, 1, 256),
    ],
)
def test_a_row_has_a_thread_for_four_accesses(row_bytes, offset, threads_per_row):
    blocks = -(-1000 // (256 // threads_per_row))
    assert grid_of(row_bytes, row_bytes, 1000, offset)[1:] == (threads_per_row, blocks)


def test_rows_that_are_no_whole_number_of_accesses_are_split():
    """Though every address and stride is a multiple of 16."""
    assert grid_of(112, 100, 10)[0] is False
    assert grid_of(112, 96, 10)[0] is True


FAR = 2**32  # bytes: in 32 bits, nothing


def test_rows_may_lie_four_gigabytes_apart():
    """Offsets are of 64 bits, read and written. Only the pages of the rows are ever touched."""
    memory = {name: np.empty(FAR + 64, np.uint8) for name in ("from", "to", "vision")}
    where = {name: Rows(bytes_, 0, FAR, 64) for name, bytes_ in memory.items()}
    for number, rows in enumerate(where.values()):
        rows[0][:], rows[1][:] = 10 * number, 10 * number + 1
    source = np.array([1, ~1], np.int32)
    places = (*where["from"].place, *where["vision"].place, *where["to"].place)
    extension().pack_rows(*places, source.ctypes.data, 2, 64, 2, 2, False, 1)
    assert [set(where["to"][row].tolist()) for row in (0, 1)] == [{1}, {21}]


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
        extension().pack_rows_cuda(0, 16, 0, 16, 0, 16, 0, 1, 16, 0, 0)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="reference, native, triton, cuda, but is 'cudnn'"):
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
    ("known", "built"),
    [
        ("75 80 86 87 89 90 90a 100 103 120", "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"),
        ("70 75 80 86 87 89 90", "sm_80, sm_86, sm_89, sm_90"),
    ],
)
def test_builds_for_every_architecture_that_nvcc_knows(tmp_path, known, built):
    """By an nvcc that knows which there are, and compiles nothing."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    codes = " ".join(f"sm_{code}" for code in known.split())
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && printf "%s\\n" {codes}\n')
    nvcc.chmod(0o755)
    automatic = {"TOKENFLEX_CUDA": "", "TOKENFLEX_CUDA_ARCHITECTURES": ""}
    done = build(tmp_path, "", CUDA_HOME=str(nvcc.parents[1]), **automatic)
    newest = built.split("_")[-1]
    assert f"building with CUDA for {built}, compute_{newest}\n" in done.stdout


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
