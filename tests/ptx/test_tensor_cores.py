"""Matrix products and the moves of their operands, on PTX written by hand.

Layouts are those of the tables in the PTX manual, written down element by element.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx import PtxError, execute
from tests.ptx.test_machine import map_of, run

HALVES = {torch.bfloat16: "bf16", torch.float16: "f16"}


def registers_of(matrix: torch.Tensor, places) -> torch.Tensor:
    """The bits of the elements at ``places``, [lanes, registers, elements], as int32 registers."""
    values = torch.stack([torch.stack([matrix[r, c] for r, c in lane]) for lane in places])
    return values.view(torch.int32)


def a_places(lane: int) -> list[tuple[int, int]]:
    """The eight elements of A that a lane holds, of m16n8k16."""
    row, column = lane // 4, lane % 4 * 2
    return [(row + 8 * (i // 2 % 2), column + i % 2 + 8 * (i // 4)) for i in range(8)]


def b_places(lane: int) -> list[tuple[int, int]]:
    return [(lane % 4 * 2 + i % 2 + 8 * (i // 2), lane // 4) for i in range(4)]


def c_places(lane: int) -> list[tuple[int, int]]:
    return [(lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2) for i in range(4)]


LOAD_AB = """mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %p0, %rd1; add.s64 %rd4, %p2, %rd1;
ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%rd2];
ld.global.v4.b32 {%c0, %c1, %c2, %c3}, [%rd4];
mul.wide.u32 %rd5, %r0, 8; add.s64 %rd6, %p1, %rd5; ld.global.v2.b32 {%b0, %b1}, [%rd6];"""
STORE_C = "st.global.v4.b32 [%rd4], {%c0, %c1, %c2, %c3};"


@pytest.mark.parametrize("dtype", HALVES)
def test_mma_of_16_bits(dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    lanes = range(32)
    a_bits, b_bits = registers_of(a, map(a_places, lanes)), registers_of(b, map(b_places, lanes))
    c_bits = registers_of(c, map(c_places, lanes))
    name = HALVES[dtype]
    sums = "{%c0, %c1, %c2, %c3}"
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32"
    body = f"{LOAD_AB} {product} {sums}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {sums}; {STORE_C}"
    execution = run(body, a_bits, b_bits, c_bits, threads=32)
    expected = (c.double() + a.double() @ b.double()).float()
    assert torch.equal(c_bits, registers_of(expected, map(c_places, lanes)))
    assert execution.instructions["tensor"] == 1


def test_mma_of_tf32_reads_the_upper_bits():
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    lanes = range(32)
    a_at = [[(t // 4 + 8 * (i % 2), t % 4 + 4 * (i // 2)) for i in range(4)] for t in lanes]
    b_at = [[(t % 4 + 4 * i, t // 4) for i in range(2)] for t in lanes]
    bits = registers_of(a, a_at), registers_of(b, b_at), registers_of(c, map(c_places, lanes))
    sums = "{%c0, %c1, %c2, %c3}"
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    body = f"{LOAD_AB} {product} {sums}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {sums}; {STORE_C}"
    run(body, *bits, threads=32)

    def cut(matrix):
        return (matrix.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    expected = (c.double() + cut(a) @ cut(b)).float()
    assert torch.equal(bits[2], registers_of(expected, map(c_places, lanes)))


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_loaded_as_a_product_holds_them(trans):
    matrix = torch.randint(0, 2**15, (32, 8), dtype=torch.int16)
    out = torch.zeros(32, 4, dtype=torch.int32)
    run(
        f"""mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %p0, %rd1; add.s64 %rd3, %p1, %rd1;
        ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%rd2]; shl.b32 %m, %r0, 4;
        st.shared.v4.b32 [%m], {{%a0, %a1, %a2, %a3}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%b0, %b1, %b2, %b3}}, [%m];
        st.global.v4.b32 [%rd3], {{%b0, %b1, %b2, %b3}};""",
        *(matrix, out),
        threads=32,
    )
    halves = out.view(torch.int16).view(32, 4, 2)
    for lane in range(32):
        for index in range(4):
            row, column = lane // 4, lane % 4 * 2
            tile = matrix[8 * index : 8 * index + 8]
            tile = tile.T if trans else tile
            assert halves[lane, index].tolist() == tile[row, column : column + 2].tolist()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_storing_matrices_undoes_loading_them(trans):
    matrix = torch.randint(0, 2**15, (32, 8), dtype=torch.int16)
    out = torch.zeros_like(matrix)
    execution = run(
        f"""mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %p0, %rd1; add.s64 %rd3, %p1, %rd1;
        ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%rd2]; shl.b32 %m, %r0, 4;
        st.shared.v4.b32 [%m], {{%a0, %a1, %a2, %a3}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%b0, %b1, %b2, %b3}}, [%m];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%m+512], {{%b0, %b1, %b2, %b3}};
        ld.shared.v4.b32 {{%a0, %a1, %a2, %a3}}, [%m+512];
        st.global.v4.b32 [%rd3], {{%a0, %a1, %a2, %a3}};""",
        *(matrix, out),
        threads=32,
    )
    assert execution.races == []
    assert torch.equal(matrix, out)


# ---- wgmma, on operands that the copy engine loads.

ACCUMULATORS = ", ".join(f"%c{i}" for i in range(8))  # of m64n16


def product_kernel(depth: int, *, left: str = "%da", flags: str = "0, 0", tail: str = "") -> str:
    """C = A B, [64, 16], in steps of 16; A and B come in boxes with a swizzle of 128 bytes."""
    engine = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
    steps = "\n".join(
        f"""add.s64 %da, %d0, {step * 2}; add.s64 %db, %d1, {step * DB_STEP[flags]};
        wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16
          {{{ACCUMULATORS}}}, {left}, %db, 1, 1, 1, {flags};"""
        for step in range(depth // 16)
    )
    stores = "\n".join(f"st.global.b32 [%out+{4 * i}], %c{i};" for i in range(8))
    zeros = "\n".join(f"mov.b32 %c{i}, 0f00000000;" for i in range(8))
    return f"""
.shared .align 1024 .b8 memory[32768];
.visible .entry k(.param .align 64 .b8 a[128], .param .align 64 .b8 b[128], .param .u64 c)
  .reqntid 128 {{
mov.u32 %r0, %tid.x; setp.eq.u32 %one, %r0, 0; mov.b64 %a, a; mov.b64 %b, b;
ld.param.b64 %out, [c]; mul.wide.u32 %rd0, %r0, 32; add.s64 %out, %out, %rd0;
mov.u32 %m, memory; add.s32 %bar, %m, 32760; add.s32 %mb, %m, 16384;
@%one mbarrier.init.shared.b64 [%bar], 1;
bar.sync 0;
@%one mbarrier.arrive.expect_tx.shared.b64 _, [%bar], {64 * 64 * 2 + 64 * 64 * 2};
@%one {engine} [%m], [%a, {{0, 0}}], [%bar];
@%one {engine} [%mb], [%b, {{0, 0}}], [%bar];
L: mbarrier.try_wait.parity.shared.b64 %done, [%bar], 0; @!%done bra L;
// start address, and a stride of 1024 bytes between groups of 8 rows; 1 is the swizzle of 128
mov.b64 %d0, {(64 << 32) | (1 << 62)};
mov.b64 %d1, {(64 << 32) | (1 << 62) | (16384 >> 4)};
{zeros}
wgmma.fence.sync.aligned;
{steps}
wgmma.commit_group.sync.aligned;
{tail or "wgmma.wait_group.sync.aligned 0;"}
{stores}
ret;
}}
"""


# Steps of a descriptor by 16 of the depth: 32 bytes of a row, or 16 rows of 128 bytes.
DB_STEP = {"0, 0": 2, "0, 1": 128}


def unpacked(registers: torch.Tensor) -> torch.Tensor:
    """The matrix [64, 16] of what 128 threads hold, [128, 8]."""
    matrix = torch.zeros(64, 16)
    for thread in range(128):
        for i in range(8):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            matrix[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = registers[thread, i]
    return matrix


def operands(flags: str):
    """A as [64, 64], and B so that its columns or its rows are contiguous, 64 x 64."""
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    right = b.double()[:16].T if flags == "0, 0" else b.double()[:, :16]
    return a, b, right


@pytest.mark.parametrize("flags", DB_STEP)
@pytest.mark.parametrize("depth", [16, 64])
def test_products_of_swizzled_operands(depth, flags):
    a, b, right = operands(flags)
    out = torch.zeros(128, 8)
    maps = [map_of(tensor, (64, 64), 128) for tensor in (a, b)]
    execution = execute(product_kernel(depth, flags=flags), [*maps, out], 1, memory=[a, b])
    assert execution.races == []
    expected = a.double()[:, :depth] @ right[:depth]
    torch.testing.assert_close(unpacked(out).double(), expected, rtol=1e-6, atol=1e-5)


def test_the_first_operand_may_be_in_registers():
    """Every thread holds ones, so that sums over the depth come out."""
    a, b, right = operands("0, 0")
    out = torch.zeros(128, 8)
    maps = [map_of(tensor, (64, 64), 128) for tensor in (a, b)]
    ones = "mov.b32 %ones, 0x3f803f80;\nwgmma.fence"
    text = product_kernel(64, left="{%ones, %ones, %ones, %ones}", flags="0, 0")
    text = text.replace("wgmma.fence", ones).replace("1, 1, 1, 0, 0;", "1, 1, 1, 0;")
    execute(text, [*maps, out], 1, memory=[a, b])
    expected = right.sum(0).expand(64, -1)
    torch.testing.assert_close(unpacked(out).double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ("", None),
        ("wgmma.wait_group.sync.aligned 1;", "%c0 is read while a wgmma may still write it"),
        (
            "st.shared.b32 [%m], 0; wgmma.wait_group.sync.aligned 0;",
            "writes shared memory that is still being read by an asynchronous operation",
        ),
    ],
)
def test_products_complete_at_the_wait(tail, words):
    a, b, _ = operands("0, 0")
    out = torch.zeros(128, 8)
    arguments = [*(map_of(tensor, (64, 64), 128) for tensor in (a, b)), out]
    try:
        seen = execute(product_kernel(64, tail=tail), arguments, 1, memory=[a, b]).races
    except PtxError as error:
        seen = [str(error)]
    assert seen == [] if words is None else any(words in race for race in seen)


def test_operands_that_threads_wrote_need_a_fence():
    a, b, _ = operands("0, 0")
    out = torch.zeros(128, 8)
    arguments = [*(map_of(tensor, (64, 64), 128) for tensor in (a, b)), out]
    for fence, words in (("", "without fence.proxy.async"), ("fence.proxy.async;", None)):
        store = f"st.shared.b32 [%m], 0; {fence} bar.sync 0;\nwgmma.fence"
        text = product_kernel(16).replace("wgmma.fence", store)
        races = execute(text, arguments, 1, memory=[a, b]).races
        assert races == [] if words is None else words in races[0]


@pytest.mark.parametrize(
    ("before", "is_ordered"),
    [
        ("wgmma.fence.sync.aligned;", True),
        ("wgmma.fence.sync.aligned; mov.b32 %unused, 0;", True),
        ("", False),
        ("wgmma.fence.sync.aligned; mov.b32 %c3, 0f00000000;", False),
    ],
)
def test_registers_that_threads_wrote_need_a_fence(before, is_ordered):
    a, b, _ = operands("0, 0")
    out = torch.zeros(128, 8)
    arguments = [*(map_of(tensor, (64, 64), 128) for tensor in (a, b)), out]
    text = product_kernel(64).replace("wgmma.fence.sync.aligned;", before)
    races = execute(text, arguments, 1, memory=[a, b]).races
    words = "registers that were written since the last wgmma.fence"
    assert all(words in race for race in races)
    assert (races == []) == is_ordered


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"bar.sync 0;": ""}, "reads shared memory that another warp wrote"),
        ({"ret;": "bar.sync 0; @%one mbarrier.inval.shared.b64 [%bar]; ret;"}, None),
        ({"ret;": "@%one mbarrier.inval.shared.b64 [%bar]; ret;"}, "that another warp read"),
        ({"ret;": "bar.sync 0; st.shared.b32 [%bar], 0; ret;"}, None),
        ({"ret;": "@%one st.shared.b32 [%bar], 0; ret;"}, "that another warp read"),
    ],
)
def test_barriers_order_the_first_and_the_last_use_of_a_barrier_object(changes, words):
    a, b, _ = operands("0, 0")
    out = torch.zeros(128, 8)
    text = product_kernel(64)
    for old, new in changes.items():
        text = text.replace(old, new)
    arguments = [*(map_of(tensor, (64, 64), 128) for tensor in (a, b)), out]
    races = execute(text, arguments, 1, memory=[a, b]).races
    assert races == [] if words is None else any(words in race for race in races)


def test_many_lanes_of_numpy_agree_with_torch():
    """bfloat16 is rounded as PyTorch rounds it, ties and infinities included."""
    from tests.ptx.operands import round_to_bf16

    bits = np.arange(0, 2**32, 65_521, dtype=np.uint64).astype(np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    is_number = ~np.isnan(bits.view(np.float32))
    assert (round_to_bf16(bits.view(np.float32))[is_number] == expected[is_number]).all()
