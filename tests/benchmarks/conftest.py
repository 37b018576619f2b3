"""One thread: with more, every small operation may wait for a thread that has lost its core."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

# ``make gpu`` does without the [bench] extra, but for its pictures.
collect_ignore = [] if find_spec("matplotlib") else ["test_plots.py", "test_report.py"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
