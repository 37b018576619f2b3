from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.dropin.processors import NEED_TORCHVISION, PROCESSORS
from tests.dropin.report import Outcomes, write
from tests.dropin.tiny import MODELS

_HAS_TORCHVISION = find_spec("torchvision") is not None


@pytest.fixture(params=MODELS)
def name(request) -> str:
    """A family of models, or one of its vision towers."""
    return request.param


@pytest.fixture(params=PROCESSORS)
def processor_name(request) -> str:
    """Likewise, for processors that can be built without torchvision."""
    if request.param in NEED_TORCHVISION and not _HAS_TORCHVISION:
        pytest.skip("transformers processes its images with torchvision only")
    return request.param


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--dropin-report",
        action="store_true",
        help="write the tables of docs/dropin.md and experiments/dropin.md",
    )


_OUTCOMES = Outcomes()


def pytest_runtest_logreport(report) -> None:
    _OUTCOMES.add(report)


def pytest_sessionfinish(session) -> None:
    if session.config.getoption("--dropin-report", default=False):
        write(_OUTCOMES.report())
