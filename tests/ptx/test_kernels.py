"""The kernels as the GPU would run them: Triton's PTX, executed, against PyTorch in float64.

Here is a choice of the cases, for time; ``make test-ptx`` runs all of them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ptx.cases import Case, cases_of
from tests.ptx.launching import executing
from tokenflex_kernels import pack_embeddings, plan_packing
from tokenflex_kernels.launch_configs import TileConfig, overriding
from tokenflex_kernels.project_and_pack.stages import launch_packed_down

CHOSEN = {
    "sm_90": (
        *("pool-adaptive-bfloat16-0", "pool-resize-bfloat16-1", "pool-odd-bfloat16-0"),
        *("pool-adaptive-without-norm-float16-0", "pool-strided"),
        *("pool-sums-bfloat16-0", "project-ragged-bfloat16-2", "project-input-bfloat16-1"),
        *("project-odd-bfloat16-0", "project-inference-float16-0", "project-tma-bfloat16-1"),
    ),
    "sm_80": ("project-inference-bfloat16-2",),
}


def chosen() -> list[Case]:
    cases = {str(case): case for name in CHOSEN for case in cases_of(name)}
    return [cases[f"{name}-{case}"] for name, names in CHOSEN.items() for case in names]


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
