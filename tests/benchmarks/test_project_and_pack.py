"""The suite of `project_and_pack`: every variant computes the same."""

from __future__ import annotations

import pytest

from benchmarks import project_and_pack
from benchmarks.prompts import Prompts
from tests.benchmarks.small import rows_of, run_of


@pytest.mark.parametrize("count", [4, None])
def test_every_variant_is_the_truth(count):
    prompts = Prompts(3, 4, 16, 50, count=count)
    rows = rows_of(project_and_pack.case(prompts, 12, 20, 5))
    assert [row["status"] for row in rows] == ["ok"] * 9, rows
    assert {row["tokens"] for row in rows} == {prompts.tokens}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_cases_have_names_of_their_own(device):
    names = [case.name for case in project_and_pack.cases(run_of(device))]
    assert len(set(names)) == len(names) > 0
