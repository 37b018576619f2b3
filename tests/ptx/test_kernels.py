"""The kernels as the GPU would run them: Triton's PTX, executed, against PyTorch in float64.

Here is a choice of the cases, for time; ``make test-ptx`` runs all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.ptx.cases import Case, cases_of
from tests.ptx.launching import executing
from tokenflex_kernels import pack_embeddings, plan_packing
from tokenflex_kernels.launch_configs import TileConfig, overriding
from tokenflex_kernels.project_and_pack.stages import launch_packed_down
from tokenflex_kernels.swiglu.stages import launch_down_gradient

CHOSEN = {
    "sm_90": (
        *("pool-adaptive-bfloat16-0", "pool-resize-bfloat16-1", "pool-odd-bfloat16-0"),
        *("pool-adaptive-float32-0", "pool-adaptive-without-norm-float16-0", "pool-strided"),
        *("pool-sums-bfloat16-0", "project-ragged-bfloat16-2", "project-input-bfloat16-1"),
        *("project-odd-bfloat16-0", "project-inference-float16-0", "project-tma-bfloat16-1"),
    ),
    "sm_80": ("pool-adaptive-bfloat16-0", "project-inference-bfloat16-2"),
}


def named(architecture: str, name: str) -> Case:
    return next(case for case in cases_of(architecture) if case.name == name)


def chosen() -> list[Case]:
    return [named(architecture, name) for architecture, names in CHOSEN.items() for name in names]


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_results_are_right_and_all_accesses_ordered(case):
    outcome = case.run()
    assert outcome.executions
    assert outcome.faults == []


@pytest.mark.parametrize("tma", [False, True])
def test_tokens_are_placed_by_the_row_map(tma):
    """By a kernel that no GPU's table has yet."""
    torch.manual_seed(0)
    plan = plan_packing([[1, 9, 2], [9, 3]], [40, 30], 9)
    product, weight = torch.randn(70, 320).bfloat16(), torch.randn(80, 320).bfloat16()
    bias, table = torch.randn(80).bfloat16(), torch.randn(5, 80).bfloat16()
    maps = plan.source, plan.vision_rows, -1
    config = TileConfig(64, 64, 64, 8, 4, 3, tma)
    with overriding(packed_down=config), executing("sm_90") as executions:
        packed = launch_packed_down(product, weight, bias, table, *maps)
    (execution,) = executions
    assert (execution.kernel, execution.races) == ("packed_down_kernel", [])
    expected = pack_embeddings(table, F.linear(product, weight, bias), plan)
    torch.testing.assert_close(packed, expected, rtol=1e-2, atol=1e-1)


class EveryLaneStores:
    """Edit that lets all lanes of a warp store its sum, as Triton 3.9 does and 3.7 does not.

    Attributes:
        stores: Number of such stores by kernel, edited or not.
    """

    def __init__(self) -> None:
        self.stores: Counter[str] = Counter()

    def __call__(self, name: str, text: str) -> str:
        sums_of_all = re.findall(r"ld\.shared\S* %r\d+, \[ (%r\d+)", text)  # stored by one warp

        def edited(store: re.Match[str]) -> str:
            if store[2] in sums_of_all:
                return store[0]
            self.stores[name] += 1
            return store[1]

        return re.sub(r"(?:@%p\d+ )?(st\.shared\.b32 \[ (%r\d+))", edited, text)


def test_lanes_agree_about_the_sums_of_a_row():
    """In rows whose tail has one feature a lane, in both kernels that sum products of a row.

    Of float16, as products of bfloat16 have fewer bits than float32 and are not rounded.
    """
    case = named("sm_90", "pool-adaptive-float16-0")
    stages = ("pool_norm_forward", "norm_gradient")
    warps = {name: case.configs[name]._replace(num_warps=4) for name in stages}  # 2 of 576 features
    small = {"widths": (576, 1, 1), "grids": (((2, 3),), ((1, 2),))}
    edit = EveryLaneStores()
    outcome = replace(case, configs={**case.configs, **warps}, **small).run(edit=edit)
    assert all(edit.stores[f"{name}_kernel"] for name in stages)
    of_two_warps = [run.kernel for run in outcome.executions if " num_warps=2" in run.config]
    assert of_two_warps == [f"{name}_kernel" for name in stages]
    assert outcome.faults == []


def test_lanes_agree_about_the_sums_of_a_column():
    """In tiles that are read as one vector a lane: a candidate of the tuner."""
    torch.manual_seed(0)
    dp, gate, up = (torch.randn(11, 128).bfloat16() for _ in range(3))
    tile = TileConfig(8, 128, 0, 8, 4, 1)
    edit = EveryLaneStores()
    with overriding(pointwise=tile), executing("sm_90", edit=edit) as executions:
        grads, _, sums = launch_down_gradient(dp, None, gate, up, False, True)
    (execution,) = executions
    assert (execution.kernel, execution.races) == ("gate_gradient_kernel", [])
    assert edit.stores["gate_gradient_kernel"]
    torch.testing.assert_close(sums, grads.float().sum(0), rtol=1e-2, atol=5e-2)
