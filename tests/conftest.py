"""What all tests share: no network, no GPU tests without a GPU."""

from __future__ import annotations

import os

# Tensors here are tiny: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
