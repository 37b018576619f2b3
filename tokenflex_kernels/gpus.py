"""Facts about GPUs that no driver tells: their data sheets, and the limits of their architectures.

A new architecture is an entry here, its name in ``setup.py``, and its launch configs in
``launch_configs.json``, or else those of the newest older one.
"""

from __future__ import annotations

from typing import NamedTuple

# Dynamic shared memory of a block in bytes, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class DataSheet(NamedTuple):
    """The peak rates of a GPU, as NVIDIA states them.

    Attributes:
        bandwidth: of the memory, GB/s.
        half: dense bfloat16 and float16 products on tensor cores, TFLOP/s.
        tf32: dense products of float32 on tensor cores, where PyTorch may use TF32, TFLOP/s.
        single: float32 on the other cores, TFLOP/s.
    """

    bandwidth: float
    half: float
    tf32: float
    single: float


# The first whose words are all in the device's name.
_DATA_SHEETS = {
    "B200": DataSheet(8000.0, 2250.0, 1125.0, 75.0),
    "GH200 144G": DataSheet(4900.0, 989.5, 494.7, 67.0),
    "GH200": DataSheet(4000.0, 989.5, 494.7, 67.0),
    "H200 NVL": DataSheet(4800.0, 835.5, 417.7, 60.0),
    "H200": DataSheet(4800.0, 989.5, 494.7, 67.0),
    "H100 NVL": DataSheet(3900.0, 835.5, 417.7, 60.0),
    "H100 PCIe": DataSheet(2000.0, 756.5, 378.0, 51.0),
    "H100": DataSheet(3350.0, 989.5, 494.7, 67.0),
    "A100 80GB PCIe": DataSheet(1935.0, 312.0, 156.0, 19.5),
    "A100 80GB": DataSheet(2039.0, 312.0, 156.0, 19.5),
    "A100": DataSheet(1555.0, 312.0, 156.0, 19.5),
    "L40S": DataSheet(864.0, 362.0, 183.0, 91.6),
}


def data_sheet(device_name: str) -> DataSheet | None:
    """Return the data sheet of a GPU; None for what has none here (a CPU, a slice of a GPU).

    Args:
        device_name: What ``torch.cuda.get_device_name`` returns.
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for name, sheet in _DATA_SHEETS.items():
        if all(part in words for part in name.split()):
            return sheet
    return None
