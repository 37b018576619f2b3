"""Rules for every kernel and every launch, read from their sources and arguments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tokenflex_kernels import launch_configs
from tokenflex_kernels.launch_configs import STAGES, TileConfig, parse_stage, read_table
from tokenflex_kernels.pool_norm import stages as pool_norm_stages
from tokenflex_kernels.project_and_pack import stages as project_and_pack_stages
from tokenflex_kernels.relaunch import descriptor_type
from tokenflex_kernels.stage_calls import stage_calls
from tokenflex_kernels.swiglu import stages as swiglu_stages

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(ROOT / "tokenflex_kernels").glob("*/kernels.py"),
    ROOT / "tokenflex_kernels/tiles.py",
    *(ROOT / "csrc").glob("*.cu"),
    *(ROOT / "csrc").glob("*.h"),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_kernel_adds_atomically_or_is_tuned_at_run_time(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"atomic\w*\s*\(|@triton\.autotune|@triton\.heuristics", text)


def test_there_are_kernels_of_both_kinds():
    names = {path.name for path in SOURCES}
    assert {"kernels.py", "row_movers.cu", "row_sums.cu"} <= names


@pytest.fixture
def launched(monkeypatch):
    """The launches of stages on meta tensors, which compile nothing here."""
    launches = []

    def record(kernel, programs, like, *args, **options):
        launches.append((kernel.__name__, programs, args, options))

    for module in (pool_norm_stages, swiglu_stages, project_and_pack_stages):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(launch_configs, "architecture", lambda device: "sm_90")
    return launches


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("images", [3, 128])
def test_launches_have_one_dimension_and_integers_as_their_numbers(launched, stage, images):
    """A float argument would be float64 under a compiler; a tuple of programs, another grid."""
    buckets = parse_stage(read_table()["sm_90"]["stages"], stage)["bfloat16"]
    configs = {config for _, config in buckets if config is not None}
    configs |= {config._replace(tma=False) for config in configs if isinstance(config, TileConfig)}
    if stage == "packed_down":  # no table has a config of its kernel yet
        configs = {launch_configs.launch_config("gate_up", 4096, torch.bfloat16, "sm_90")}
    kinds = {int, type(None), torch.Tensor, descriptor_type()}
    for config in configs:
        for _, call in stage_calls(stage, torch.bfloat16, images, (8, 8), torch.device("meta")):
            call(config=config)
    assert launched or not configs
    for name, programs, args, options in launched:
        assert type(programs) is int, name
        assert {type(value) for value in args} <= kinds, name
        # Lengths are no constants: none of these is a batch's number of rows, which is large.
        sizes = {value for value in options.values() if type(value) is int}
        assert not sizes & {images * 64, images * 729}, name


def test_the_tests_that_the_documentation_names_exist():
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (R\d+) \|.*", page, re.MULTILINE)
    assert rows == [f"R{number}" for number in range(1, 20)]
    named = re.findall(r"`([\w./]+\.py)::(\w+)`", page)
    assert len(named) > 40
    for file, name in named:
        text = (ROOT / "tests/kernels" / file).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {name}\b", text), f"{file}::{name}"
