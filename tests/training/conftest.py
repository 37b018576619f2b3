"""Every test here may start runs in this process."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_accelerator_and_threads(own_accelerator_and_threads):
    """Use the shared fixture in every test of this folder."""
