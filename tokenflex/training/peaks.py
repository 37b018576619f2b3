"""Peak arithmetic of GPUs, from NVIDIA's data sheets: the 100 % of MFU.

Dense figures of the tensor cores. bfloat16 and float16 are the same; TF32 is used for float32
products where PyTorch may use it; plain float32 runs on the other cores.
"""

from __future__ import annotations

import torch

# First match wins. Teraflops: (bfloat16 and float16, TF32, float32).
_PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "GH200": (989.5, 494.7, 67.0),
    "H200 NVL": (835.5, 417.7, 60.0),
    "H200": (989.5, 494.7, 67.0),
    "H100 NVL": (835.5, 417.7, 60.0),
    "H100 PCIe": (756.5, 378.0, 51.0),
    "H100": (989.5, 494.7, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return operations a second; None for what is not in the table (a CPU, a slice of a GPU).

    Args:
        device_name: What ``torch.cuda.get_device_name`` returns.
        precision: "bf16", "fp16" or "no", as in a configuration.
    """
    words = device_name.replace("-", " ").split()
    for name, (half, tf32, single) in _PEAKS.items():
        if "MIG" not in words and all(part in words for part in name.split()):
            if precision != "no":
                return 1e12 * half
            return 1e12 * (tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else single)
    return None
