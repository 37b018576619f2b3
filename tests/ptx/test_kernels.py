"""The kernels as the GPU would run them: Triton's PTX, executed, against PyTorch in float64.

Here is a choice of the cases, for time; ``make test-ptx`` runs all of them.
"""

from __future__ import annotations

import pytest

from tests.ptx.cases import Case, cases_of

CHOSEN = {
    "sm_90": (
        *("pool-adaptive-bfloat16-0", "pool-resize-bfloat16-1", "pool-odd-bfloat16-0"),
        *("pool-adaptive-float32-0", "pool-adaptive-without-norm-float16-0", "pool-strided"),
        *("pool-sums-bfloat16-0", "project-ragged-bfloat16-2", "project-input-bfloat16-1"),
        *("project-odd-bfloat16-0", "project-inference-float16-0", "project-tma-bfloat16-1"),
    ),
    "sm_80": ("pool-adaptive-bfloat16-0", "project-inference-bfloat16-2"),
}


def chosen() -> list[Case]:
    cases = {str(case): case for name in CHOSEN for case in cases_of(name)}
    return [cases[f"{name}-{case}"] for name, names in CHOSEN.items() for case in names]


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_results_are_right_and_all_accesses_ordered(case):
    outcome = case.run()
    assert outcome.executions
    assert outcome.faults == []
