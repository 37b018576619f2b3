"""Calls of ops: which pass the dispatcher by, and which are the registered op's."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflex_kernels import plan_packing, unpack_vision
from tokenflex_kernels.library import Op
from tokenflex_kernels.packing import ops

PLAN = plan_packing([[1, -200, 3]], [2], -200)
MAPS = PLAN.source, PLAN.vision_rows


class Subclass(torch.Tensor):
    pass


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernel_calls():
    """Return a call of an op, and the tensors of each call that reached its kernel directly."""
    reached = []
    kernel = ops.unpack_vision._kernel

    def record(packed, *maps):
        reached.append(packed)
        return kernel(packed, *maps)

    op = Op(ops.unpack_vision.overload, record)
    return lambda packed: op(packed, *MAPS), reached


def packed():
    return torch.randn(4, 3)


@pytest.mark.parametrize(
    "context",
    [
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        torch.autograd.detect_anomaly,
        lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
    ],
)
def test_plain_calls_run_the_kernel_at_once(kernel_calls, context):
    call, reached = kernel_calls
    with context():
        rows = packed()
        assert torch.equal(call(rows), rows[1:3])
    assert len(reached) == 1
    with torch.no_grad():
        call(torch.nn.Parameter(packed()))
    assert len(reached) == 2


def test_a_call_that_is_recorded_is_the_function_s(kernel_calls):
    call, reached = kernel_calls
    rows = torch.nn.Parameter(packed())
    for unpack, function in ((call, "RowMove"), (ops.unpack_vision, "RowsMoved")):
        out = unpack(rows) if unpack is call else unpack(rows, *MAPS)
        assert out.grad_fn.name() == f"{function}Backward"
        (gradient,) = torch.autograd.grad(out.sum(), rows)
        assert gradient[:, 0].tolist() == [0, 1, 1, 0]
    assert reached == []


def within(context):
    def run(call):
        with context():
            call(packed())

    return run


def with_tensor(make):
    return lambda call: call(make(packed()))


def in_dual_level(call):
    with forward_ad.dual_level():
        out = call(forward_ad.make_dual(packed(), rows := packed()))
        assert torch.equal(forward_ad.unpack_dual(out).tangent, rows[1:3])


def after_a_transform(call):
    left = []
    torch.func.grad(lambda rows: (left.append(rows), rows.sum())[1])(packed())
    with torch.no_grad():
        call(left[0])


def on_negative_bits(call):
    rows = packed()
    assert torch.equal(call(torch._neg_view(rows)), -rows[1:3])


@pytest.mark.parametrize(
    "situation",
    [
        within(DispatchMode),
        within(FunctionMode),
        within(lambda: torch.device("cpu")),
        within(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
        within(lambda: profile(activities=[ProfilerActivity.CPU])),
        with_tensor(lambda rows: rows.as_subclass(Subclass)),
        with_tensor(FakeTensorMode(allow_non_fake_inputs=True).from_tensor),
        lambda call: torch.vmap(call)(torch.randn(2, 4, 3)),
        lambda call: torch.func.grad(lambda rows: call(rows).sum())(packed()),
        lambda call: torch.func.jvp(call, (packed(),), (packed(),)),
        in_dual_level,
        after_a_transform,
        on_negative_bits,
        lambda call: torch.jit.trace(call, (packed(),), check_trace=False),
        lambda call: make_fx(call)(packed()),
        lambda call: torch.compile(call, backend="eager", fullgraph=True)(packed()),
    ],
)
def test_everything_else_is_the_registered_op_s(kernel_calls, situation, monkeypatch):
    call, reached = kernel_calls
    situation(call)
    assert reached == []
    situation(lambda rows: ops.unpack_vision(rows, *MAPS))  # by its own short way, if by any
    eager, moved = ops.pack_eagerly, []

    def pack_eagerly(*arguments):
        moved.append(eager(*arguments))
        return moved[-1]

    monkeypatch.setattr(ops, "pack_eagerly", pack_eagerly)
    situation(lambda rows: unpack_vision(rows, PLAN))
    assert all(rows is None for rows in moved)


def test_a_trace_and_a_profile_show_the_op(kernel_calls):
    call, _ = kernel_calls
    assert "tokenflex::unpack_vision" in str(torch.jit.trace(call, (packed(),)).graph)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call(packed())
    assert "tokenflex::unpack_vision" in {event.key for event in profiled.key_averages()}


def test_gradients_may_come_in_a_batch():
    rows = packed().requires_grad_()
    gradients = torch.randn(3, 2, 3)
    out = ops.unpack_vision(rows, *MAPS)
    (batched,) = torch.autograd.grad(out, rows, gradients, is_grads_batched=True)
    assert torch.equal(batched[:, 1:3], gradients)
    assert not batched[:, [0, 3]].any()
