"""The page of the executor's results says what its CSV files and tests say."""

from __future__ import annotations

import pytest

from tests.ptx.__main__ import COLUMNS
from tests.ptx.cases import cases_of
from tests.ptx.page import PAGE, read_rows, short_config, tables, with_tables


def test_the_tables_are_those_of_the_files():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, tables()) == page  # if not: python -m tests.ptx.page


def test_the_files_have_every_case_without_a_fault():
    rows = read_rows()
    assert tuple(rows[0]) == COLUMNS
    for architecture in ("sm_80", "sm_90"):
        known = {case.name for case in cases_of(architecture)}
        assert {row["case"] for row in rows if row["architecture"] == architecture} == known
    assert {row["races"] for row in rows} == {"0"}
    assert max(float(row["error_share"]) for row in rows) <= 1
    assert all(row["config"] for row in rows)


@pytest.mark.parametrize(
    ("config", "short"),
    [
        (
            "NORM=True UNROLL=2 WIDTH=64 num_warps=4 maxnreg=128",
            "unrolled by 2, warps 4, registers 128",
        ),
        (
            "BLOCK_M=64 BLOCK_N=128 GROUP_M=8 TMA=True num_warps=4 num_stages=3 maxnreg=None",
            "64x128x8, warps 4, stages 3, descriptors",
        ),
    ],
)
def test_configs_in_short(config, short):
    assert short_config(config) == short


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="one place for bugs"):
        with_tables("<!-- launches -->\n<!-- end -->", {"bugs": ""})
