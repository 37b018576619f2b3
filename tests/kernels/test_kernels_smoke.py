"""The smoke test's own checks on the interpreted kernels: right ones pass, wrong ones do not."""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.common import ON_TRITON
from tokenflex_kernels import smoke
from tokenflex_kernels.launch_configs import INTERPRETER
from tokenflex_kernels.smoke import shipped_launches, stage_checks
from tokenflex_kernels.stage_calls import Widths

pytestmark = [
    ON_TRITON,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels"),
]

WIDTHS = dict.fromkeys(("", "ragged", "odd"), Widths(16, 32, 24))
CHEAP = ("norm_gradient", "scale_shift", "gate_up", "input_gradient", "down_gradient", "pointwise")


def checks_of(stage, dtype="float32"):
    launches = [one for one in shipped_launches(INTERPRETER) if one.stage == stage]
    launches = [one for one in launches if one.dtype == dtype and not one.widths]
    batch = {"widths": WIDTHS, "images": 1, "out_grid": (3, 2)}
    return list(stage_checks(launches, torch.device("cpu"), **batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", CHEAP)
def test_every_variant_is_right(stage, dtype):
    checks = checks_of(stage, dtype)
    assert len({check.name for check in checks}) == len(checks) > 0
    for check in checks:
        assert 0 <= check.error() < smoke.LIMITS[getattr(torch, dtype)]


def test_a_variant_of_pooling_is_right():
    assert 0 < checks_of("pool_norm_forward")[0].error() < 1e-5


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_result_that_is_off_is_seen(monkeypatch, wrong):
    calls = smoke.stage_calls

    def off(*arguments):
        for name, call in calls(*arguments):
            is_truth = arguments[1] == torch.float64
            yield name, call if is_truth else lambda config, call=call: call(config=config) * wrong

    monkeypatch.setattr(smoke, "stage_calls", off)
    with pytest.raises(ValueError, match="result 0 is off by"):
        checks_of("input_gradient")[0].error()
