from __future__ import annotations

import pytest

from tests.dropin.tiny import MODELS


@pytest.fixture(params=MODELS)
def name(request) -> str:
    """A family of models, or one of its vision towers."""
    return request.param
