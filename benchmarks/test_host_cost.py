"""The calls of :mod:`benchmarks.host_cost` under pytest-benchmark, to compare two commits.

    python -m pytest benchmarks/test_host_cost.py --benchmark-autosave
    python -m pytest benchmarks/test_host_cost.py --benchmark-compare

These figures are neither checked nor published: the rows of the CSV come from the harness.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.host_cost import groups

DEVICE = os.environ.get("TOKENFLEX_BENCHMARK_DEVICE", "cpu")
CALLS = [
    pytest.param(call, id="-".join(filter(None, (op, case))))
    for case, calls in groups(DEVICE)
    for op, call in calls.items()
]


@pytest.mark.parametrize("call", CALLS)
def test_host_cost(benchmark: Any, call: Callable[[], Any]) -> None:
    assert benchmark(call) is not None
