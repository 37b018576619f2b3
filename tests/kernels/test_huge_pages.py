"""Large results are in memory of huge pages, where Linux has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tokenflex_kernels import merge_vision, pool_norm
from tokenflex_kernels.backend import compiled_extension, extension

MAPS = Path("/proc/self/smaps")
HUGE = 2**21
ROWS = 40 * HUGE // 4096  # of 4096 bytes: too large for memory that the allocator has at hand

pytestmark = [
    pytest.mark.skipif(extension() is None, reason="needs the extension"),
    pytest.mark.skipif(
        not MAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
        reason="needs Linux with huge pages",
    ),
]


def asks_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Return whether the memory in the middle of a tensor is marked for huge pages."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in MAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor is in no memory of this process")


def test_results_ask_for_huge_pages_and_others_do_not():
    x = torch.empty(ROWS, 1024)
    assert not asks_for_huge_pages(x)
    results = {
        "new_rows": compiled_extension().new_rows(x, ROWS, 1024),
        "merge": merge_vision(x, x[:1], torch.zeros(1, dtype=torch.int64)),
        "pool": pool_norm(x.view(-1, 1024), [(1, 1)] * ROWS, [(1, 1)] * ROWS),
    }
    for name, result in results.items():
        assert asks_for_huge_pages(result), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 7), (2100, 1024)], ids=str)
def test_new_rows_are_ordinary(shape, dtype):
    rows = compiled_extension().new_rows(torch.empty(1, 1, dtype=dtype), *shape)
    assert (rows.shape, rows.dtype, rows.device.type) == (shape, dtype, "cpu")
    assert rows.is_contiguous()
    assert torch.equal(rows.fill_(3), torch.full(shape, 3, dtype=dtype))
