"""The executor on PTX written by hand: what instructions compute, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx import PtxError, TensorMap, execute, parse
from tests.ptx.asynchronous import swizzled

THREADS = 64


def ptx(body: str, parameters: int = 2, threads: int = THREADS, shared: int = 4096) -> str:
    """A kernel of ``body`` that knows its thread as %r0 and 4 times that as %rd0."""
    names = ", ".join(f".param .u64 k_param_{index}" for index in range(parameters))
    loads = "\n".join(f"ld.param.b64 %p{i}, [k_param_{i}];" for i in range(parameters))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.shared .align 1024 .b8 memory[{shared}];
.visible .entry k({names}) .reqntid {threads} {{
{loads}
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd0, %r0, 4;
shl.b32 %four, %r0, 2;
{body}
ret;
}}
"""


def run(body: str, *arguments, threads: int = THREADS, shared: int = 4096, programs: int = 1):
    return execute(ptx(body, len(arguments), threads, shared), arguments, programs)


def ints(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


class TestParse:
    def test_labels_and_registers_of_inner_scopes_are_their_own(self):
        wait = """{
            .reg .pred done;
            again:
            setp.eq.s32 done, 1, 1;
            @!done bra.uni again;
        }"""
        kernel = parse(ptx(f"{wait}\n{wait}"))
        targets = [i.operands[0] for i in kernel.instructions if i.words[0] == "bra"]
        assert len(set(targets)) == 2
        assert {kernel.instructions[kernel.labels[target]].opcode for target in targets} == {
            "setp.eq.s32"
        }

    def test_operands_hold_their_commas(self):
        kernel = parse(ptx("ld.global.v2.b32 {%r1, %r2}, [%p0+8]; // a comment; with {braces}"))
        (load,) = [i for i in kernel.instructions if i.words[1:2] == ("global",)]
        assert load.operands == ("{%r1, %r2}", "[%p0+8]")
        assert load.words == ("ld", "global", "v2", "b32")

    def test_lines_are_those_of_the_text(self):
        text = ptx("mov.u32 %r5, 5;\n\n  mov.u32 %r6, 6;")
        for instruction in parse(text).instructions:
            assert instruction.opcode in text.splitlines()[instruction.line - 1]

    def test_dynamic_shared_memory_comes_after_the_static(self):
        text = ptx("").replace(
            ".visible",
            ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 x[6];\n.visible",
        )
        kernel = parse(text)
        assert kernel.shared == {"memory": 0, "x": 4096, "dynamic": 4112}

    def test_what_is_no_kernel_is_refused(self):
        with pytest.raises(PtxError, match="no kernel"):
            parse(".version 8.7")
        with pytest.raises(PtxError, match="reqntid"):
            parse(ptx("").replace(".reqntid 64", ""))

    def test_unknown_instructions_are_named(self):
        with pytest.raises(PtxError, match=r"line \d+: unknown instruction: frobnicate"):
            run("frobnicate.b32 %r1, %r2;")


def _signed(value):
    return value.astype(np.int64)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r3, %r1, %r2", lambda a, b: a + b),
        ("sub.s32 %r3, %r1, %r2", lambda a, b: a - b),
        ("mul.lo.s32 %r3, %r1, %r2", lambda a, b: a * b),
        ("mul.hi.s32 %r3, %r1, %r2", lambda a, b: (_signed(a) * _signed(b)) >> 32),
        ("mul.hi.u32 %r3, %r1, %r2", lambda a, b: (a.view("u4").astype("u8") * b.view("u4")) >> 32),
        ("mad.lo.s32 %r3, %r1, %r2, %r1", lambda a, b: a * b + a),
        ("div.s32 %r3, %r1, 7", lambda a, b: np.trunc(a / 7)),
        ("rem.s32 %r3, %r1, 7", lambda a, b: np.fmod(a, 7)),
        ("div.u32 %r3, %r1, 7", lambda a, b: a.view("u4") // 7),
        ("min.s32 %r3, %r1, %r2", np.minimum),
        ("max.u32 %r3, %r1, %r2", lambda a, b: np.maximum(a.view("u4"), b.view("u4"))),
        ("and.b32 %r3, %r1, %r2", lambda a, b: a & b),
        ("xor.b32 %r3, %r1, 255", lambda a, b: a ^ 255),
        ("not.b32 %r3, %r1", lambda a, b: ~a),
        ("neg.s32 %r3, %r1", lambda a, b: -a),
        ("shl.b32 %r3, %r1, 3", lambda a, b: a << 3),
        ("shl.b32 %r3, %r1, 32", lambda a, b: a * 0),
        ("shr.u32 %r3, %r1, 3", lambda a, b: a.view("u4") >> 3),
        ("shr.s32 %r3, %r1, 40", lambda a, b: a >> 31),
        ("bfe.u32 %r3, %r1, 4, 9", lambda a, b: (a >> 4) & 511),
        ("bfe.s32 %r3, %r1, 4, 9", lambda a, b: (a << 19) >> 23),
        ("bfi.b32 %r3, %r1, %r2, 4, 9", lambda a, b: (b & ~(511 << 4)) | ((a & 511) << 4)),
        ("lop3.b32 %r3, %r1, %r2, %r0, 0x96", lambda a, b: a ^ b ^ np.arange(THREADS)),
        ("prmt.b32 %r3, %r1, %r2, 0x5410", lambda a, b: (a & 0xFFFF) | (b << 16)),
        ("shf.l.wrap.b32 %r3, %r1, %r2, 8", lambda a, b: (b << 8) | (a.view("u4") >> 24)),
        ("popc.b32 %r3, %r1", lambda a, b: [bin(x & 0xFFFFFFFF).count("1") for x in a.tolist()]),
        ("clz.b32 %r3, %r1", lambda a, b: [32 - (x & 0xFFFFFFFF).bit_length() for x in a.tolist()]),
        ("cvt.s32.s16 %r3, %r1", lambda a, b: a.astype(np.int16)),
        ("cvt.u32.u16 %r3, %r1", lambda a, b: a.astype(np.uint16)),
        ("selp.b32 %r3, %r1, %r2, %q", lambda a, b: np.where(a < b, a, b)),
        ("shfl.sync.bfly.b32 %r3, %r1, 5, 31, -1", lambda a, b: a[np.arange(THREADS) ^ 5]),
        (
            "shfl.sync.idx.b32 %r3, %r1, 3, 31, -1",
            lambda a, b: a[np.arange(THREADS) // 32 * 32 + 3],
        ),
        (
            "shfl.sync.up.b32 %r3, %r1, 1, 0, -1",
            lambda a, b: np.concatenate([a[:1], a[:31], a[32:33], a[32:63]]),
        ),
        ("redux.sync.add.s32 %r3, %r1, -1", lambda a, b: a.reshape(2, 32).sum(1).repeat(32)),
    ],
)
def test_integers(instruction, expected):
    a, b, out = ints(THREADS), ints(THREADS), ints(THREADS)
    run(
        f"""add.s64 %rd1, %p0, %rd0; add.s64 %rd2, %p1, %rd0; add.s64 %rd3, %p2, %rd0;
        ld.global.b32 %r1, [%rd1]; ld.global.b32 %r2, [%rd2];
        setp.lt.s32 %q, %r1, %r2;
        {instruction};
        st.global.b32 [%rd3], %r3;""",
        *(a, b, out),
    )
    with np.errstate(over="ignore"):
        values = np.asarray(expected(a.numpy(), b.numpy()))
    assert out.tolist() == values.astype(np.int64).astype(np.int32).tolist()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("fma.rn.f32 %r3, %r1, %r2, %r1", lambda a, b: a.double() * b.double() + a.double()),
        ("div.full.f32 %r3, %r1, %r2", lambda a, b: a / b),
        ("ex2.approx.ftz.f32 %r3, %r1", lambda a, b: torch.exp2(a.double())),
        ("rsqrt.approx.ftz.f32 %r3, %r2", lambda a, b: b.double().rsqrt()),
        ("max.f32 %r3, %r1, %r2", torch.maximum),
        ("mul.f32 %r3, %r1, 0fC0000000", lambda a, b: -2 * a),
        ("cvt.rn.bf16.f32 %r4, %r1; cvt.f32.bf16 %r3, %r4", lambda a, b: a.bfloat16()),
        ("cvt.rn.f16.f32 %r4, %r1; cvt.f32.f16 %r3, %r4", lambda a, b: a.half()),
        (
            "cvt.rn.bf16x2.f32 %r4, %r1, %r2; mov.b32 {_, %h}, %r4; cvt.f32.bf16 %r3, %h",
            lambda a, b: a.bfloat16(),
        ),
        (
            "cvt.rn.f16x2.f32 %r4, %r1, %r2; mov.b32 {%h, _}, %r4; cvt.f32.f16 %r3, %h",
            lambda a, b: b.half(),
        ),
        ("cvt.rzi.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r3, %r4", lambda a, b: a.trunc()),
    ],
)
def test_floats(instruction, expected):
    a, out = torch.randn(THREADS), torch.empty(THREADS)
    b = torch.rand(THREADS) + 0.1
    run(
        f"""add.s64 %rd1, %p0, %rd0; add.s64 %rd2, %p1, %rd0; add.s64 %rd3, %p2, %rd0;
        ld.global.b32 %r1, [%rd1]; ld.global.b32 %r2, [%rd2];
        {instruction};
        st.global.b32 [%rd3], %r3;""",
        *(a, b, out),
    )
    assert torch.equal(out, expected(a, b).float())


def test_tanh_has_the_error_of_the_hardware():
    a, out = torch.randn(THREADS), torch.empty(THREADS)
    run(
        """add.s64 %rd1, %p0, %rd0; add.s64 %rd3, %p1, %rd0; ld.global.b32 %r1, [%rd1];
        tanh.approx.f32 %r3, %r1; st.global.b32 [%rd3], %r3;""",
        *(a, out),
    )
    error = (out.double() / a.double().tanh() - 1).abs().max().item()
    assert 2**-13 < error <= 2**-11


class TestGlobalMemory:
    def test_vectors_and_predicates(self):
        a, out = ints(THREADS, 4), torch.zeros(THREADS, 4, dtype=torch.int32)
        run(
            """mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %p0, %rd1; add.s64 %rd3, %p1, %rd1;
            ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2]; setp.lt.u32 %q, %r0, 5;
            @%q st.global.v4.b32 [%rd3], {%r4, %r3, %r2, %r1};""",
            *(a, out),
        )
        assert torch.equal(out[:5], a[:5].flip(1))
        assert not out[5:].any()

    @pytest.mark.parametrize("offset", [-4, 4])
    def test_bounds(self, offset):
        with pytest.raises(PtxError, match="outside of all tensors"):
            run(f"add.s64 %rd1, %p0, %rd0; ld.global.b32 %r1, [%rd1+{offset}];", ints(THREADS))

    def test_the_gap_between_strided_rows_is_out_of_bounds(self):
        rows = ints(8, 16)[:, :12]
        body = "and.b32 %r1, %r0, 3; mul.wide.u32 %rd1, %r1, 64; add.s64 %rd2, %p0, %rd1;"
        run(f"{body} ld.global.b32 %r2, [%rd2+44];", rows)
        with pytest.raises(PtxError, match="outside of all tensors"):
            run(f"{body} ld.global.b32 %r2, [%rd2+48];", rows)

    def test_alignment(self):
        with pytest.raises(PtxError, match="load of 8 bytes at"):
            run("ld.global.b64 %rd1, [%p0+4];", ints(THREADS))

    def test_two_programs_must_not_store_to_one_address(self):
        out = ints(THREADS)
        body = "add.s64 %rd1, %p0, %rd0; st.global.b32 [%rd1], %r0;"
        assert run(body, out).races == []
        assert "another program" in run(body, out, programs=2).races[0]


class TestControlFlow:
    def test_loops(self):
        out = ints(THREADS)
        run(
            """mov.u32 %r1, 0; mov.u32 %r2, 0;
            $L1: add.s32 %r2, %r2, %r0; add.s32 %r1, %r1, 1; setp.lt.s32 %q, %r1, 5; @%q bra $L1;
            add.s64 %rd1, %p0, %rd0; st.global.b32 [%rd1], %r2;""",
            out,
        )
        assert out.tolist() == [5 * i for i in range(THREADS)]

    def test_threads_that_take_no_part_keep_their_registers(self):
        out = ints(THREADS)
        run(
            """mov.u32 %r1, 5; setp.lt.u32 %q, %r0, 40;
            @%q mov.u32 %r1, 7; @!%q add.s32 %r1, %r1, 1;
            add.s64 %rd1, %p0, %rd0; st.global.b32 [%rd1], %r1;""",
            out,
        )
        assert out.tolist() == [7] * 40 + [6] * 24

    @pytest.mark.parametrize("what", ["bra $L1", "bar.sync 0", "ret"])
    def test_threads_must_agree(self, what):
        with pytest.raises(PtxError, match="and others do not"):
            run(f"setp.lt.u32 %q, %r0, 40; @%q {what}; $L1: mov.u32 %r1, 0;", ints(1))

    def test_registers_are_written_before_they_are_read(self):
        with pytest.raises(PtxError, match="%r9 is read, but was never written"):
            run("add.s32 %r1, %r9, 1;", ints(1))


STORE = "mov.u32 %m, memory; add.s32 %m, %m, %four; st.shared.b32 [%m], %r0;"
LOAD_OTHER = (
    "xor.b32 %o, %four, 128; mov.u32 %n, memory; add.s32 %n, %n, %o; ld.shared.b32 %r1, [%n];"
)


class TestSharedMemory:
    def test_a_barrier_orders(self):
        out = ints(THREADS)
        store = "add.s64 %rd1, %p0, %rd0; st.global.b32 [%rd1], %r1;"
        execution = run(f"{STORE} bar.sync 0; {LOAD_OTHER} {store}", out)
        assert execution.races == []
        assert out.tolist() == [i ^ 32 for i in range(THREADS)]

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (f"{STORE} {LOAD_OTHER}", "another warp wrote since"),
            (f"{STORE} bar.sync 0; {LOAD_OTHER} {STORE}", "another warp read since"),
            (f"{STORE} st.shared.b32 [%m], %r0;", None),
            ("mov.u32 %m, memory; st.shared.b32 [%m], %r0;", "different values"),
            ("mov.u32 %m, memory; st.shared.b32 [%m], 7;", None),
            (  # both warps read what the second one writes
                f"""{STORE} bar.sync 0; mov.u32 %m, memory; ld.shared.b32 %r1, [%m];
                setp.eq.u32 %q, %r0, 40; @%q st.shared.b32 [%m], 7;""",
                "another warp read since",
            ),
            ("mov.u32 %m, memory; ld.shared.b32 %r1, [%m];", "never written"),
        ],
    )
    def test_races(self, body, words):
        races = run(body, ints(1)).races
        assert races == [] if words is None else words in races[0]

    def test_bounds_and_alignment(self):
        with pytest.raises(PtxError, match="outside of the"):
            run("mov.u32 %m, 232448; st.shared.b32 [%m], 1;", ints(1))
        with pytest.raises(PtxError, match="unaligned"):
            run("mov.u32 %m, memory; st.shared.b32 [%m+2], 1;", ints(1))


class TestCopies:
    COPY = """mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %p0, %rd1; shl.b32 %m, %r0, 4;
        cp.async.cg.shared.global [%m], [%rd2], 16, %size; cp.async.commit_group;"""
    LOAD = """ld.shared.b32 %r1, [%m]; add.s64 %rd3, %p1, %rd0; st.global.b32 [%rd3], %r1;"""

    def test_data_appear_at_the_wait(self):
        a, out = ints(THREADS, 4), ints(THREADS)
        size = "setp.lt.u32 %q, %r0, 50; selp.b32 %size, 16, 0, %q;"
        assert run(f"{size} {self.COPY} cp.async.wait_group 0; {self.LOAD}", a, out).races == []
        assert torch.equal(out[:50], a[:50, 0])
        assert not out[50:].any()

    @pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
    def test_a_missing_or_weak_wait_shows(self, wait):
        a, out = ints(THREADS, 4), ints(THREADS)
        races = run(f"mov.u32 %size, 16; {self.COPY} {wait} {self.LOAD}", a, out).races
        assert any("a copy still writes" in race for race in races)
        assert any("the program ends before a copy" in race for race in races)
        assert not (out == a[:, 0]).any()

    def test_a_wait_leaves_the_last_groups(self):
        a, b = ints(THREADS, 4), ints(THREADS, 4)
        second = self.COPY.replace("%p0", "%p1").replace(
            "shl.b32 %m, %r0, 4;", "add.s32 %k, %m, 1024;"
        )
        body = f"mov.u32 %size, 16; {self.COPY} {second.replace('[%m]', '[%k]')}"
        out = ints(THREADS)
        load = "ld.shared.b32 %r1, [%m]; add.s64 %rd3, %p2, %rd0; st.global.b32 [%rd3], %r1;"
        execution = run(f"{body} cp.async.wait_group 1; {load} cp.async.wait_group 0;", a, b, out)
        assert execution.races == []
        assert torch.equal(out, a[:, 0])


def box_kernel(rank: int, load: str, wait: bool = True) -> str:
    """Load a box, and store it to another place by the copy engine.

    The addresses of the maps are taken as Triton 3.8 takes them, and as 3.9 does.
    """
    parameters = ", ".join(
        [".param .align 64 .b8 from[128]", ".param .align 64 .b8 to[128]"]
        + [f".param .u32 c{i}" for i in range(2 * rank)]
    )
    loads = "\n".join(f"ld.param.b32 %c{i}, [c{i}];" for i in range(2 * rank))
    corners = [", ".join(f"%c{i}" for i in range(k * rank, (k + 1) * rank)) for k in (0, 1)]
    engine = f"cp.async.bulk.tensor.{rank}d"
    return f"""
.shared .align 1024 .b8 memory[65536];
.visible .entry k({parameters}) .reqntid 32 {{
{loads}
mov.u32 %r0, %tid.x; setp.eq.u32 %one, %r0, 0;
mov.b64 %from, from; mov.b32 %low, to; cvt.u64.u32 %wide, %low; cvta.param.u64 %to, %wide;
mov.u32 %m, memory; add.s32 %bar, %m, 65528;
@%one mbarrier.init.shared::cta.b64 [%bar], 1;
bar.sync 0;
@%one mbarrier.arrive.expect_tx.shared.b64 _, [%bar], {load};
@%one {engine}.shared::cta.global.mbarrier::complete_tx::bytes
  [%m], [%from, {{{corners[0]}}}], [%bar];
{"L: mbarrier.try_wait.parity.shared.b64 %done, [%bar], 0; @!%done bra L;" if wait else ""}
bar.sync 0;
@%one {engine}.global.shared::cta.bulk_group [%to, {{{corners[1]}}}], [%m];
cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
ret;
}}
"""


def map_of(tensor: torch.Tensor, box, swizzle: int) -> TensorMap:
    item = tensor.element_size()
    strides = tuple(step * item for step in tensor.stride())
    return TensorMap(tensor.data_ptr(), tuple(tensor.shape), strides, box, item, swizzle)


class TestCopyEngine:
    @pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int8])
    def test_boxes_are_moved_with_zeros_outside_of_the_tensor(self, dtype, swizzle):
        width = (swizzle or 64) // torch.empty(0, dtype=dtype).element_size()
        source = torch.randint(1, 100, (20, 80), dtype=torch.int64).to(dtype)
        target = torch.full((20, 80), -1, dtype=dtype)
        box = (8, width)
        # The box reaches over the upper edge, and is clipped at the right one as it is stored.
        arguments = [map_of(source, box, swizzle), map_of(target, box, swizzle), 16, -3, 72, 5]
        bytes_ = 8 * width * source.element_size()
        execution = execute(box_kernel(2, str(bytes_)), arguments, 1, memory=[source, target])
        assert execution.races == []
        expected = torch.full_like(target, -1)
        expected[5:8, 72:] = 0
        columns = min(8, width)
        expected[8:13, 72 : 72 + columns] = source[:5, 16 : 16 + columns]
        assert torch.equal(target, expected)
        # Of the source, the part within it; of the target, what is not clipped.
        in_source = 5 * min(width, 80 - 16) * source.element_size()
        assert execution.bytes_loaded == in_source
        assert execution.bytes_stored == 8 * columns * source.element_size()

    def test_rank_3_of_two_matrices_by_the_distance_between_them(self):
        memory = torch.randn(4096).bfloat16()
        first, second = memory[:320].view(20, 16), memory[1024:1344].view(20, 16)
        item, target = 2, torch.zeros(2, 8, 16, dtype=torch.bfloat16)
        both = TensorMap(first.data_ptr(), (2, 20, 16), (2048, 32, item), (2, 8, 16), item, 32)
        arguments = [both, map_of(target, (2, 8, 16), 32), 0, 12, 0, 0, 0, 0]
        execute(box_kernel(3, "512"), arguments, 1, memory=[first, second, target])
        assert torch.equal(target, torch.stack([first[12:], second[12:]]))

    def test_shared_memory_is_swizzled(self):
        rows = np.arange(8)
        assert (swizzled(rows * 128, 128) == rows * 128 + rows * 16).all()
        assert (swizzled(rows * 64, 64) == rows * 64 + rows // 2 * 16).all()
        assert (swizzled(rows * 32, 32) == rows * 32 + rows // 4 * 16).all()
        assert (swizzled(rows * 128, 0) == rows * 128).all()

    def _arguments(self):
        source, target = ints(8, 32), ints(8, 32)
        maps = [map_of(tensor, (8, 32), 128) for tensor in (source, target)]
        return [*maps, 0, 0, 0, 0], [source, target]

    def test_a_missing_wait_shows(self):
        arguments, (source, target) = self._arguments()
        races = execute(
            box_kernel(2, "1024", wait=False), arguments, 1, memory=[source, target]
        ).races
        assert any("a copy still writes" in race for race in races)
        assert not torch.equal(source, target)

    @pytest.mark.parametrize("announced", [512, 1040])
    def test_a_wait_for_other_bytes_never_ends(self, announced):
        arguments, memory = self._arguments()
        with pytest.raises(PtxError, match="the wait never ends"):
            execute(box_kernel(2, str(announced)), arguments, 1, memory=memory)

    def test_a_store_that_is_not_waited_for_shows(self):
        arguments, memory = self._arguments()
        text = box_kernel(2, "1024").replace("cp.async.bulk.wait_group.read 0;", "")
        races = execute(text, arguments, 1, memory=memory).races
        assert any("before a store of the copy engine" in race for race in races)

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"address": 8}, "address"),
            ({"strides": (72, 2)}, "strides"),
            ({"box": (257, 32)}, "box"),
            ({"box": (8, 128)}, "inner box"),
            ({"shape": (0, 64)}, "shape"),
        ],
    )
    def test_maps_that_the_driver_refuses(self, change, word):
        fields = {
            **{"address": 0, "shape": (64, 64), "strides": (128, 2)},
            **{"box": (8, 64), "item": 2, "swizzle": 128},
        }
        TensorMap(**fields)
        with pytest.raises(PtxError, match=word):
            TensorMap(**{**fields, **change})
