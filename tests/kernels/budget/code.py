"""Hand-written machine code for the tests of the walk."""

from __future__ import annotations

import numpy as np

from tokenflex_kernels.budget.sass import parse_sass
from tokenflex_kernels.budget.state import Buffer, Launch, State
from tokenflex_kernels.budget.walk import walk_block

FIRST = 0x210  # of the arguments, in the bank of constants


def assemble(*lines: str):
    """Return instructions from lines such as ``@P0 BRA 0x20``, 16 bytes apart."""
    return parse_sass(
        "\n".join(
            f"        /*{16 * k:04x}*/                   {line} ;      /* 0x000fe20000000f00 */"
            for k, line in enumerate(lines)
        )
    )


def launch_of(
    *lines: str, arguments=(), buffers=(), num_warps=1, programs=1, tensor_maps=None
) -> Launch:
    """Return a launch of the lines and an EXIT; ``arguments`` are 64-bit, one after the other."""
    constants = {}
    for k, value in enumerate(arguments):
        constants[FIRST + 8 * k] = int(value) & 0xFFFFFFFF
        constants[FIRST + 8 * k + 4] = int(value) >> 32 & 0xFFFFFFFF
    code = assemble(*lines, "EXIT")
    return Launch(code, constants, buffers, num_warps, programs, 4096, tensor_maps or {})


def values_after(*lines: str, **options):
    """Walk the lines; return the values of registers and predicates by name."""
    state = State(launch_of(*lines, **options), 0)
    walk_block(state, 1000)
    return state.values


def table(values) -> Buffer:
    """Return a buffer whose content is known."""
    content = np.asarray(values, np.int32).view(np.uint8)
    return Buffer(len(content), content)
