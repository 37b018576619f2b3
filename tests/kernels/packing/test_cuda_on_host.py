"""The CUDA files, compiled for the host: bit for bit what the C++ functions compute.

``cuda_on_host/cuda_runtime.h`` stands for CUDA's: threads of a block are threads of the host.
Launches are rewritten to function calls; all else of the ``.cu`` files is compiled as it is, with
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
SHIM = Path(__file__).with_name("cuda_on_host")
CUDA = ("row_movers", "row_sums", "merge_source")
COMPILER = shutil.which("g++")
FLAGS = (
    *("-std=c++20", "-O0", "-pthread", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"),
    "-Wno-unused-variable",  # streams, which launches here do not take
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-I", str(SHIM), "-I", str(CSRC)),
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

_LAUNCH = re.compile(
    r"([A-Za-z_]\w*(?:<[^;{}<>]*>)?)\s*<<<(.+?), 0, stream>>>\((.+?)\);", re.DOTALL
)


def for_the_host(source: str) -> str:
    """Return CUDA C++ with each launch as a call of ``launch_on_host``."""
    kernels = re.split(r"__global__", source)[1:]
    with_barriers = {
        re.search(r"(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", kernel))[1]
        for kernel in kernels
        if "__syncthreads" in kernel
    }

    def call(match: re.Match[str]) -> str:
        kernel, shape, arguments = match.groups()
        depths = accumulate((symbol == "(") - (symbol == ")") for symbol in shape)
        comma = next(i for i, depth in enumerate(depths) if depth == 0 and shape[i] == ",")
        has_barriers = str(kernel.partition("<")[0] in with_barriers).lower()
        grid, block = shape[:comma], shape[comma + 1 :]
        body = f"[&] {{ {kernel}({arguments}); }}"
        return f"launch_on_host(dim3({grid}), dim3({block}), {has_barriers}, {body});"

    rewritten, launches = _LAUNCH.subn(call, source)
    assert launches == source.count("<<<") > 0
    return rewritten


def build(folder: Path, edit=lambda name, text: text) -> Path:
    """Compile the CUDA files as ``edit`` changes them, and what they are compared with."""
    sources = [SHIM / "compare.cpp", CSRC / "threads.cpp"]
    for name in CUDA:
        text = (CSRC / f"{name}.cu").read_text(encoding="utf-8")
        (folder / f"{name}_cuda.cpp").write_text(for_the_host(edit(name, text)), encoding="utf-8")
        sources += [CSRC / f"{name}.cpp", folder / f"{name}_cuda.cpp"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *FLAGS, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "compare"
    subprocess.run([COMPILER, *FLAGS, *objects, "-ldl", "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def compare(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.mark.parametrize("function", ["move_rows", "sum_rows", "fill_merge_source"])
def test_the_bits_are_those_of_the_host(compare, function):
    result = subprocess.run(
        [compare, function], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
