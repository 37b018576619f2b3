"""``python -m tokenflex_kernels.aot``: compile every kernel and shipped config, without a GPU.

Each launcher is called on meta tensors of the reference widths, for each architecture of the table
of configs, each dtype, and each variant of what a call can ask for. So what is compiled here is
what a GPU would run, with the same arguments specialised. In bfloat16, also at widths that are
multiples of 16 but of no tile, and at odd ones.

Prints registers, stack, shared memory and the matrix instruction of each kernel. Exits with 1 if a
kernel spills (stack above 0), computes in double precision (``.f64`` in the PTX), takes more shared
memory than a block can have, reads no 16 bytes at a time where widths allow it, or is a matrix
product without ``wgmma`` on sm_90.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenflex_kernels.launch_configs import (
    DTYPES,
    INTERPRETER,
    PRODUCTS,
    STAGES,
    parse_stage,
    read_table,
)

# What one block may have of dynamic shared memory, by compute capability (CUDA programming guide).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class Compiled(NamedTuple):
    """One kernel as the compiler left it."""

    architecture: str
    kernel: str
    variant: str
    registers: int
    stack: int
    shared: int
    instruction: str
    """The matrix instruction, "" where there is none."""
    doubles: bool
    """Whether ``.f64`` occurs in the PTX."""
    wide: bool
    """Whether rows are read 16 bytes at a time, or by the copy engine."""


def faults(compiled: Compiled) -> list[str]:
    """What is wrong with a kernel, in words; empty if nothing is."""
    found = []
    if compiled.stack > 0:
        found.append(f"spills: {compiled.stack} bytes of stack")
    if compiled.doubles:
        found.append(".f64 in the PTX")
    if not compiled.wide and " odd " not in compiled.variant:
        found.append("no 16-byte loads")
    number = int(compiled.architecture.removeprefix("sm_"))
    limit = SHARED_LIMIT.get(number, min(SHARED_LIMIT.values()))
    if compiled.shared > limit:
        found.append(f"{compiled.shared} bytes of shared memory, a block has {limit}")
    product = compiled.kernel.removesuffix("_kernel") in PRODUCTS
    if product and not compiled.instruction:
        found.append("no matrix instruction")
    if product and number == 90 and compiled.instruction != "wgmma":
        found.append(f"no wgmma but {compiled.instruction or 'nothing'}")
    return found


def inspect(architecture: str, kernel: str, variant: str, compiled: Any) -> Compiled:
    """Read what the compiler says of a kernel, and what its machine code says."""
    ptx: str = compiled.asm["ptx"]
    instructions = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}
    registers, stack = resource_usage(compiled.asm["cubin"])
    return Compiled(
        architecture,
        kernel,
        variant,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        instruction=next((short for long, short in instructions.items() if long in ptx), ""),
        doubles=".f64" in ptx,
        wide=re.search(r"ld\.global[\w.:]*\.v(4|8)\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async", ptx)
        is not None,
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a cubin's kernel, by the cuobjdump that Triton carries."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", output)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers and stack:\n{output}")
    return int(found[1]), int(found[2])


class _NoGpuDriver:
    """Enough of a driver for Triton to compile for ``architecture`` and for nothing else."""

    def __init__(self, architecture: str) -> None:
        self._number = int(architecture.removeprefix("sm_"))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def set_target(architecture: str) -> None:
    """From now on, launches on meta tensors compile for ``architecture``.

    What was compiled for another target stays cached under the one device that there is: call this
    once in a process.
    """
    from triton.runtime import driver

    driver.set_active(_NoGpuDriver(architecture))


def compile_all(architecture: str, candidates: bool = False) -> list[Compiled]:
    """Every kernel, variant, dtype and shipped config (or candidate) for one architecture."""
    from tokenflex_kernels import launch
    from tokenflex_kernels.stage_calls import ODD, RAGGED, REFERENCE, stage_calls
    from tokenflex_kernels.tune import candidate_configs

    set_target(architecture)
    compiled: list[Compiled] = []
    stages = read_table()[architecture]["stages"]
    one = ("bfloat16",)
    kinds = {"": (REFERENCE, (*DTYPES,)), "ragged": (RAGGED, one), "odd": (ODD, one)}
    for stage, (kind, (widths, dtypes)) in itertools.product(STAGES, kinds.items()):
        for name, buckets in parse_stage(stages, stage).items():
            if name not in dtypes:
                continue
            shipped = [config for _, config in buckets]
            configs = (
                candidate_configs(stage, DTYPES[name], architecture) if candidates else shipped
            )
            for variant, call in stage_calls(
                stage, DTYPES[name], 2, (16, 16), torch.device("meta"), widths
            ):
                for config in dict.fromkeys(configs):
                    if config is None:
                        continue
                    sizes = "/".join(str(int(field or 0)) for field in config)
                    label = " ".join(filter(None, (name, kind, variant, sizes)))

                    def keep(kernel: str, result: Any, label: str = label) -> None:
                        compiled.append(inspect(architecture, kernel, label, result))

                    launch.on_compile = keep
                    before = len(compiled)
                    call(config=config)
                    seen = {one.kernel for one in compiled[before:]}
                    if stage in PRODUCTS and kind != "odd" and f"{stage}_kernel" not in seen:
                        raise RuntimeError(f"{label}: {stage} was not compiled, only {seen}")
    return compiled


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(arguments: list[str] | None = None) -> int:
    known = [name for name in read_table() if name != INTERPRETER]
    parser = argparse.ArgumentParser(prog="python -m tokenflex_kernels.aot", description=__doc__)
    parser.add_argument(
        "--architectures", default=",".join(known), help="comma-separated, of: %(default)s"
    )
    parser.add_argument(
        "--candidates", action="store_true", help="compile what tune would try, not what is shipped"
    )
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--quiet", action="store_true", help="print faults and the summary only")
    options = parser.parse_args(arguments)
    architectures = options.architectures.split(",")
    if unknown := sorted(set(architectures) - set(known)):
        parser.error(f"no configs for {', '.join(unknown)}; the table has {', '.join(known)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes Triton interpret: unset it to compile")

    # A process for each architecture: Triton keeps what it compiled for the one device it sees.
    with ProcessPoolExecutor(
        options.jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        by_architecture = pool.map(
            partial(compile_all, candidates=options.candidates), architectures
        )
        compiled = [one for several in by_architecture for one in several]
    bad = 0
    for one in compiled:
        wrong = faults(one)
        bad += bool(wrong)
        if wrong or not options.quiet:
            print(
                f"{one.architecture:7} {one.kernel:27} {one.variant:55} {one.registers:3} registers"
                f" {one.stack:4} stack {one.shared:6} shared  {one.instruction:7}"
                f" {'; '.join(wrong)}".rstrip()
            )
    print(f"{len(compiled)} kernels for {', '.join(architectures)}: {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
