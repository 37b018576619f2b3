"""The kernels that read both weights through one descriptor, against the formula in float64."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.common import DTYPES, ON_TRITON, check, eager_swiglu, rms, rms_error, run
from tokenflex_kernels import swiglu
from tokenflex_kernels.launch import num_programs, pair_stride
from tokenflex_kernels.launch_configs import INTERPRETER, launch_config
from tokenflex_kernels.swiglu.stages import launch_input_gradient

pytestmark = ON_TRITON

# Tiles of 32 x 32 x 32 by descriptors, shared by two programs where the kernel is interpreted.
PAIR = launch_config("gate_up", 1, torch.float32, INTERPRETER)._replace(tma=True, programs_per_sm=1)
BOTH_KERNELS = ["gate_up_pair", "gate_gradient", "input_gradient_pair"]
POINTERS = ["gate_up", "gate_gradient", "input_gradient"]


def weights_in(arena, offsets, hidden, width, stride=None):
    """Two random weights [H, C] in a flat tensor, gate's and up's at these offsets."""
    stride = stride or width
    weights = [arena.as_strided((hidden, width), (stride, 1), at) for at in offsets]
    for weight in weights:
        weight.copy_(torch.randn(hidden, width) / width**0.5)
    return weights


def inputs_of(
    device, tokens, width, hidden, dtype, gate_at=0, up_at=None, biases=True, stride=None
):
    """Inputs of ``swiglu`` whose weights lie in one arena, up's behind gate's unless told."""
    up_at = hidden * (stride or width) + 8 if up_at is None else up_at
    arena = torch.zeros(
        max(gate_at, up_at) + hidden * (stride or width), device=device, dtype=dtype
    )
    gate, up = weights_in(arena, (gate_at, up_at), hidden, width, stride)
    inputs = {"x": torch.randn(tokens, width).to(arena), "gate_weight": gate, "up_weight": up}
    if biases:
        inputs |= {name: torch.randn(hidden).to(arena) for name in ("gate_bias", "up_bias")}
    return inputs


def check_pair(inputs):
    x, gate = inputs["x"], inputs["gate_weight"]
    check(swiglu, eager_swiglu, inputs, torch.randn(len(x), len(gate)).to(x))


@pytest.mark.first
class TestAgainstFloat64:
    @pytest.mark.parametrize(
        ("gate_at", "up_at", "dtype"),
        [
            (0, 40 * 48, torch.float32),
            (0, 40 * 48 + 8 * 37, torch.bfloat16),
            (40 * 48 + 8 * 5, 0, torch.bfloat16),
            (40 * 48, 0, torch.float16),
        ],
    )
    def test_weights_behind_each_other_in_memory(
        self, device, products, launched, gate_at, up_at, dtype
    ):
        # 40 hidden features are a tile and a part of one: the inner side of the input's gradient
        # steps over from gate's half to up's in the middle of a tile.
        products(PAIR)
        check_pair(inputs_of(device, 70, 48, 40, dtype, gate_at, up_at))
        assert launched == BOTH_KERNELS

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_weights_with_storages_of_their_own(self, device, products, launched, dtype):
        products(PAIR)
        inputs = inputs_of(device, 33, 64, 72, dtype)
        for name in ("gate_weight", "up_weight"):
            inputs[name] = inputs[name].clone()
        check_pair(inputs)
        assert launched == BOTH_KERNELS

    @pytest.mark.parametrize("seed", range(3))
    def test_random_shapes(self, device, products, launched, seed):
        draw = random.Random(seed)
        sizes = {"block_m": draw.choice([16, 32, 64]), "block_n": draw.choice([16, 32])}
        products(PAIR._replace(**sizes, group_m=draw.randint(1, 4)))
        width, hidden = 8 * draw.randint(1, 12), 8 * draw.randint(1, 12)
        first, second = 8 * draw.randint(0, 9), width * hidden + 8 * draw.randint(9, 20)
        order = (first, second) if draw.random() < 0.5 else (second, first)
        inputs = inputs_of(
            *(device, draw.randint(1, 100), width, hidden, draw.choice(DTYPES)),
            *(*order, draw.random() < 0.7),
        )
        check_pair(inputs)
        assert launched == BOTH_KERNELS

    def test_rows_of_a_wider_matrix(self, device, products, launched):
        products(PAIR)
        check_pair(inputs_of(device, 20, 40, 24, torch.float32, stride=56))
        assert launched == BOTH_KERNELS

    @pytest.mark.parametrize("programs_per_sm", [None, 1, 3])
    def test_any_number_of_programs_gives_the_same_bits(self, device, products, programs_per_sm):
        inputs = inputs_of(device, 100, 32, 88, torch.bfloat16)
        gradient = torch.randn(100, 88).to(inputs["x"])
        products(PAIR)
        expected = run(swiglu, inputs, gradient)
        products(PAIR._replace(programs_per_sm=programs_per_sm))
        for name, result in run(swiglu, inputs, gradient).items():
            assert torch.equal(result, expected[name]), name


class TestFallBack:
    """Weights that no descriptor can hold are read by pointers, with tiles of the same size."""

    @pytest.mark.parametrize(
        ("change", "kernels"),
        [
            pytest.param({"up_at": 24 * 40 + 4}, POINTERS, id="8-bytes-off"),
            pytest.param({"gate_at": 4, "up_at": 24 * 40 + 8}, POINTERS, id="base-off"),
            pytest.param({"gate_at": 0, "up_at": 0}, POINTERS, id="one-weight-twice"),
            pytest.param({"stride": 44}, POINTERS, id="stride-off"),
        ],
    )
    def test_weights_that_make_no_pair(self, device, products, launched, change, kernels):
        products(PAIR)
        check_pair(inputs_of(device, 20, 40, 24, torch.bfloat16, **change))
        assert launched == kernels

    def test_weights_of_different_strides(self, device, products, launched):
        products(PAIR)
        inputs = inputs_of(device, 20, 40, 24, torch.float32)
        inputs["up_weight"] = torch.nn.functional.pad(inputs["up_weight"], (0, 8))[:, :40]
        check_pair(inputs)
        assert launched == POINTERS

    @pytest.mark.parametrize(("width", "hidden"), [(40, 21), (20, 24)])
    def test_sides_of_no_16_bytes(self, device, products, launched, width, hidden):
        products(PAIR)
        check_pair(inputs_of(device, 20, width, hidden, torch.bfloat16, up_at=1024))
        # 40 columns suit the weights' descriptor, but 21 hidden features no descriptor of results.
        assert launched == POINTERS

    def test_expanded_rows(self, device, products, launched):
        products(PAIR)
        inputs = inputs_of(device, 1, 40, 24, torch.float32)
        inputs["x"] = inputs["x"].expand(20, 40)
        swiglu(**inputs)
        assert launched == ["gate_up"]


def test_the_stride_of_a_pair_is_the_distance_between_its_matrices(device):
    arena = torch.zeros(512, device=device)
    first, second = arena[:64].view(4, 16), arena[100:164].view(4, 16)
    assert pair_stride(first, second) == 100
    assert pair_stride(second, first) is None
    assert pair_stride(first, first) is None
    assert pair_stride(first, arena[101:165].view(4, 16)) is None
    assert pair_stride(first, arena[100:180].view(5, 16)) is None
    assert pair_stride(first, arena[100:228].view(4, 32)[:, :16]) is None


def test_a_persistent_kernel_has_no_more_programs_than_tiles(device):
    assert num_programs(100, PAIR._replace(programs_per_sm=None), torch.device(device)) == 100
    assert num_programs(1, PAIR, torch.device(device)) == 1
    assert num_programs(10**6, PAIR, torch.device(device)) < 10**6


class TestInputGradient:
    def test_the_librarys_product_is_rounded_once(self, device, products):
        # As two products, the first would be rounded before the second is added: the error of a
        # result near zero would be that of the large parts it is the difference of.
        products(None)
        grads = torch.randn(40, 2 * 48).to(device, torch.bfloat16)
        gate, up = torch.randn(2, 48, 64).to(grads)
        grads[:, 48:], up = -grads[:, :48], gate + 2**-7 * up
        truth = grads.double() @ torch.cat([gate, up]).double()
        result = launch_input_gradient(grads, gate, up)
        rounding = rms_error(truth.to(torch.bfloat16), truth.cpu())
        assert rms_error(result, truth.cpu()) <= 1.2 * rounding + 1e-5 * rms(truth)
