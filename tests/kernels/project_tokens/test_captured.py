"""`CapturedProjection` with a graph that runs the kernels' calls again in Python."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.common import parameters_of
from tokenflex.projector import TokenAdaptiveProjector
from tokenflex_kernels import CapturedProjection, plan_pooling, project_tokens, relaunch
from tokenflex_kernels.project_tokens import captured

IN_GRIDS, OUT_GRIDS = [(4, 4)], [(2, 3)]
WIDTH, HIDDEN, TEXT = 8, 24, 16


class Stream:
    def __init__(self, handle):
        self.cuda_stream = handle
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other.cuda_stream)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of host memory: its captures, its current stream, and whether that is captured."""
    state = SimpleNamespace(captures=0, replays=0, stream=Stream(7), is_capturing=False)

    def capture(run, device):
        run()
        state.captures += 1
        state.caches_casts = torch.is_autocast_cache_enabled()
        result = run().clone()

        class Graph:
            def replay(self):
                state.replays += 1
                # As on a GPU, no mode of PyTorch is looked at.
                with torch.inference_mode(False), torch.no_grad():
                    result.copy_(run())

        result.zero_()  # a capture computes nothing
        return Graph(), result

    monkeypatch.setattr(captured, "capture_graph", capture)
    monkeypatch.setattr(relaunch, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(relaunch, "is_capturing", lambda: state.is_capturing)
    monkeypatch.setattr(relaunch, "current_stream", lambda index: state.stream.cuda_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    return state


def patches(rows=16):
    return torch.randn(rows, WIDTH)


@pytest.fixture
def weights():
    return parameters_of(WIDTH, HIDDEN, TEXT)


def test_calls_with_other_patches_replay_one_graph(gpu, weights):
    project = CapturedProjection()
    with torch.no_grad():
        results = []
        for _ in range(4):
            x = patches()
            results.append((project(x, IN_GRIDS, OUT_GRIDS, **weights), x.clone()))
            x.zero_()
        for tokens, x in results:  # no result is written again
            torch.testing.assert_close(
                tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **weights), rtol=0, atol=0
            )
    assert (gpu.captures, gpu.replays, len(project)) == (1, 4, 1)


def test_weights_changed_in_place_count(gpu, weights):
    project = CapturedProjection()
    x = patches()
    with torch.no_grad():
        project(x, IN_GRIDS, OUT_GRIDS, **weights)
        for value in weights.values():
            value.mul_(2).add_(1)
        tokens = project(x, IN_GRIDS, OUT_GRIDS, **weights)
        assert torch.equal(tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **weights))
    assert gpu.captures == 1


@pytest.mark.parametrize("name", [*parameters_of(1, 1, 1)])
def test_weights_in_the_place_of_others_are_noticed(gpu, weights, name):
    project = CapturedProjection()
    x = patches()
    with torch.no_grad():
        project(x, IN_GRIDS, OUT_GRIDS, **weights)
        others = weights | {name: weights[name] + 1}
        tokens = project(x, IN_GRIDS, OUT_GRIDS, **others)
        assert torch.equal(tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **others))
        if name.endswith("bias"):
            project(x, IN_GRIDS, OUT_GRIDS, **weights | {name: None})
    assert gpu.captures == 2 + name.endswith("bias")


def test_other_kinds_of_calls_have_graphs_of_their_own(gpu, weights):
    project = CapturedProjection()
    double = {name: value.double() for name, value in weights.items()}
    calls = [
        (patches(), IN_GRIDS, OUT_GRIDS, weights),
        (patches(), IN_GRIDS, [(1, 1)], weights),
        (patches(), [(2, 8)], OUT_GRIDS, weights),
        (patches(32), IN_GRIDS * 2, OUT_GRIDS * 2, weights),
        (patches(), IN_GRIDS, OUT_GRIDS, {**weights, "eps": 1e-3}),
        (patches(), IN_GRIDS, OUT_GRIDS, {**weights, "mode": "resize"}),
        (patches().double(), IN_GRIDS, OUT_GRIDS, double),
    ]
    with torch.no_grad():
        for _ in range(2):
            for x, in_grids, out_grids, arguments in calls:
                tokens = project(x, in_grids, out_grids, **arguments)
                expected = project_tokens(x, in_grids, out_grids, **arguments)
                assert torch.equal(tokens, expected)
                assert tokens.dtype == expected.dtype
    assert gpu.captures == len(project) == len(calls)


def test_the_precision_of_float32_products_has_a_graph_of_its_own(gpu, weights, monkeypatch):
    project = CapturedProjection()
    half = {name: value.bfloat16() for name, value in weights.items()}
    with torch.no_grad():
        for precision in ("ieee", "tf32", "ieee"):
            settings = SimpleNamespace(fp32_precision=precision)
            monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
            project(patches(), IN_GRIDS, OUT_GRIDS, **weights)
            project(patches().bfloat16(), IN_GRIDS, OUT_GRIDS, **half)
    assert gpu.captures == 2 + 1


def test_a_backend_has_a_graph_of_its_own(gpu, weights, monkeypatch):
    project = CapturedProjection()
    x = patches()
    with torch.no_grad():
        for backend in ("reference", "native", "reference"):
            monkeypatch.setenv("TOKENFLEX_BACKEND", backend)
            tokens = project(x, IN_GRIDS, OUT_GRIDS, **weights)
            assert torch.equal(tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **weights))
    assert gpu.captures == 2


def test_weights_at_one_address_are_told_apart(gpu, weights):
    """By strides, shape and dtype: a graph of the one would read the other wrongly."""
    memory = torch.randn(TEXT, HIDDEN)
    square = {**weights, "down_weight": torch.randn(HIDDEN, HIDDEN)}
    calls = [
        {**weights, "down_weight": memory},
        {**weights, "down_weight": memory.view(HIDDEN, TEXT).T},
        {**weights, "down_weight": memory[: TEXT // 2], "down_bias": weights["down_bias"][:8]},
        {**weights, "down_bias": weights["down_bias"][:1].expand(TEXT)},
        square,
        {**square, "down_weight": square["down_weight"].T},
    ]
    calls[4]["down_bias"] = calls[5]["down_bias"] = torch.randn(HIDDEN)
    x = patches()
    project = CapturedProjection()
    with torch.no_grad():
        for _ in range(2):
            for arguments in calls:
                tokens = project(x, IN_GRIDS, OUT_GRIDS, **arguments)
                assert torch.equal(tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **arguments))
        assert gpu.captures == len(project) == len(calls)
        half = {name: value.view(-1).half() for name, value in weights.items()}
        others = {
            name: value.view(torch.bfloat16).view(weights[name].shape)
            for name, value in half.items()
        }
        half = {name: value.view(weights[name].shape) for name, value in half.items()}
        project(x.half(), IN_GRIDS, OUT_GRIDS, **half)
        tokens = project(x.bfloat16(), IN_GRIDS, OUT_GRIDS, **others)
        assert tokens.dtype == torch.bfloat16
        assert gpu.captures == len(calls) + 2


def test_autocast_tells_the_dtypes_of_patches_apart(gpu, weights):
    project = CapturedProjection()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16):
            x = patches().to(dtype)
            tokens = project(x, IN_GRIDS, OUT_GRIDS, **weights)
            assert torch.equal(tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **weights))
    assert gpu.captures == 3


@pytest.mark.parametrize("shape", [(1, WIDTH), (15, WIDTH), (16, 1)])
def test_other_patches_than_those_of_a_graph_are_refused(gpu, weights, shape):
    """Also those that a copy to the graph's patches would repeat."""
    project = CapturedProjection()
    with torch.no_grad():
        project(patches(), IN_GRIDS, OUT_GRIDS, **weights)
        with pytest.raises(ValueError, match=r"x must|gate_weight|norm_weight"):
            project(torch.randn(shape), IN_GRIDS, OUT_GRIDS, **weights)
    assert gpu.replays == 1


def test_a_plan_is_the_kind_of_its_grids(gpu, weights):
    project = CapturedProjection()
    plan = plan_pooling(IN_GRIDS, OUT_GRIDS)
    with torch.no_grad():
        project(patches(), plan, **weights)
        project(patches(), IN_GRIDS, OUT_GRIDS, **weights)
    assert gpu.captures == 1


def test_autocast_has_a_graph_of_its_own(gpu, weights):
    project = CapturedProjection()
    x = patches()
    with torch.no_grad():
        project(x, IN_GRIDS, OUT_GRIDS, **weights)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                tokens = project(x, IN_GRIDS, OUT_GRIDS, **weights)
                assert tokens.dtype == torch.bfloat16
                weights["down_weight"].mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = project(x, IN_GRIDS, OUT_GRIDS, **weights)
            assert torch.equal(tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **weights))
    assert gpu.captures == 2
    assert not gpu.caches_casts  # a cast that is kept would not see that its weight changes


def test_rows_with_strides_are_copied(gpu, weights):
    project = CapturedProjection()
    wide = torch.randn(16, 2 * WIDTH)
    with torch.no_grad():
        for _ in range(2):
            for x in (wide[:, :WIDTH], wide[:, WIDTH:], wide[::1, ::2]):
                tokens = project(x, IN_GRIDS, OUT_GRIDS, **weights)
                assert torch.equal(
                    tokens, project_tokens(x.contiguous(), IN_GRIDS, OUT_GRIDS, **weights)
                )
    assert gpu.captures == 1


def test_modes_of_inference_share_a_graph(gpu, weights):
    project = CapturedProjection()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            tokens = project(patches(), IN_GRIDS, OUT_GRIDS, **weights)
            assert tokens.is_inference() == (mode is torch.inference_mode)
    project(patches(), IN_GRIDS, OUT_GRIDS, **weights)  # nothing requires grad
    assert gpu.captures == 1


def test_the_least_recently_used_graph_makes_room(gpu, weights):
    project = CapturedProjection(max_graphs=2)
    with torch.no_grad():
        for cells, captures in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
            project(patches(), IN_GRIDS, [(1, cells)], **weights)
            assert gpu.captures == captures
            assert len(project) <= 2


def test_another_stream_waits_for_the_last_call(gpu, weights):
    project = CapturedProjection()
    first, second = gpu.stream, Stream(8)
    with torch.no_grad():
        for stream in (first, first, second, second, first):
            gpu.stream = stream
            project(patches(), IN_GRIDS, OUT_GRIDS, **weights)
    assert (first.waited_for, second.waited_for) == ([8], [7])
    assert gpu.captures == 1


def test_a_capture_of_the_caller_takes_the_kernels_themselves(gpu, weights):
    gpu.is_capturing = True
    x = patches()
    with torch.no_grad():
        tokens = CapturedProjection()(x, IN_GRIDS, OUT_GRIDS, **weights)
        assert torch.equal(tokens, project_tokens(x, IN_GRIDS, OUT_GRIDS, **weights))
    assert gpu.captures == 0


def test_copies_begin_without_graphs(gpu, weights):
    project = CapturedProjection(max_graphs=3)
    project(patches(), IN_GRIDS, OUT_GRIDS, **weights)
    for other in (copy.deepcopy(project), pickle.loads(pickle.dumps(project))):
        assert (len(other), other.max_graphs) == (0, 3)


class TestProjector:
    @pytest.fixture
    def projector(self):
        return TokenAdaptiveProjector(WIDTH, TEXT, hidden_width=HIDDEN)

    def test_graphs_serve_calls_without_gradients(self, gpu, projector):
        features = torch.randn(2, 16, WIDTH)
        expected = projector(features, 4)
        projector.capture_graphs(max_graphs=2)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(projector(features, 4), expected)
            assert (gpu.captures, gpu.replays) == (1, 3)
            assert torch.equal(projector(features.flip(0), 4), expected.flip(0))
        projector(features, 4).sum().backward()
        assert projector.gate.weight.grad.abs().max() > 0
        assert gpu.replays == 4

    def test_weights_that_are_loaded_count(self, gpu, projector):
        features = torch.randn(1, 16, WIDTH)
        other = TokenAdaptiveProjector(WIDTH, TEXT, hidden_width=HIDDEN)
        projector.capture_graphs()
        with torch.no_grad():
            projector(features, 4)
            projector.load_state_dict(other.state_dict())
            assert torch.equal(projector(features, 4), other(features, 4))
            projector.load_state_dict(
                {name: value * 2 for name, value in other.state_dict().items()}, assign=True
            )
            other.load_state_dict(projector.state_dict())
            assert torch.equal(projector(features, 4), other(features, 4))

    def test_without_a_gpu_calls_run_as_before(self, projector):
        features = torch.randn(1, 16, WIDTH)
        projector.capture_graphs()
        with torch.no_grad():
            tokens = projector(features, 4)
            copied = copy.deepcopy(projector)
            assert torch.equal(copied(features, 4), tokens)
        assert len(projector._graphs) == 0


class TestErrors:
    def test_without_a_gpu(self, weights):
        with pytest.raises(ValueError, match=r"x must be on a CUDA device .* got cpu"):
            CapturedProjection()(patches(), IN_GRIDS, OUT_GRIDS, **weights)

    @pytest.mark.parametrize("name", ["x", "gate_bias"])
    def test_derivatives(self, gpu, weights, name):
        tensors = {"x": patches(), **weights}
        tensors[name].requires_grad_()
        with pytest.raises(ValueError, match=r"must not require grad .*no_grad"):
            CapturedProjection()(tensors.pop("x"), IN_GRIDS, OUT_GRIDS, **tensors)

    @pytest.mark.parametrize("max_graphs", [0, -1, True, 1.5])
    def test_max_graphs(self, max_graphs):
        with pytest.raises((TypeError, ValueError), match="max_graphs"):
            CapturedProjection(max_graphs)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"x": torch.zeros(15, WIDTH)}, "x must have one row per patch"),
            ({"x": torch.zeros(16)}, "x must"),
            ({"x": 5}, "x must"),
            ({"mode": "nearest"}, "mode"),
            ({"mode": ["adaptive"]}, "mode"),
            ({"eps": 0.0}, "eps"),
            ({"down_weight": torch.zeros(3, 3)}, "down_weight"),
            ({"down_weight": None}, "down_weight"),
            ({"out_grids": None}, "out_grids"),
            ({"in_grids": plan_pooling(IN_GRIDS, OUT_GRIDS)}, "out_grids must not be given"),
            ({"in_grids": [(0, 4)]}, "in_grids"),
        ],
    )
    def test_those_of_the_op(self, gpu, weights, changes, match):
        arguments = {"x": patches(), "in_grids": IN_GRIDS, "out_grids": OUT_GRIDS, **weights}
        project = CapturedProjection()
        for _ in range(2):
            with torch.no_grad(), pytest.raises((TypeError, ValueError), match=match):
                project(**arguments | changes)
        assert (len(project), gpu.captures) == (0, 0)
