"""``python -m tokenflex_kernels.aot``: compile every kernel and shipped config, without a GPU.

Each stage is launched on meta tensors of the reference widths, for each architecture of the table,
each dtype and each variant. So a GPU would run the kernels compiled here, with the same arguments
specialised. In bfloat16, widths that are multiples of 16 but not of tiles, and odd widths, are
compiled too.

Prints registers, stack, shared memory and the matrix instruction of each kernel. Exits with 1 if a
kernel spills (stack above 0), computes in double precision (``.f64`` in the PTX), takes more shared
memory than a block can have, does not read 16 bytes at a time where widths allow it, or is a matrix
product without ``wgmma`` on sm_90.

AMD's architectures are compiled on request alone (``--architectures gfx942,gfx950``). There,
registers are vector registers, the stack is scratch memory, and matrix instructions are ``v_mfma``.

For architectures with a reference GPU (``budget.model``), the shipped configs' instructions are
counted and their times predicted, too, and a stage that is over its budget is a fault.

Configs and budgets are of one release of Triton. Another one differs in a few registers: where that
makes a kernel spill a little, or a stage a little slower than its budget, it is said, and no fault.
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

from tokenflex_kernels import launch
from tokenflex_kernels.budget.table import COUNTED_WITH, SIDES, compiler_remark, verdicts
from tokenflex_kernels.candidates import candidate_configs
from tokenflex_kernels.gpus import is_amd, number_of, shared_memory
from tokenflex_kernels.launch_configs import (
    DTYPES,
    INTERPRETER,
    PRODUCTS,
    STAGES,
    TileConfig,
    parse_stage,
    read_table,
)
from tokenflex_kernels.options import names_of, positive, refuse_interpreter
from tokenflex_kernels.stage_calls import ODD, RAGGED, REFERENCE, stage_calls
from tokenflex_kernels.versions import is_release

SPILL_OF_OTHERS = 16  # bytes of stack that other releases of Triton than COUNTED_WITH may use

# The last two are compiled in bfloat16 alone.
WIDTHS = {"": REFERENCE, "ragged": RAGGED, "odd": ODD}


class Compiled(NamedTuple):
    """The properties of one compiled kernel."""

    architecture: str
    kernel: str
    variant: str
    registers: int
    stack: int
    shared: int
    instruction: str  # the matrix instruction, or ""
    doubles: bool  # whether ``.f64`` occurs in the PTX, or ``_f64`` in AMD's assembly
    wide: bool  # whether rows are read 16 bytes at a time, or by the copy engine


def faults(compiled: Compiled) -> list[str]:
    """Return the faults of a kernel in words."""
    limit = shared_memory(compiled.architecture)
    code = "assembly" if is_amd(compiled.architecture) else "PTX"
    product = compiled.kernel.startswith(PRODUCTS)
    instruction = compiled.instruction or "nothing"
    checks = {
        f"spills: {compiled.stack} bytes of stack": compiled.stack > 0,
        f".f64 in the {code}": compiled.doubles,
        "no 16-byte loads": not compiled.wide and " odd " not in compiled.variant,
        f"{compiled.shared} bytes of shared memory, a block has {limit}": compiled.shared > limit,
        "no matrix instruction": product and not compiled.instruction,
        f"no wgmma but {instruction}": product
        and compiled.architecture == "sm_90"
        and instruction != "wgmma",
    }
    return [words for words, is_fault in checks.items() if is_fault]


def is_little(compiled: Compiled) -> bool:
    """Return whether a kernel has no fault but a spill that another compiler's may have."""
    alone = not faults(compiled._replace(stack=0))
    return alone and 0 < compiled.stack <= SPILL_OF_OTHERS


def inspect(architecture: str, kernel: str, variant: str, compiled: Any) -> Compiled:
    """Read the properties of a kernel from Triton's metadata, PTX and machine code."""
    if is_amd(architecture):
        return _inspect_amd(architecture, kernel, variant, compiled)
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


def _inspect_amd(architecture: str, kernel: str, variant: str, compiled: Any) -> Compiled:
    assembly: str = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        """Return a number of the kernel's description, which ends the assembly."""
        value = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)$", assembly, flags=re.MULTILINE)
        if value is None:
            raise RuntimeError(f"the assembly of {kernel} for {architecture} has no {name}")
        return int(value[1])

    return Compiled(
        architecture,
        kernel,
        variant,
        registers=metadata("vgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        instruction="mfma" if "v_mfma" in assembly else "",
        doubles=re.search(r"\bv_\w+_f64\b", assembly) is not None,
        wide=re.search(r"\b(global|buffer)_load_dwordx4\b", assembly) is not None,
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack of a cubin's kernel, by Triton's own cuobjdump."""
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
    usage = re.search(r"REG:(\d+) STACK:(\d+)", output)
    if usage is None:
        raise RuntimeError(f"cuobjdump reported no registers and stack:\n{output}")
    return int(usage[1]), int(usage[2])


class _NoGpuDriver:
    """A driver with which Triton can compile for ``architecture``, and nothing else."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if is_amd(self._architecture):
            return GPUTarget("hip", self._architecture, 64)
        return GPUTarget("cuda", number_of(self._architecture), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def set_target(architecture: str) -> None:
    """Make launches on meta tensors compile for ``architecture`` from now on.

    Call this once in a process: Triton caches its binaries by device, of which there is only one.
    """
    from triton.runtime import driver

    driver.set_active(_NoGpuDriver(architecture))
    launch.limits_registers = not is_amd(architecture)


def compile_all(architecture: str, candidates: bool = False, quick: bool = False) -> list[Compiled]:
    """Compile every kernel, variant, dtype and shipped config (or candidate).

    With ``quick``, in bfloat16 alone.
    """
    set_target(architecture)
    binaries: list[tuple[str, Any]] = []
    launch.on_compile = lambda *binary: binaries.append(binary)
    compiled: list[Compiled] = []
    table = read_table()[architecture]["stages"]
    for stage, (kind, widths) in itertools.product(STAGES, WIDTHS.items()):
        for name, buckets in parse_stage(table, stage).items():
            if (kind or quick) and name != "bfloat16":
                continue
            dtype = DTYPES[name]
            configs = [config for _, config in buckets]
            if candidates:
                configs = candidate_configs(stage, dtype, architecture)
            # Where addresses do not suit descriptors, the same tiles are read by pointers.
            configs += [
                config._replace(tma=False)
                for config in configs
                if isinstance(config, TileConfig) and config.tma
            ]
            kernel_configs = [config for config in dict.fromkeys(configs) if config is not None]
            calls = stage_calls(stage, dtype, 2, (16, 16), torch.device("meta"), widths)
            for (variant, call), config in itertools.product(calls, kernel_configs):
                binaries.clear()
                call(config=config)
                sizes = "/".join(str(int(field or 0)) for field in config)
                label = " ".join(filter(None, (name, kind, variant, sizes)))
                kernels = {kernel for kernel, _ in binaries}
                fused = any(kernel.startswith(stage) for kernel in kernels)
                if stage in PRODUCTS and kind != "odd" and not fused:
                    raise RuntimeError(f"{label}: {stage} was not compiled, only {kernels}")
                compiled += [
                    inspect(architecture, kernel, label, code) for kernel, code in binaries
                ]
    return compiled


class Predicted(NamedTuple):
    """A stage at a reference shape, in words, and whether it is over its budget.

    Attributes:
        is_little: whether it is so by little, and the compiler not that of the budgets.
    """

    text: str
    is_over: bool = False
    is_little: bool = False


class Inspected(NamedTuple):
    """All that is known of the kernels of one architecture."""

    compiled: list[Compiled]
    predictions: list[Predicted]


def inspect_all(architecture: str, candidates: bool = False, quick: bool = False) -> Inspected:
    """Compile everything for ``architecture``, and predict the times of shipped configs.

    With ``quick``, in bfloat16 and of images pooled to the largest grid alone.
    """
    compiled = compile_all(architecture, candidates, quick)
    judged = [] if candidates else verdicts(architecture, SIDES[-1:] if quick else SIDES)
    predictions = [Predicted(v.describe(), bool(v.fault), v.is_of_another_compiler) for v in judged]
    return Inspected(compiled, predictions)


def main(arguments: list[str] | None = None) -> int:
    known = [name for name in read_table() if name != INTERPRETER]
    nvidia = [name for name in known if not is_amd(name)]
    parser = argparse.ArgumentParser(prog="python -m tokenflex_kernels.aot", description=__doc__)
    parser.add_argument(
        "--architectures",
        type=names_of(known),
        default=",".join(nvidia),
        help=f"comma-separated, of {', '.join(known)}; default: %(default)s",
    )
    parser.add_argument(
        "--candidates", action="store_true", help="compile what tune would try, not what is shipped"
    )
    parser.add_argument("--quick", action="store_true", help="compile for bfloat16 alone")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--quiet", action="store_true", help="print faults and the summary only")
    options = parser.parse_args(arguments)
    refuse_interpreter(parser)
    architectures: list[str] = options.architectures

    # A process for each architecture: see set_target.
    with ProcessPoolExecutor(
        options.jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        inspect_each = partial(inspect_all, candidates=options.candidates, quick=options.quick)
        inspected = list(pool.map(inspect_each, architectures))
    compiled = [result for one in inspected for result in one.compiled]
    predictions = [prediction for one in inspected for prediction in one.predictions]
    is_other = not is_release("triton", COUNTED_WITH)
    bad = little = 0
    for result in compiled:
        wrong = faults(result)
        is_tolerated = is_other and is_little(result)
        little += is_tolerated
        bad += bool(wrong) and not is_tolerated
        if wrong or not options.quiet:
            print(
                f"{result.architecture:7} {result.kernel:27} {result.variant:55}"
                f" {result.registers:3} registers {result.stack:4} stack {result.shared:6} shared "
                f" {result.instruction:7} {'; '.join(wrong)}".rstrip()
            )
    over = 0
    for prediction in predictions:
        little += prediction.is_little
        over += prediction.is_over and not prediction.is_little
        if prediction.is_over or not options.quiet:
            print(prediction.text)
    print(f"{len(compiled)} kernels for {', '.join(architectures)}: {bad} with faults")
    if predictions:
        print(f"{len(predictions)} predictions: {over} over their budget")
    if little:
        print(compiler_remark(little))
    return 1 if bad or over else 0


if __name__ == "__main__":
    sys.exit(main())
