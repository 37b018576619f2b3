"""Memory, and waiting for the device."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.costs import peak_bytes, saved_bytes, synchronisations


def test_waiting_for_the_device_is_counted(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        assert modes[-1] == "warn"
        for _ in range(2):  # at one line: as a filter would have it, one warning
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    assert synchronisations(call, "cuda") == 2
    assert modes[-1] == 0
    assert synchronisations(call, "cpu") is None


def test_saved_bytes_count_each_storage_once_and_no_input():
    x = torch.randn(100, requires_grad=True)

    def forward():
        y = x.exp()  # keeps its result, 400 bytes
        return y * y  # which the product keeps twice

    assert saved_bytes(forward, [x]) == 400
    assert saved_bytes(lambda: x * x, [x]) == 0


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux")
def test_peak_bytes_see_what_is_given_back_before_the_call_ends():
    size = 64 * 2**20

    def call():
        lost = torch.ones(size, dtype=torch.uint8)
        kept = torch.ones(size // 2, dtype=torch.uint8)
        del lost
        return kept

    for _ in range(2):  # freed memory of the first call is not to hide the second's
        peak = peak_bytes(call, "cpu")
        if peak is None:
            pytest.skip("this kernel does not reset the high-water mark")
        assert 1.4 * size < peak < 1.7 * size
