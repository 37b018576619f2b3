"""Where these tests run: compiled kernels on a GPU, or Triton's interpreter on the CPU.

``TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_kernels`` runs them without a GPU; Triton
reads the variable as it is imported, so it cannot be set in here. ``pytest -m gpu`` runs the same
tests, and those that need real sizes, on a machine that has one.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from tokenflex_kernels import _projector_ops, launch_configs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    DEVICES = [pytest.param("cpu", id="interpreter")]
elif torch.cuda.is_available():
    DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
else:
    reason = "needs TRITON_INTERPRET=1 or a CUDA device"
    DEVICES = [pytest.param("cpu", id="interpreter", marks=pytest.mark.skip(reason=reason))]


@pytest.fixture(params=DEVICES, autouse=True)
def device(request) -> str:
    """Where the tensors of a test go: every test here takes it, be it only for the marks."""
    return request.param


@pytest.fixture(autouse=True)
def _seed_and_environment(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("TOKENFLEX_BACKEND", raising=False)
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that are launched from here on, in order."""
    from tokenflex_kernels.triton_kernels import down_gradient, gate_up, input_gradient, pooling
    from tokenflex_kernels.triton_kernels import launch as launching

    names: list[str] = []

    def launch(kernel, programs, *args, **options):
        if programs > 0:
            names.append(kernel.__name__.removesuffix("_kernel"))
        launching.launch(kernel, programs, *args, **options)

    for module in (down_gradient, gate_up, input_gradient, pooling):
        monkeypatch.setattr(module, "launch", launch)
    return names


@pytest.fixture
def use_config(monkeypatch):
    """``use_config(stage=config, ..)`` puts configs in the place of the table's; None: cuBLAS."""

    def use(**configs) -> None:
        def launch_config(stage, *call):
            found = launch_configs.launch_config(stage, *call)
            return configs.get(stage, found)

        monkeypatch.setattr(_projector_ops, "launch_config", launch_config)

    return use


@pytest.fixture
def products(use_config):
    """``products(config)``: every matrix product runs with ``config``; None: by the library."""
    return lambda config: use_config(**dict.fromkeys(launch_configs.PRODUCTS, config))


@pytest.fixture
def stages(monkeypatch):
    """The stages that run from here on, by name, with their positional arguments, in order."""
    ran: list[tuple[str, tuple]] = []
    real = _projector_ops._kernels()

    def record(name):
        def stage(*args, **options):
            ran.append((name, options))
            return getattr(real, name)(*args, **options)

        return stage

    recorded = SimpleNamespace(**{name: record(name) for name in vars(real)})
    monkeypatch.setattr(_projector_ops, "_kernels", lambda: recorded)
    return ran
