"""Launching without Triton's binder: the same binary for the same arguments, by the same rules."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.stubbed_gpu import STREAM, stubbed_gpu
from tests.kernels.conftest import INTERPRETED
from tokenflex_kernels import launch, relaunch
from tokenflex_kernels.relaunch import binary_key

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs Triton's binder, not its interpreter")

MEMORY = torch.zeros(4096, dtype=torch.int8)
INTS = [
    *(0, 1, 2, 8, 15, 16, 17, 32, 1152, 1153, -1, -16),
    *(2**31 - 1, 2**31, 2**31 - 16, -(2**31), -(2**31) - 1, -(2**31) - 16),
    *(2**63 - 1, 2**63 - 16, -(2**63), 2**63, 2**63 + 1, 2**64 - 1, 2**64 - 16),
]


def tensor_at(offset, dtype):
    """A tensor of ``dtype`` whose address is ``offset`` elements behind a multiple of 64."""
    start = -MEMORY.data_ptr() % 64
    return MEMORY[start : start + 2048].view(dtype)[offset:]


TENSORS = [
    tensor_at(offset, dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64)
    for offset in (0, 1, 2, 4, 8, 16)
]
MATRIX = tensor_at(0, torch.bfloat16)[:1024].view(16, 64)
DESCRIPTORS = [
    TensorDescriptor(base, list(base.shape), list(base.stride()), block)
    for base in (MATRIX, MATRIX[:, :32], tensor_at(0, torch.float32)[:512].view(16, 32))
    for block in ([16, 16], [16, 32], [32, 16])
]
PARAMETER = torch.nn.Parameter(torch.zeros(64))
ARGUMENTS = [*INTS, *TENSORS, *DESCRIPTORS, None, PARAMETER]


@triton.jit(do_not_specialize=["b"], do_not_specialize_on_alignment=["c"])
def kernel(a, b, c, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    pass


@triton.jit
def annotated_kernel(a: tl.int64, BLOCK: tl.constexpr):
    pass


@triton.jit
def kernel_with_default(a, b=1, BLOCK: tl.constexpr = 2):
    pass


@pytest.fixture
def launched():
    """The launches on a stubbed GPU, as its launcher got them."""
    launches = []
    with stubbed_gpu(launches.append):
        yield launches


def binders_key(binder, args, options):
    """The specialisation by which Triton chooses a binary."""
    _, specialisation, options = binder(*args, **options)
    return str(specialisation), str(options)


class TestKeys:
    OPTIONS = {"BLOCK": 16, "FLAG": True, "num_warps": 4}

    def assert_equivalent(self, calls):
        """Two calls have the same key here if and only if Triton takes the same binary for both."""
        binder = kernel.create_binder()[-1]
        pairs = {
            (binary_key(kernel, 0, args, options), binders_key(binder, args, options))
            for args, options in calls
        }
        assert None not in {ours for ours, _ in pairs}
        assert (
            len(pairs) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs})
        )

    @pytest.mark.parametrize("place", range(3))
    def test_every_argument_in_every_place(self, launched, place):
        def args(value):
            return tuple(value if at == place else 5 for at in range(3))

        self.assert_equivalent([(args(value), self.OPTIONS) for value in ARGUMENTS])

    def test_random_arguments_together(self, launched):
        draw = random.Random(0)
        calls = [(tuple(draw.choices(ARGUMENTS, k=3)), self.OPTIONS) for _ in range(3000)]
        self.assert_equivalent(calls)

    def test_constants_and_options(self, launched):
        blocks, flags, warps = (1, 2, 16, True, 1.0), (True, False, 1, 0, None), (4, 8)
        calls = [
            ((5, 5, 5), {"BLOCK": block, "FLAG": flag, "num_warps": count})
            for block, flag, count in product(blocks, flags, warps)
        ]
        self.assert_equivalent(calls)

    def test_devices_have_binaries_of_their_own(self, launched):
        keys = {binary_key(kernel, device, (5, 5, 5), self.OPTIONS) for device in range(3)}
        assert len(keys) == 3

    @pytest.mark.parametrize("value", [True, 1.5, "text", (1, 2), torch.zeros(2).numpy()])
    def test_other_arguments_are_left_to_triton(self, launched, value):
        assert binary_key(kernel, 0, (value, 5, 5), self.OPTIONS) is None

    def test_a_subclass_of_tensors_is_left_to_triton(self, launched):
        class Subclass(torch.Tensor):
            pass

        rows = torch.zeros(4).as_subclass(Subclass)
        assert binary_key(kernel, 0, (rows, 5, 5), self.OPTIONS) is None

    @pytest.mark.parametrize("other", [annotated_kernel, kernel_with_default, object()])
    def test_other_kernels_are_left_to_triton(self, launched, other):
        assert binary_key(other, 0, (5,), {"BLOCK": 16}) is None

    def test_another_number_of_arguments_is_left_to_triton(self, launched):
        assert binary_key(kernel, 0, (5, 5), self.OPTIONS) is None


ROWS = torch.zeros(64)


def launch_kernel(*args, programs=3, block=16, flag=True):
    launch.launch(kernel, programs, ROWS, *args, BLOCK=block, FLAG=flag, num_warps=4)


@pytest.fixture
def bound(monkeypatch):
    """The arguments of the calls that pass Triton's binder."""
    calls = []
    run = type(kernel).run

    def count(self, *args, **options):
        calls.append(args)
        return run(self, *args, **options)

    monkeypatch.setattr(type(kernel), "run", count)
    return calls


class TestLaunches:
    def test_the_binder_is_passed_once(self, launched, bound):
        for rows in (ROWS, torch.zeros(64), torch.ones(8)):
            launch_kernel(rows, 32, 7)
        assert len(bound) == 1
        assert [one.programs for one in launched] == [3] * 3
        assert {one.function for one in launched} == {1}
        assert {one.stream for one in launched} == {STREAM}
        # Launchers take the constants too.
        assert [one.args[1:] for one in launched] == [(32, 7, 16, True)] * 3
        assert launched[2].args[0] is not ROWS

    def test_each_specialisation_has_its_binary(self, launched):
        values = [5, 1, 16, ROWS, tensor_at(1, torch.float32), None]
        for value in values * 2:
            launch_kernel(value, 5, 5)
        functions = [one.function for one in launched]
        assert functions == [*range(1, 7)] * 2

    def test_hooks_around_launches_are_called(self, launched):
        seen = []
        launch_kernel(ROWS, 5, 5)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        hooks = [lambda metadata: seen.append(("enter", metadata.get()["name"])),
                 lambda metadata: seen.append(("leave", metadata.get()["name"]))]  # fmt: skip
        enter.add(hooks[0])
        leave.add(hooks[1])
        try:
            launch_kernel(ROWS, 5, 5)
        finally:
            enter.remove(hooks[0])
            leave.remove(hooks[1])
        launch_kernel(ROWS, 5, 5)
        assert seen == [("enter", "kernel"), ("leave", "kernel")]
        assert len(launched) == 3

    @pytest.mark.parametrize(
        ("settings", "name", "value"),
        [
            (knobs.runtime, "debug", True),
            (knobs.compilation, "instrumentation_mode", "mode"),
            (kernel, "pre_run_hooks", [lambda *args, **options: None]),
        ],
    )
    def test_debugging_and_hooks_before_launches_pass_the_binder(
        self, launched, bound, monkeypatch, settings, name, value
    ):
        launch_kernel(ROWS, 5, 5)
        monkeypatch.setattr(settings, name, value)
        launch_kernel(ROWS, 5, 5)
        assert len(bound) == 2

    def test_a_triton_without_these_parts_launches_by_itself(self, launched, bound, monkeypatch):
        monkeypatch.setattr(relaunch, "_knobs", lambda: None)
        monkeypatch.setattr(relaunch, "_parameters", relaunch._parameters.__wrapped__)
        for _ in range(3):
            launch_kernel(ROWS, 5, 5)
        assert len(bound) == 3
        assert len(launched) == 3

    def test_this_triton_has_all_parts(self):
        assert relaunch._knobs() is not None
