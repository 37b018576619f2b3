"""A seed for every test, and fixtures of the files ``test_kernels*.py``, on Triton kernels.

``TRITON_INTERPRET=1 python -m pytest`` with those files runs them without a GPU, in Triton's
interpreter; Triton reads the variable as it is imported, so it cannot be set in here.
``pytest -m gpu`` runs the same tests, and those that need real sizes, on a machine that has a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from benchmarks.stubbed_gpu import unrecorded
from tests.kernels.common import INTERPRETED
from tokenflex_kernels import backend, launch, launch_configs
from tokenflex_kernels.pool_norm import stages as pool_norm_stages
from tokenflex_kernels.project_and_pack import stages as project_and_pack_stages
from tokenflex_kernels.swiglu import stages as swiglu_stages

if INTERPRETED:
    DEVICES = [pytest.param("cpu", id="interpreter")]
elif torch.cuda.is_available():
    DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
else:
    reason = "needs TRITON_INTERPRET=1 or a CUDA device"
    DEVICES = [pytest.param("cpu", id="interpreter", marks=pytest.mark.skip(reason=reason))]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """The device of a test's tensors; it also marks or skips the test."""
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():  # not "seed": tests have parameters of that name, which would take its place
    torch.manual_seed(0)


@pytest.fixture
def new_choices():
    """``new_choices()`` makes the choices of backends anew, with another extension in its place."""
    backend._choose.cache_clear()
    yield backend._choose.cache_clear
    backend._choose.cache_clear()


@pytest.fixture
def kernel_environment(monkeypatch):
    """The variables that let the ops take the kernels."""
    monkeypatch.delenv("TOKENFLEX_BACKEND", raising=False)
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched from here on, in order; no call is recorded."""
    names: list[str] = []

    def record(kernel, programs, *args, **options):
        if programs > 0:
            names.append(kernel.__name__.removesuffix("_kernel"))
        launch.launch(kernel, programs, *args, **options)

    for module in (pool_norm_stages, swiglu_stages, project_and_pack_stages):
        monkeypatch.setattr(module, "launch", record)
    with unrecorded():
        yield names


@pytest.fixture
def use_config():
    """``use_config(stage=config, ..)`` puts configs in the place of the table's; None: cuBLAS."""
    with ExitStack() as stack:
        yield lambda **configs: stack.enter_context(launch_configs.overriding(**configs))


@pytest.fixture
def products(use_config):
    """``products(config)``: every matrix product runs with ``config``; None: by the library."""
    return lambda config: use_config(**dict.fromkeys(launch_configs.PRODUCTS, config))


@pytest.fixture
def stages(monkeypatch):
    """The stages that run from here on, in order: the name of each and its arguments by name.

    No call is recorded.
    """
    ran: list[tuple[str, dict]] = []

    def record(stage, *call):
        frame = sys._getframe(1)
        name = frame.f_code.co_name.removeprefix("launch_").lstrip("_")
        # A stage that leaves its product to PyTorch looks up a pointwise config too.
        again = stage == "pointwise" and bool(ran) and ran[-1][0] == name
        if name != "gated_product" and not again:
            ran.append((name, dict(frame.f_locals)))
        return launch_configs.config_for(stage, *call)

    for module in (pool_norm_stages, swiglu_stages, project_and_pack_stages):
        monkeypatch.setattr(module, "config_for", record)
    with unrecorded():
        yield ran
