"""Tests that need a GPU: real sizes, every shipped config, streams, CUDA graphs, large tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks.stubbed_gpu import unrecorded
from tests.kernels.common import (
    GATED,
    MODES,
    ON_TRITON,
    PARAMETERS,
    SAVES,
    assert_as_close_as_eager,
    eager_pool_norm,
    eager_project,
    eager_swiglu,
    parameters_of,
    rows_of,
    run,
)
from tokenflex_kernels import (
    CapturedProjection,
    call_records,
    plan_pooling,
    pool_norm,
    project_tokens,
    swiglu,
)
from tokenflex_kernels.call_records import forget_records
from tokenflex_kernels.launch_configs import (
    NAMES,
    PRODUCTS,
    STAGES,
    architecture,
    nearest,
    parse_stage,
    read_table,
)
from tokenflex_kernels.pool_norm.tables import CACHED_TABLES, pooling_tables

pytestmark = [ON_TRITON, pytest.mark.gpu]

WIDTH, HIDDEN, TEXT = 1152, 3456, 2048
# Two thousand tokens and more: the configs of a training batch, not those of one image.
IN_GRIDS = [(27, 27)] * 15
OUT_GRIDS = [(8, 8), (12, 12), (16, 16)] * 5
NARROW = (torch.bfloat16, torch.float16)
_fresh = count(30)


@pytest.fixture
def device():
    """No interpreter here: a GPU or nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs compiled kernels, and TRITON_INTERPRET=1 is set")
    return "cuda"


def fresh_grids():
    """Grids that no test had before: a batch whose tables are not cached."""
    side = next(_fresh)
    return [(side, 3), (5, side)], [(4, 2), (3, 7)]


def project_inputs(dtype, in_grids, width=WIDTH, hidden=HIDDEN, text=TEXT):
    x = torch.randn(rows_of(in_grids), width, device="cuda").to(dtype)
    return {"x": x, **parameters_of(width, hidden, text, dtype, "cuda")}


def projection(in_grids, out_grids, **options):
    def ours(x, **parameters):
        return project_tokens(x, in_grids, out_grids, **parameters, **options)

    def peer(x, **parameters):
        return eager_project(x, in_grids, out_grids, **parameters, **options)

    return ours, peer


def check_on_gpu(op, peer, inputs, gradient, wanted=None):
    """As ``common.check``, the truth computed on the GPU: float64 is slow on the CPU here."""
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    truth = run(peer, wide, gradient.double(), wanted)
    assert_as_close_as_eager(
        run(op, inputs, gradient, wanted),
        run(peer, inputs, gradient, wanted),
        {name: tensor.cpu() for name, tensor in truth.items()},
    )


def capture(function):
    """A CUDA graph of ``function``, warmed up as PyTorch asks for, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


class TestRealSizes:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    def test_the_projector_on_a_training_batch(self, dtype, save):
        inputs = project_inputs(dtype, IN_GRIDS)
        gradient = torch.randn(rows_of(OUT_GRIDS), TEXT, device="cuda").to(dtype)
        check_on_gpu(*projection(IN_GRIDS, OUT_GRIDS, save=save), inputs, gradient)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    def test_pooling_of_a_training_batch(self, dtype, mode):
        in_grids, out_grids = IN_GRIDS * 8, OUT_GRIDS * 8

        def ours(x, weight, bias):
            return pool_norm(x, in_grids, out_grids, mode=mode, weight=weight, bias=bias)

        def peer(x, weight, bias):
            return eager_pool_norm(x, in_grids, out_grids, mode, weight, bias)

        inputs = {
            "x": torch.randn(rows_of(in_grids), WIDTH, device="cuda").to(dtype),
            "weight": torch.randn(WIDTH, device="cuda").to(dtype),
            "bias": torch.randn(WIDTH, device="cuda").to(dtype),
        }
        gradient = torch.randn(rows_of(out_grids), WIDTH, device="cuda").to(dtype)
        check_on_gpu(ours, peer, inputs, gradient)
        check_on_gpu(ours, peer, inputs, gradient, ["weight", "bias"])

    @pytest.mark.parametrize("tokens", [1, 17, 64, 256, 1000, 8192])
    def test_the_gated_unit_in_every_bucket(self, tokens):
        parameters = parameters_of(WIDTH, HIDDEN, 1, torch.bfloat16, "cuda")
        inputs = {name: parameters[name] for name in GATED}
        inputs["x"] = torch.randn(tokens, WIDTH, device="cuda").bfloat16()
        gradient = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        check_on_gpu(swiglu, eager_swiglu, inputs, gradient)

    @pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
    @pytest.mark.parametrize("stage", STAGES)
    def test_every_config_of_the_table(self, use_config, launched, stage, dtype):
        table = read_table()
        name = nearest(architecture(torch.device("cuda", 0)), tuple(table))
        buckets = parse_stage(table[name]["stages"], stage)[NAMES[dtype]]
        in_grids, out_grids = [(27, 27), (9, 5)], [(16, 16), (4, 7)]
        # Multiples of 16, which the products ask for, but of no tile.
        inputs = project_inputs(dtype, in_grids, 256 + 16, 512 + 16, 128 + 16)
        gradient = torch.randn(rows_of(out_grids), 128 + 16, device="cuda").to(dtype)
        wanted = [n for n in inputs if n != "x"] if stage == "norm_gradient" else None
        for config in dict.fromkeys(config for _, config in buckets):
            # The pointwise kernels are what the library form of the products ends with.
            library = dict.fromkeys(PRODUCTS) if stage == "pointwise" else {}
            use_config(**{**library, stage: config})
            launched.clear()
            check_on_gpu(*projection(in_grids, out_grids), inputs, gradient, wanted)
            if stage != "pointwise" and config is not None:
                assert any(name.startswith(stage) for name in launched)  # or a pair's


class TestRepeatability:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
    def test_forward_and_backward_repeat_bitwise(self, dtype, save):
        inputs = project_inputs(dtype, IN_GRIDS)
        gradient = torch.randn(rows_of(OUT_GRIDS), TEXT, device="cuda").to(dtype)
        op, _ = projection(IN_GRIDS, OUT_GRIDS, save=save)
        first = run(op, inputs, gradient)
        for _ in range(3):
            again = run(op, inputs, gradient)
            assert all(torch.equal(again[name], first[name]) for name in first)

    def test_works_with_deterministic_algorithms(self):
        # In a process of its own: cuBLAS reads its variable at its first call.
        code = """
import torch
from tokenflex_kernels import project_tokens
from tests.kernels.common import parameters_of
torch.use_deterministic_algorithms(True)
p = parameters_of(96, 160, 64, torch.bfloat16, "cuda")
leaves = [torch.randn(2 * 81, 96, device="cuda").bfloat16(), *p.values()]
for leaf in leaves:
    leaf.requires_grad_()
for save in ("preactivation", "input"):
    out = project_tokens(
        leaves[0], [(9, 9)] * 2, [(4, 4), (5, 3)], **dict(zip(p, leaves[1:])), save=save)
    torch.autograd.grad(out.float().square().sum(), leaves)
torch.cuda.synchronize()
"""
        path = os.pathsep.join([str(Path(__file__).parents[2]), *(p for p in sys.path if p)])
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]


class TestGraphs:
    def test_pool_norm_replays_on_new_numbers(self):
        grids = [(27, 27), (9, 9)], [(8, 8), (4, 5)]
        x = torch.randn(rows_of(grids[0]), WIDTH, device="cuda").bfloat16()
        weight = torch.randn(WIDTH, device="cuda")
        graph, out = capture(lambda: pool_norm(x, *grids, weight=weight))
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(out, pool_norm(x, *grids, weight=weight))

    @pytest.mark.parametrize("save", SAVES)
    def test_project_tokens_replays_forward_and_backward(self, save):
        in_grids, out_grids = [(27, 27)] * 3, [(8, 8), (12, 12), (16, 16)]
        inputs = project_inputs(torch.bfloat16, in_grids)
        gradient = torch.randn(rows_of(out_grids), TEXT, device="cuda").bfloat16()
        op, _ = projection(in_grids, out_grids, save=save)
        graph, results = capture(lambda: run(op, inputs, gradient))
        for _ in range(2):
            inputs["x"].copy_(torch.randn_like(inputs["x"]))
            gradient.copy_(torch.randn_like(gradient))
            graph.replay()
            for name, expected in run(op, inputs, gradient).items():
                assert torch.equal(results[name], expected), name

    def test_inference_replays(self):
        in_grids, out_grids = [(27, 27)], [(16, 16)]
        inputs = project_inputs(torch.bfloat16, in_grids)
        op, _ = projection(in_grids, out_grids)
        with torch.no_grad():
            graph, out = capture(lambda: op(**inputs))
            inputs["x"].copy_(torch.randn_like(inputs["x"]))
            graph.replay()
            assert torch.equal(out, op(**inputs))

    def test_new_grids_inside_a_capture_are_refused_with_the_way_out(self):
        known, new = fresh_grids(), fresh_grids()
        x = torch.randn(max(rows_of(known[0]), rows_of(new[0])), 64, device="cuda")
        pool_norm(x[: rows_of(known[0])], *known)  # compiled and loaded before the capture
        torch.cuda.synchronize()
        with (
            pytest.raises(RuntimeError, match=r"in_grids and out_grids are new.* before the cap"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            pool_norm(x[: rows_of(new[0])], *new)
        torch.cuda.synchronize()
        out = pool_norm(x[: rows_of(new[0])], *new)
        torch.testing.assert_close(out, eager_pool_norm(x[: rows_of(new[0])], *new))

    def test_tables_of_a_capture_outlive_the_cache(self):
        grids = fresh_grids()
        x = torch.randn(rows_of(grids[0]), 64, device="cuda")
        graph, out = capture(lambda: pool_norm(x, *grids))
        for height in range(1, CACHED_TABLES + 8):
            other = plan_pooling([(height, 2)], [(1, 1)])
            pooling_tables(other.grids, "adaptive", x.device)
        junk = [torch.full((4096,), -1, dtype=torch.int32, device="cuda") for _ in range(512)]
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, eager_pool_norm(x, *grids))
        del junk


@pytest.fixture
def no_synchronisation():
    def start():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


class TestStreams:
    @pytest.mark.parametrize("save", SAVES)
    def test_new_grids_run_without_a_synchronisation(self, no_synchronisation, save):
        def call(grids):
            x = torch.randn(rows_of(grids[0]), 64, device="cuda").bfloat16()
            inputs = {"x": x, **parameters}
            gradient = torch.ones((), dtype=x.dtype, device="cuda").expand(rows_of(grids[1]), 40)
            return run(projection(*grids, save=save)[0], inputs, gradient)

        parameters = parameters_of(64, 96, 40, torch.bfloat16, "cuda")
        call(fresh_grids())  # compiles
        no_synchronisation()
        for _ in range(3):
            call(fresh_grids())

    @pytest.mark.parametrize("first_stream_is_busy", [False, True])
    def test_tables_made_on_one_stream_serve_another(self, first_stream_is_busy):
        grids, compiled = fresh_grids(), fresh_grids()
        x = torch.randn(rows_of(grids[0]), 64, device="cuda")
        pool_norm(torch.randn(rows_of(compiled[0]), 64, device="cuda"), *compiled)
        expected = eager_pool_norm(x, *grids)
        torch.cuda.synchronize()
        if first_stream_is_busy:
            torch.cuda._sleep(500_000_000)  # the tables' copy waits behind this
        pool_norm(x, *grids)
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            out = pool_norm(x, *grids)
        other.synchronize()
        torch.testing.assert_close(out, expected)
        torch.cuda.synchronize()

    def test_runs_on_the_current_stream(self):
        x = torch.randn(729, 64, device="cuda")
        grids = [(27, 27)], [(8, 8)]
        expected = eager_pool_norm(x, *grids)
        pool_norm(x, *grids)
        source = torch.zeros_like(x)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            source.copy_(x)
            out = pool_norm(source, *grids)  # on another stream it would read zeros
        stream.synchronize()
        torch.testing.assert_close(out, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    @pytest.mark.parametrize("save", SAVES)
    def test_tensors_of_another_device_than_the_current_one(self, save):
        grids = [(9, 9), (5, 7)], [(4, 4), (2, 3)]
        inputs = project_inputs(torch.bfloat16, grids[0], 64, 96, 40)
        gradient = torch.randn(rows_of(grids[1]), 40, device="cuda").bfloat16()
        op, _ = projection(*grids, save=save)
        expected = run(op, inputs, gradient)
        elsewhere = {name: tensor.to("cuda:1") for name, tensor in inputs.items()}
        assert torch.cuda.current_device() == 0
        for name, result in run(op, elsewhere, gradient.to("cuda:1")).items():
            assert result.device.index == 1
            torch.testing.assert_close(result.cpu(), expected[name].cpu())
        assert torch.cuda.current_device() == 0


@pytest.fixture
def plenty_of_memory():
    torch.cuda.empty_cache()
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("plenty_of_memory")
class TestLargeTensors:
    """R3: offsets beyond 2^31 elements. What the last rows give must be what they give alone."""

    def test_pooling(self):
        images = 2**31 // (729 * WIDTH) + 2
        x = torch.randn(images * 729, WIDTH, device="cuda", dtype=torch.bfloat16)
        assert x.numel() > 2**31
        weight = torch.randn(WIDTH, device="cuda")
        last = x[-2 * 729 :].clone().requires_grad_()
        x.requires_grad_()
        out = pool_norm(x, [(27, 27)] * images, [(16, 16)] * images, weight=weight)
        alone = pool_norm(last, [(27, 27)] * 2, [(16, 16)] * 2, weight=weight)
        torch.testing.assert_close(out[-512:], alone)  # configs may differ, and so the last bit
        gradient = torch.randn(512, WIDTH, device="cuda", dtype=torch.bfloat16)
        (grad,) = torch.autograd.grad(alone, last, gradient)
        (grad_x,) = torch.autograd.grad(out, x, gradient.repeat(images // 2 + 1, 1)[-len(out) :])
        torch.testing.assert_close(grad_x[-2 * 729 :], grad, rtol=0.02, atol=1e-4)

    def test_more_cells_than_int32_offsets(self):
        images = 2**31 // (64 * 64 * 512) + 2
        x = torch.randn(images * 4, 512, device="cuda", dtype=torch.bfloat16)
        out = pool_norm(x, [(2, 2)] * images, [(64, 64)] * images)
        assert out.numel() > 2**31
        assert torch.equal(out[-4096:], pool_norm(x[-4:], [(2, 2)], [(64, 64)]))

    def test_the_gated_unit(self):
        parameters = parameters_of(64, HIDDEN, 1, torch.bfloat16, "cuda")
        weights = {name: parameters[name] for name in GATED}
        tokens = 2**31 // HIDDEN + 300  # gate and up beyond 2^31 each, their gradients beyond 2^32
        inputs = {"x": torch.randn(tokens, 64, device="cuda").bfloat16(), **weights}
        gradient = torch.randn(256, HIDDEN, device="cuda").bfloat16()
        full = torch.zeros(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        full[-256:] = gradient
        results = run(swiglu, inputs, full, ["x"])
        alone = run(swiglu, {**inputs, "x": inputs["x"][-256:]}, gradient, ["x"])
        torch.testing.assert_close(results["out"][-256:], alone["out"])
        torch.testing.assert_close(results["x"][-256:], alone["x"], rtol=0.02, atol=1e-3)
        assert not results["x"][:-256].any()

    def test_pooling_of_rows_far_apart(self):
        x = torch.empty(40, 2**27 // 40 * 40, device="cuda", dtype=torch.bfloat16)[:, :64]
        x.copy_(torch.randn(40, 64, device="cuda"))
        assert x.stride(0) * len(x) > 2**31
        grids = [(5, 8)], [(4, 4)]
        assert torch.equal(pool_norm(x, *grids), pool_norm(x.contiguous(), *grids))


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("save", SAVES)
    def test_inductor_gives_the_whole_projector(self, save):
        names = ("x", *PARAMETERS)

        def call(in_grids, out_grids, *leaves):
            named = dict(zip(names, leaves, strict=True))
            # Something of the compiler's own on both sides of the op.
            named["x"] = named["x"] * 2
            return project_tokens(named.pop("x"), in_grids, out_grids, **named, save=save).sin()

        compiled = torch.compile(call, fullgraph=True, dynamic=True)
        for images in (2, 3, 5):
            grids = [(9, 9)] * images, [(4, 4)] * images
            inputs = project_inputs(torch.bfloat16, grids[0], 64, 96, 40)
            results = []
            for op in (compiled, call):
                leaves = [inputs[name].detach().requires_grad_() for name in names]
                out = op(*grids, *leaves)
                results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
            for name, got, expected in zip(("out", *names), *results, strict=True):
                torch.testing.assert_close(
                    got, expected, rtol=0.05, atol=0.05, msg=lambda m, name=name: f"{name}: {m}"
                )

    def test_inductor_gives_pooling_and_the_gated_unit(self):
        def call(x, weight, gate, up):
            tokens = pool_norm(x + 1, [(9, 9)], [(4, 4)], weight=weight)
            return swiglu(tokens, gate, up).sum()

        x, weight = torch.randn(81, 64, device="cuda"), torch.randn(64, device="cuda")
        gate, up = (torch.randn(96, 64, device="cuda") / 8 for _ in range(2))
        leaves = [tensor.requires_grad_() for tensor in (x, weight, gate, up)]
        compiled = torch.compile(call, fullgraph=True)
        expected = torch.autograd.grad(call(*leaves), leaves)
        for got, wanted in zip(
            torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


class TestRecordedCalls:
    """Calls of a kind that came before, see ``call_records``."""

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("images", [1, 15])
    def test_values_and_gradients_are_the_same_bits(self, images, save):
        in_grids, out_grids = IN_GRIDS[:images], OUT_GRIDS[:images]
        ours, _ = projection(in_grids, out_grids, save=save)
        forget_records()
        for call in range(4):
            inputs = project_inputs(torch.bfloat16, in_grids)
            gradient = torch.randn(rows_of(out_grids), TEXT, device="cuda", dtype=torch.bfloat16)
            results = run(ours, inputs, gradient)
            with unrecorded():
                expected = run(ours, inputs, gradient)
            assert len(call_records._records) == (call > 0)
            assert all(torch.equal(results[name], expected[name]) for name in expected)

    def test_streams_and_captures(self):
        in_grids, out_grids = IN_GRIDS[:1], OUT_GRIDS[:1]
        ours, _ = projection(in_grids, out_grids)
        inputs = project_inputs(torch.bfloat16, in_grids)
        with torch.no_grad():
            expected = [ours(**inputs) for _ in range(4)][-1]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                elsewhere = [ours(**inputs) for _ in range(4)]
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = ours(**inputs)
            inputs["x"].mul_(2)
            graph.replay()
            assert all(torch.equal(result, expected) for result in elsewhere)
            assert torch.equal(captured, ours(**inputs))

    def test_a_profiler_sees_each_kernel(self):
        from triton import knobs

        ours, _ = projection(IN_GRIDS[:1], OUT_GRIDS[:1])
        inputs = project_inputs(torch.bfloat16, IN_GRIDS[:1])
        names = []

        def enter(metadata):
            names.append(metadata.get()["name"])

        with torch.no_grad():
            counts = []
            for _ in range(4):
                del names[:]
                knobs.runtime.launch_enter_hook.add(enter)
                ours(**inputs)
                knobs.runtime.launch_enter_hook.remove(enter)
                counts.append([*names])
        assert counts[1:] == counts[:-1]
        assert counts[0]


class TestCapturedProjection:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_values_are_those_of_the_op(self, dtype):
        project = CapturedProjection()
        in_grids = IN_GRIDS[:1]
        weights = project_inputs(dtype, in_grids)
        weights.pop("x")
        with torch.inference_mode():
            for _ in range(3):
                for out_grids in ([(8, 8)], [(16, 16)]):
                    x = torch.randn(rows_of(in_grids), WIDTH, device="cuda").to(dtype)
                    tokens = project(x, in_grids, out_grids, **weights)
                    assert torch.equal(tokens, project_tokens(x, in_grids, out_grids, **weights))
                weights["up_weight"].mul_(1.5)
            replaced = weights | {"gate_bias": weights["gate_bias"] + 1}
            tokens = project(x, in_grids, out_grids, **replaced)
            assert torch.equal(tokens, project_tokens(x, in_grids, out_grids, **replaced))
        assert len(project) == 3

    def test_a_replay_waits_for_nothing(self):
        project = CapturedProjection()
        inputs = project_inputs(torch.bfloat16, IN_GRIDS[:1])
        with torch.no_grad():
            project(inputs.pop("x"), IN_GRIDS[:1], OUT_GRIDS[:1], **inputs)
            x = torch.randn(rows_of(IN_GRIDS[:1]), WIDTH, device="cuda").bfloat16()
            torch.cuda.set_sync_debug_mode("error")
            try:
                project(x, IN_GRIDS[:1], OUT_GRIDS[:1], **inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_streams_and_evictions(self):
        project = CapturedProjection(max_graphs=1)
        inputs = project_inputs(torch.bfloat16, IN_GRIDS[:1])
        x = inputs.pop("x")
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        with torch.no_grad():
            for turn in range(8):
                out_grids = [(8, 8)] if turn % 3 else [(4, 4)]
                with torch.cuda.stream(streams[turn % 2]):
                    rows = x * turn
                    results.append(
                        (project(rows, IN_GRIDS[:1], out_grids, **inputs), turn, out_grids)
                    )
            torch.cuda.synchronize()
            for tokens, turn, out_grids in results:
                expected = project_tokens(x * turn, IN_GRIDS[:1], out_grids, **inputs)
                assert torch.equal(tokens, expected)
