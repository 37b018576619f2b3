"""The data sheets are found by the names that drivers give."""

from __future__ import annotations

import pytest

from tokenflex_kernels.gpus import data_sheet


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
