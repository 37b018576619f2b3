"""The data sheets are found by the names that drivers give."""

from __future__ import annotations

import pytest

from tokenflex_kernels.gpus import (
    LOCAL_DATA_SHARE,
    SHARED_MEMORY,
    data_sheet,
    is_amd,
    number_of,
    shared_memory,
)


@pytest.mark.parametrize(
    ("name", "bandwidth", "half"),
    [
        ("NVIDIA H200", 4800, 989.5),
        ("NVIDIA H100 PCIe", 2000, 756.5),
        ("NVIDIA H100 80GB HBM3", 3350, 989.5),
        ("NVIDIA GH200 144G HBM3e", 4900, 989.5),
        ("NVIDIA GH200 480GB", 4000, 989.5),
        ("NVIDIA A100-SXM4-40GB", 1555, 312),
        ("NVIDIA A100-SXM4-80GB", 2039, 312),
        ("NVIDIA A100 80GB PCIe", 1935, 312),
        ("AMD Instinct MI300X", 5300, 1307.4),
        ("AMD Instinct MI355X", 8000, 2516.6),
    ],
)
def test_a_device_has_its_data_sheet(name, bandwidth, half):
    sheet = data_sheet(name)
    assert (sheet.bandwidth, sheet.half) == (bandwidth, half)


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A1000 Laptop GPU", "AMD EPYC", ""]
)
def test_other_devices_have_none(name):
    assert data_sheet(name) is None


@pytest.mark.parametrize(
    ("name", "amd", "number", "shared"),
    [
        ("sm_80", False, 80, 166912),
        ("sm_100", False, 100, 232448),
        ("sm_87", False, 87, min(SHARED_MEMORY.values())),
        ("gfx942", True, 0x942, 65536),
        ("gfx950", True, 0x950, 163840),
        ("gfx90a", True, 0x90A, min(LOCAL_DATA_SHARE.values())),
    ],
)
def test_an_architecture_is_of_a_vendor_and_has_a_number_and_shared_memory(
    name, amd, number, shared
):
    assert (is_amd(name), number_of(name), shared_memory(name)) == (amd, number, shared)
