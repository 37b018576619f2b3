"""Facts about GPUs that no driver tells: their data sheets, and the limits of their architectures.

Architectures are named "sm_90" (NVIDIA, by compute capability) or "gfx942" (AMD, as its compiler
calls them). A new one is an entry here, its name in ``setup.py`` if it is NVIDIA's, and its launch
configs in ``launch_configs.json``, or else those of the newest older one.
"""

from __future__ import annotations

from typing import NamedTuple

# Dynamic shared memory of a block in bytes, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Local data share of a work group in bytes (CDNA 3 and 4 instruction set guides).
LOCAL_DATA_SHARE = {"gfx942": 65536, "gfx950": 163840}
RESERVED_SHARED_MEMORY = 1024  # of each block, by the CUDA driver
REGISTERS = 65536  # of a multiprocessor, since compute capability 3.0
MOST_WARPS = {86: 48, 89: 48, 120: 48}  # of a multiprocessor; 64 on the others
MOST_BLOCKS = 32  # of a multiprocessor; some have fewer, which none of our kernels comes to
# Dense operations of bfloat16 on the tensor cores of a multiprocessor in a cycle (white paper).
TENSOR_FLOPS = {90: 4096}


def is_amd(architecture: str) -> bool:
    """Return whether an architecture is AMD's."""
    return architecture.startswith("gfx")


def number_of(architecture: str) -> int:
    """Return the number by which the architectures of one vendor are ordered.

    The compute capability of "sm_90"; the digits of "gfx942", which are hexadecimal.
    """
    if is_amd(architecture):
        return int(architecture.removeprefix("gfx"), 16)
    return int(architecture.removeprefix("sm_"))


def shared_memory(architecture: str) -> int:
    """Return the bytes of shared memory that a block can have.

    An architecture that is not listed gets the least that any of its vendor has.
    """
    if is_amd(architecture):
        return LOCAL_DATA_SHARE.get(architecture, min(LOCAL_DATA_SHARE.values()))
    return SHARED_MEMORY.get(number_of(architecture), min(SHARED_MEMORY.values()))


def most_warps(architecture: str) -> int:
    """Return how many warps a multiprocessor of NVIDIA's holds."""
    return MOST_WARPS.get(number_of(architecture), 64)


def blocks_at_once(architecture: str, registers: int, warps: int, shared: int) -> int:
    """Return how many blocks of a kernel a multiprocessor of NVIDIA's runs at the same time.

    Args:
        architecture: For example "sm_90".
        registers: Of a thread.
        warps: Of a block.
        shared: Bytes of shared memory of a block.

    Returns:
        The least of the limits by registers, warps, shared memory and blocks; 0 if none fits.
    """
    of_a_warp = 32 * (-(-registers // 8) * 8)  # registers are allocated in units of eight a thread
    all_shared = shared_memory(architecture) + RESERVED_SHARED_MEMORY
    return min(
        REGISTERS // (of_a_warp * warps),
        most_warps(architecture) // warps,
        all_shared // (shared + RESERVED_SHARED_MEMORY),
        MOST_BLOCKS,
    )


class DataSheet(NamedTuple):
    """The peak rates of a GPU, as its vendor states them.

    Attributes:
        bandwidth: of the memory, GB/s.
        half: dense bfloat16 and float16 products on tensor cores, TFLOP/s.
        tf32: dense products of float32 on tensor cores, where PyTorch may use TF32, TFLOP/s.
            The MI355X has none, so that this is its rate of float32.
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
    "MI300X": DataSheet(5300.0, 1307.4, 653.7, 163.4),
    "MI325X": DataSheet(6000.0, 1307.4, 653.7, 163.4),
    "MI355X": DataSheet(8000.0, 2516.6, 157.3, 157.3),
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
