"""One thread, a cache of 100 bytes, samples of one call: what is timed here is right or wrong."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from benchmarks import cases, clocks

# ``make gpu`` does without the [bench] extra, but for its pictures.
collect_ignore = [] if find_spec("matplotlib") else ["test_plots.py", "test_report.py"]


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    monkeypatch.setattr(cases, "last_level_cache", lambda device: 100)
    monkeypatch.setattr(clocks, "SAMPLE_SECONDS", 1e-9)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
