"""One thread, a cache of 100 bytes, and samples of one call keep these tests short."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, costs


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    monkeypatch.setattr(cases, "last_level_cache", lambda device: 100)
    monkeypatch.setattr(costs, "SAMPLE_SECONDS", 1e-9)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
