"""Large results are in memory of huge pages, where Linux has them."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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


def mapped_areas() -> Iterator[tuple[int, int, bool]]:
    """Yield begin, end and mark for huge pages of each area of this process's memory."""
    begin = end = 0
    for line in MAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
        elif line.startswith("VmFlags:"):
            yield begin, end, "hg" in line.split()


def asks_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Return whether the memory in the middle of a tensor is marked for huge pages."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    (is_marked,) = (marked for begin, end, marked in mapped_areas() if begin <= address < end)
    return is_marked


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


@pytest.mark.parametrize(
    ("first", "last", "pages"),
    [
        (0, 3 * HUGE, (0, 3)),
        (1, 3 * HUGE, (1, 3)),
        (HUGE - 1, 3 * HUGE, (1, 3)),
        (HUGE, 3 * HUGE - 1, (1, 2)),
        (HUGE, 2 * HUGE + 1, (1, 2)),
        (4096, 2 * HUGE - 4096, None),
        (HUGE + 1, 2 * HUGE, None),
        (HUGE, 2 * HUGE - 1, None),
    ],
)
def test_only_whole_pages_of_a_result_are_asked_for(first, last, pages):
    """Memory beside a result belongs to others."""
    memory = np.frombuffer(mmap.mmap(-1, 5 * HUGE), np.uint8)
    start = -(-memory.ctypes.data // HUGE) * HUGE  # with a page before it or behind it
    extension().prefer_huge_pages(start + first, last - first)
    ends = memory.ctypes.data, memory.ctypes.data + len(memory)
    marked = [
        ((max(begin, ends[0]) - start) / HUGE, (min(end, ends[1]) - start) / HUGE)
        for begin, end, is_marked in mapped_areas()
        if is_marked and begin < ends[1] and end > ends[0]
    ]
    assert marked == ([] if pages is None else [pages])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 7), (2100, 1024)], ids=str)
def test_new_rows_are_ordinary(shape, dtype):
    rows = compiled_extension().new_rows(torch.empty(1, 1, dtype=dtype), *shape)
    assert (rows.shape, rows.dtype, rows.device.type) == (shape, dtype, "cpu")
    assert rows.is_contiguous()
    assert torch.equal(rows.fill_(3), torch.full(shape, 3, dtype=dtype))
