"""Bugs of every kind, planted in the PTX of two kernels, are found.

A bug is an edit of the text. It is found if the result is wrong, an access is not ordered or the
program is refused.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.common import rms, rms_error
from tests.ptx import PtxError, compile_kernel, execute
from tests.ptx.launching import Argument
from tests.ptx.triton_kernels import product_kernel, standardise_kernel

# The depth is four blocks for three stages: the last is in the first stage, which is used again.
ROWS, COLUMNS, DEPTH, WIDTH = 50, 48, 256, 300

COPY = r"cp\.async\.cg\.shared\.global \[ %r\d+ \+ "
WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[%r\d+\], "
DESCRIPTOR = (1 << 62) | (64 << 32)  # a swizzle of 128 bytes, groups of rows of 1024
PRODUCT_WAIT = r"wgmma\.wait_group\.sync\.aligned "

# The name of a bug, the kernel, what is replaced, by what, and which of the matches.
BARRIERS = [  # the first of the products' kernels orders nothing: nothing was read before it
    *(("a dropped barrier", "wgmma", r"bar\.sync\s+0;", "", place) for place in (1, 2, 3, 4)),
    *(("a dropped barrier", "mma", r"bar\.sync\s+0;", "", place) for place in (1, 2, 3, 4)),
    *(("a dropped barrier", "rows", r"bar\.sync\s+0;", "", place) for place in range(5)),
    (
        "a dropped barrier before the copy engine writes",
        *("tma", rf"({PRODUCT_WAIT}1;.*?)bar\.sync\s+0;", r"\1", 0),
    ),
    (
        "a dropped barrier before the copy engine reads",
        *("tma", r"(fence\.proxy\.async\.shared::cta;.*?)bar\.sync\s+0;", r"\1", 0),
    ),
]  # fmt: skip
WAITS = [
    ("a weaker wait for copies", "wgmma", r"cp\.async\.wait_group\s+2", "cp.async.wait_group 3", 0),
    ("a weaker wait for copies", "mma", r"cp\.async\.wait_group\s+2", "cp.async.wait_group 3", 0),
    ("no wait for copies", "wgmma", r"cp\.async\.wait_group\s+2;", "", 0),
    ("no group of copies", "wgmma", r"cp\.async\.commit_group;", "", 1),
    ("a weaker wait for products", "wgmma", f"({PRODUCT_WAIT})1", r"\g<1>2", 0),
    ("a weaker last wait for products", "wgmma", f"({PRODUCT_WAIT})0", r"\g<1>1", 0),
    ("no group of products", "wgmma", r"wgmma\.commit_group\.sync\.aligned;", "", 0),
    ("no fence before products", "wgmma", r"fence\.proxy\.async\.shared::cta;", "", 0),
    ("no fence of registers", "wgmma", r"wgmma\.fence\.sync\.aligned;", "", 0),
    ("no fence of registers", "tma", r"wgmma\.fence\.sync\.aligned;", "", 0),
    ("no fence before a store", "tma", r"fence\.proxy\.async\.shared::cta;", "", 0),
    ("no wait for a barrier object", "tma", rf"{WAIT}%r\d+", "setp.eq.u32 complete, 0, 0", 0),
    ("a wait for the phase before", "tma", rf"({WAIT})%r\d+", r"\g<1>1", 0),
    ("fewer bytes are announced", "tma", r"(expect_tx.*?), 16384", r"\1, 8192", 0),
    ("more arrivals are awaited", "tma", r"(mbarrier\.init.*?), 1;", r"\1, 2;", 0),
    ("no wait for a store", "tma", r"cp\.async\.bulk\.wait_group\.read\s+0;", "", 0),
    ("no group of stores", "tma", r"cp\.async\.bulk\.commit_group;", "", 0),
]  # fmt: skip
ADDRESSES = [
    ("a copy from elsewhere", "wgmma", rf"({COPY}0 \], \[ %rd\d+ \+ )0", r"\g<1>16", 0),
    ("a copy to elsewhere", "wgmma", f"({COPY})0", r"\g<1>16", 0),
    ("a copy to elsewhere", "mma", f"({COPY})0", r"\g<1>64", 0),
    ("an unaligned copy", "wgmma", rf"({COPY}0 \], \[ %rd\d+ \+ )0", r"\g<1>2", 0),
    ("a shared store elsewhere", "wgmma", r"(st\.shared\.v4\.b32 \[ %r\d+ \+ )0", r"\g<1>16", 0),
    ("matrices from elsewhere", "wgmma", r"(ldmatrix.*\[%r\d+)\+512\]", r"\1+1024]", 0),
    ("matrices from elsewhere", "mma", r"(ldmatrix.*\[%r\d+)\+4096\]", r"\1]", 0),
    ("a load from elsewhere", "rows", r"(ld\.global\.b16 .*\+ )0", r"\g<1>2", 0),
    ("a shared load from elsewhere", "rows", r"\[global_smem\]", "[global_smem+4]", 0),
    ("coordinates in the other order", "tma", r"\{(%r\d+), (%r\d+)\}", r"{\2, \1}", 2),
    ("the other tensor map", "tma", r"\[%rd2, ", "[%rd1, ", 0),
]  # fmt: skip
OPERANDS = [
    ("operands in the other order", "wgmma", r"\}, (%rd\d+), (%rd\d+),", r"}, \2, \1,", 0),
    ("a transposed operand", "wgmma", r", 1, 1, 0, 0;", ", 1, 1, 0, 1;", 0),
    ("a negated operand", "wgmma", r", 1, 1, 0, 0;", ", 1, -1, 0, 0;", 0),
    ("another swizzle", "wgmma", f"{DESCRIPTOR}", f"{DESCRIPTOR + (1 << 62)}", 0),
    ("registers in the other order", "mma", r"\{ (%r\d+), (%r\d+) \}, \{", r"{ \2, \1 }, {", 0),
    ("transposed matrices", "mma", r"ldmatrix\.sync\.aligned\.m8n8\.x4\.", r"\g<0>trans.", 0),
    (
        "halves in the other order",
        *("wgmma", r"(cvt\.rn\.bf16x2\.f32\s+%r\d+, )(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    ),
    ("another partner of an exchange", "rows", r"(shfl\.sync\.bfly.*), 16, 31", r"\1, 8, 31", 0),
    ("an approximation of another function", "rows", r"rsqrt\.approx\.ftz", "rcp.approx.ftz", 0),
]  # fmt: skip
BOUNDS = [
    ("a reversed predicate", "wgmma", r"@(%p\d+) st\.global", r"@!\1 st.global", 0),
    ("a lost predicate of a store", "wgmma", r"@%p\d+ st\.global", "st.global", 3),
    ("a lost predicate of a shared store", "rows", r"@%p\d+ st\.shared", "st.shared", 1),
    ("a lost predicate of a load", "rows", r"@%p\d+ ld\.global", "ld.global", 3),
    ("a lost size of a copy", "wgmma", r"0x10, %r\d+;", "0x10, 16;", 3),
    ("a bound that is off by one", "wgmma", r"setp\.lt\.s32(\s+%p\d+, %r\d+)", r"setp.le.s32\1", 3),
    ("a bound that is off by one", "rows", r"setp\.lt\.s32(\s+%p\d+, %r\d+)", r"setp.le.s32\1", 2),
    ("another value outside of the mask", "rows", "0f00000000, %p4", "0f3F800000, %p4", 0),
    (
        "a loop that ends too early",
        *("wgmma", r"setp\.lt(\.s32\s+%p\d+, [^;]*;\s+@%p\d+ bra)", r"setp.gt\1", 0),
    ),
    ("another number of stages", "wgmma", r"(setp\.gt\.s32\s+%p\d+, %r\d+, )2;", r"\g<1>1;", 0),
]  # fmt: skip
CONTROL = [
    ("a branch of some threads", "wgmma", r"@%p\d+ bra", "setp.lt.u32 %p1, %r1, 40; @%p1 bra", 0),
    ("a barrier of some threads", "rows", r"bar\.sync", "@%p5 bar.sync", 0),
    ("a value that is never written", "rows", r"shfl(\.\S+\s+%r\d+), %r\d+", r"shfl\1, %r998", 0),
]  # fmt: skip
BUGS = {
    "barriers": BARRIERS,
    "waits and fences": WAITS,
    "addresses": ADDRESSES,
    "operands": OPERANDS,
    "predicates and bounds": BOUNDS,
    "control flow": CONTROL,
}
ALL = [bug for bugs in BUGS.values() for bug in bugs]


def _described(tensor: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [64, 64])


@cache
def compiled(name: str) -> tuple[str, int, list[Argument], torch.Tensor, torch.Tensor, float]:
    """Return PTX, shared memory, arguments, result, float64's result and the error allowed."""
    torch.manual_seed(0)
    if name == "rows":
        x = torch.randn(3, WIDTH).bfloat16()
        out = torch.empty_like(x)
        code, arguments = compile_kernel(
            "sm_90", standardise_kernel, (x, out, WIDTH), 3, BLOCK=512, num_warps=4
        )
        truth = torch.nn.functional.layer_norm(x.double(), (WIDTH,), eps=0.0)
        eager = torch.nn.functional.layer_norm(x, (WIDTH,), eps=0.0)
    else:
        a, b = torch.randn(ROWS, DEPTH).bfloat16(), torch.randn(COLUMNS, DEPTH).bfloat16()
        out = torch.empty(ROWS, COLUMNS).bfloat16()
        tensors = (a, b, out) if name != "tma" else tuple(map(_described, (a, b, out)))
        code, arguments = compile_kernel(
            "sm_80" if name == "mma" else "sm_90",
            product_kernel,
            (*tensors, ROWS, COLUMNS, DEPTH),
            1,
            **{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "TMA": name == "tma"},
            **{"num_warps": 4, "num_stages": 3},
        )
        truth, eager = a.double() @ b.double().T, a @ b.T
    rounding = rms(truth.bfloat16().double() - truth)
    allowed = 1.2 * max(rms_error(eager, truth), rounding)
    return code.asm["ptx"], code.metadata.shared, arguments, out, truth, allowed


def faults(name: str, text: str) -> list[str]:
    """Return what is wrong with a text of a kernel in words."""
    _, shared, arguments, out, truth, allowed = compiled(name)
    out.fill_(float("nan"))
    try:
        execution = execute(text, arguments, 3 if name == "rows" else 1, shared_bytes=shared)
    except PtxError as error:
        return [str(error)]
    error = rms_error(out, truth)
    wrong = [] if error <= allowed else [f"error {error:.3g}, allowed {allowed:.3g}"]
    return wrong + execution.races


@pytest.mark.parametrize("name", ["wgmma", "tma", "mma", "rows"])
def test_there_is_nothing_to_be_found_without_a_bug(name):
    text = compiled(name)[0]
    words = {"wgmma": "wgmma", "tma": "bulk.tensor", "mma": "mma.sync", "rows": "shfl"}
    assert words[name] in text
    assert faults(name, text) == []


@pytest.mark.parametrize(
    ("name", "kernel", "pattern", "replacement", "place"),
    ALL,
    ids=[f"{bug[1]}-{bug[0].replace(' ', '-')}-{bug[4]}" for bug in ALL],
)
def test_a_bug_is_found(name, kernel, pattern, replacement, place):
    text = compiled(kernel)[0]
    match = list(re.finditer(pattern, text, re.DOTALL if ".*?" in pattern else 0))[place]
    edited = text[: match.start()] + match.expand(replacement) + text[match.end() :]
    assert edited != text
    found = faults(kernel, edited)
    print(found[:1])
    assert found, name
