"""Compile launches in several processes, without a GPU, into Triton's cache.

A process that launches the same kernels afterwards finds them there. Compiling takes a second or
more for each kernel, so it is done before a GPU is used, on all cores.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch

from tokenflex_kernels import launch
from tokenflex_kernels.aot import WIDTHS, Compiled, inspect, set_target
from tokenflex_kernels.gpus import blocks_at_once, is_amd, shared_memory
from tokenflex_kernels.launch_configs import DTYPES, Config
from tokenflex_kernels.stage_calls import stage_calls

SILENCE = 120.0  # seconds without a result after which the compiler is taken for dead


class Launch(NamedTuple):
    """One compilation: a stage with one config, as training calls it or in every variant."""

    stage: str
    dtype: str
    config: Config | None
    widths: str = ""  # a key of ``aot.WIDTHS``
    every_variant: bool = False


class Built(NamedTuple):
    """The kernels of a launch and the warps of their blocks; or the reason why there are none."""

    kernels: tuple[tuple[Compiled, int], ...]
    error: str = ""


def build(
    architecture: str,
    launches: Sequence[Launch],
    *,
    jobs: int | None = None,
    seconds: float = math.inf,
) -> Iterator[tuple[Launch, Built]]:
    """Yield each launch as it is compiled, in any order; fewer if time ends or the compiler dies.

    Args:
        architecture: To compile for.
        launches: What to compile.
        jobs: Processes at once; as many as there are cores by default.
        seconds: Time after which compiling stops.
    """
    if not launches:
        return
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")  # Triton's target is one for a whole process
    processes = min(jobs or os.cpu_count() or 1, len(launches))
    with context.Pool(processes, initializer=set_target, initargs=(architecture,)) as pool:
        results = pool.imap_unordered(partial(_build, architecture), launches)
        for _ in launches:
            try:
                yield results.next(timeout=max(0.0, min(SILENCE, end - time.monotonic())))
            except multiprocessing.TimeoutError:
                return


def _build(architecture: str, wanted: Launch) -> tuple[Launch, Built]:
    binaries: list[tuple[str, Any]] = []
    launch.on_compile = lambda *binary: binaries.append(binary)
    arguments = (2, (16, 16), torch.device("meta"), WIDTHS[wanted.widths])
    try:
        variants = stage_calls(wanted.stage, DTYPES[wanted.dtype], *arguments)
        for _, call in variants if wanted.every_variant else islice(variants, 1):
            call(config=wanted.config)
        kernels = [
            (inspect(architecture, name, wanted.stage, binary), binary.metadata.num_warps)
            for name, binary in binaries
        ]
    except Exception as error:  # the compiler's limits have many types
        return wanted, Built((), reason_of(error))
    return wanted, Built(tuple(kernels))


def reason_of(error: Exception) -> str:
    """Return an error in one line: the first and the last of its own."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' .. '.join(dict.fromkeys((lines[0], lines[-1])))}"[:200]


def unfit(architecture: str, built: Built) -> str:
    """Return why a launch is not worth measuring, or "".

    A kernel that spills, or of which not one block fits a multiprocessor.
    """
    if built.error:
        return built.error
    for compiled, warps in built.kernels:
        if compiled.stack > 0:
            return f"spills: {compiled.stack} bytes of stack"
        limit = shared_memory(architecture)
        if compiled.shared > limit:
            return f"{compiled.shared} bytes of shared memory, a block has {limit}"
        if not is_amd(architecture) and not blocks_at_once(
            architecture, compiled.registers, warps, compiled.shared
        ):
            return f"{compiled.registers} registers of {warps} warps do not fit a multiprocessor"
    return ""
