"""The launch configs that ``tune`` measures and ``aot --candidates`` compiles."""

from __future__ import annotations

import itertools

import torch

from tokenflex_kernels.gpus import RESERVED_SHARED_MEMORY, is_amd, number_of, shared_memory
from tokenflex_kernels.launch_configs import (
    NAMES,
    STAGES,
    Config,
    RowConfig,
    TileConfig,
    nearest,
    parse_stage,
    read_table,
)

# Of each stage on rows: rows, columns, unroll, num_warps, max_registers, and channels of a tile.
ROW_CHOICES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pool_norm_forward": ((1,), (1, 2, 4, 16), (1, 2), (1, 2, 4), (128,)),
    "pool_norm_backward": ((1, 3, 9, 27), (4, 8), (1,), (1, 2), (128,), (128, 256)),
    "norm_gradient": ((4, 16, 32, 64), (1,), (1, 2), (1, 2), (168,)),
    "scale_shift": ((1, 2, 4, 8), (1,), (1,), (1, 2, 4), (128,)),
}


def candidate_configs(stage: str, dtype: torch.dtype, architecture: str) -> list[Config | None]:
    """Return the configs to try for a stage, those of the table among them.

    None stands for PyTorch's own product.
    """
    table = read_table()
    stages = table[nearest(architecture, tuple(table))]["stages"]
    shipped = [config for _, config in parse_stage(stages, stage)[NAMES[dtype]]]
    return list(dict.fromkeys([*_choices(stage, dtype, architecture), *shipped]))


def _choices(stage: str, dtype: torch.dtype, architecture: str) -> list[Config | None]:
    if STAGES[stage] is RowConfig:
        return [RowConfig(*choice) for choice in itertools.product(*ROW_CHOICES[stage])]
    if stage == "pointwise":
        return [
            TileConfig(m, n, 0, 8, warps, 1, max_registers=128)
            for m, n, warps in ((8, 128, 4), (16, 128, 4), (32, 64, 4), (16, 256, 8), (32, 128, 8))
        ]
    if dtype == torch.float32:  # IEEE products run on the CUDA cores, where cuBLAS is at home
        return [None]
    # What two blocks of a multiprocessor have each.
    half = (shared_memory(architecture) + RESERVED_SHARED_MEMORY) // 2 - RESERVED_SHARED_MEMORY
    newest = not is_amd(architecture) and number_of(architecture) >= 90
    accumulators = 2 if stage == "gate_up" else 1
    configs: list[Config | None] = [None]
    for (m, n), k, stages, tma in itertools.product(
        ((64, 32), (64, 64), (128, 64), (64, 128), (128, 128), (128, 256), (256, 128)),
        (32, 64) if is_amd(architecture) else (64, 128),
        (2,) if is_amd(architecture) else (3, 4, 5),
        (False, True) if newest else (False,),
    ):
        warps = 8 if m * n * accumulators >= 128 * 128 else 4
        shared = stages * k * (m + accumulators * n) * dtype.itemsize
        registers = m * n * accumulators // (32 * warps)  # of the accumulators, for each thread
        if shared <= min(220_000, shared_memory(architecture)) and registers <= 128:
            config = TileConfig(m, n, k, 8, warps, stages, tma)
            if stage == "gate_up" and tma:  # its programs walk over tiles
                config = config._replace(programs_per_sm=1 if shared > half else 2)
            configs.append(config)
            # Half as many registers may let two blocks share a multiprocessor.
            is_halved = registers <= 64 and shared <= half and not is_amd(architecture)
            if stage == "down_gradient" and is_halved:
                configs.append(config._replace(max_registers=128))
    return configs
