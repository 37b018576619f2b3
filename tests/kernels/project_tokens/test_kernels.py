"""`project_tokens` by its kernels, forward and backward, against PyTorch's chain in float64."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.kernels.common import (
    DTYPES,
    FEW_IN_GRIDS,
    FEW_OUT_GRIDS,
    IN_GRIDS,
    MODES,
    ON_TRITON,
    OUT_GRIDS,
    PARAMETERS,
    SAVES,
    assert_as_close_as_eager,
    check,
    eager_project,
    parameters_of,
    rows_of,
    run,
    sampled,
    together,
    wide,
    windows_of,
)
from tokenflex_kernels import plan_pooling, project_tokens
from tokenflex_kernels.launch_configs import INTERPRETER, launch_config

pytestmark = ON_TRITON

NAMES = ("x", *PARAMETERS)
BIASES = tuple(name for name in PARAMETERS if name.endswith("bias"))
FUSED = launch_config("gate_up", 1, torch.float32, INTERPRETER)  # tiles of 32 x 32 x 32
CONFIGS = [
    FUSED,
    FUSED._replace(block_m=16, block_n=64, group_m=3),
    FUSED._replace(tma=True),
    None,  # PyTorch's products
]


def ours_and_peer(in_grids=FEW_IN_GRIDS, out_grids=FEW_OUT_GRIDS, **options):
    """`project_tokens` and PyTorch's chain, as functions of the inputs by name."""

    def ours(x, **parameters):
        return project_tokens(x, in_grids, out_grids, **parameters, **options)

    def peer(x, **parameters):
        return eager_project(x, in_grids, out_grids, **parameters, **options)

    return ours, peer


def inputs_of(
    device, width=24, hidden=40, text=20, dtype=torch.float32, missing=(), in_grids=FEW_IN_GRIDS
):
    x = torch.randn(rows_of(in_grids), width).to(device, dtype)
    return {"x": x, **parameters_of(width, hidden, text, dtype, device, missing)}


def gradient_of(device, text=20, dtype=torch.float32, out_grids=FEW_OUT_GRIDS):
    return torch.randn(rows_of(out_grids), text).to(device, dtype)


@pytest.mark.first
class TestAgainstFloat64:
    @pytest.mark.parametrize(("config", "save", "dtype"), sampled(6, CONFIGS[1:], SAVES, DTYPES))
    def test_forward_and_backward(self, device, products, config, dtype, save):
        products(config)
        inputs = inputs_of(device, 32, 96, 48, dtype, in_grids=IN_GRIDS)
        gradient = gradient_of(device, 48, dtype, OUT_GRIDS)
        check(*ours_and_peer(IN_GRIDS, OUT_GRIDS, save=save), inputs, gradient)

    @pytest.mark.parametrize(("config", "save", "mode"), sampled(4, CONFIGS[::3], SAVES, MODES))
    def test_odd_widths(self, device, products, config, mode, save):
        products(config)
        inputs = inputs_of(device, 33, 71, 19)
        check(*ours_and_peer(mode=mode, eps=0.1, save=save), inputs, gradient_of(device, 19))

    @pytest.mark.parametrize(
        ("missing", "config", "save"),
        sampled(10, [*((name,) for name in BIASES), BIASES], CONFIGS[::3], SAVES),
    )
    def test_each_bias_is_optional(self, device, products, config, missing, save):
        products(config)
        inputs = inputs_of(device, missing=missing)
        check(*ours_and_peer(save=save), inputs, gradient_of(device))

    @pytest.mark.parametrize("seed", sampled(3, range(6)))
    def test_random_shapes(self, device, products, seed):
        draw = random.Random(seed)
        products(draw.choice([FUSED, None]))
        grids = [
            [(draw.randint(1, 5), draw.randint(1, 5)) for _ in range(images)]
            for images in [draw.randint(1, 3)] * 2
        ]
        width, hidden, text = (draw.randint(2, 70) for _ in range(3))
        missing = [name for name in BIASES if draw.random() < 0.3]
        ours, peer = ours_and_peer(
            *grids, mode=draw.choice(MODES), save=draw.choice(SAVES), eps=0.1
        )
        draws = [
            inputs_of(device, width, hidden, text, torch.bfloat16, missing, grids[0])
            for _ in range(4)
        ]
        gradients = [gradient_of(device, text, torch.bfloat16, grids[1]) for _ in draws]
        check(ours, peer, draws, gradients)

    @pytest.mark.parametrize(
        ("widths", "kernels"),
        [
            ((16, 48, 32), ["gate_up", "down_gradient", "input_gradient"]),
            ((24, 48, 32), ["gated_product", "down_gradient"]),
            ((16, 40, 32), ["gated_product", "gate_gradient"]),
            ((16, 48, 24), ["gate_up", "gate_gradient", "input_gradient"]),
        ],
    )
    def test_sides_of_no_16_are_left_to_the_library(
        self, device, products, launched, widths, kernels
    ):
        products(FUSED._replace(ragged=False))
        check(*ours_and_peer(), inputs_of(device, *widths), gradient_of(device, widths[2]))
        assert launched == [
            *("pool_norm_forward", kernels[0], "scale_shift", *kernels[1:]),
            *("norm_gradient", "pool_norm_backward"),
        ]

    @pytest.mark.parametrize("name", ["gate_weight", "up_weight", "down_weight"])
    @pytest.mark.parametrize("place", [slice(1, 33), slice(0, 32)])
    def test_addresses_and_strides_of_no_16_are_left_to_the_library(
        self, device, products, launched, name, place
    ):
        products(FUSED._replace(ragged=False))
        inputs = inputs_of(device, 32, 32, 32)
        wider = torch.zeros(32, 48 if place.start else 33, device=device)
        inputs[name] = wider[:, place].copy_(inputs[name])
        check(*ours_and_peer(), inputs, gradient_of(device, 32))
        pointwise = {"down_weight": "gate_gradient"}.get(name, "gated_product")
        assert pointwise in launched

    def test_both_saves_give_the_same_output(self, device, products):
        products(FUSED)
        inputs = inputs_of(device, dtype=torch.bfloat16)
        kept, again = (ours_and_peer(save=save)[0](**inputs) for save in SAVES)
        assert torch.equal(kept, again)


class TestNumerics:
    @pytest.mark.filterwarnings("ignore:invalid value")
    @pytest.mark.parametrize(
        ("widths", "config", "save"),
        sampled(4, [(33, 71, 19), (16, 32, 16)], CONFIGS[::3], SAVES),
    )
    def test_a_bad_patch_or_gradient_spoils_what_shares_its_window(
        self, device, products, widths, config, save
    ):
        """Other values of the same tiles, and lanes beyond rows and columns, are not spoilt."""
        products(config)
        grids, windows = ([(3, 4)] * 2, [(2, 2)] * 2), windows_of((3, 4), (2, 2), "adaptive")
        windows = windows.to(device)
        project, _ = ours_and_peer(*grids, save=save)
        inputs = inputs_of(device, *widths, in_grids=grids[0])
        inputs["x"][5, 2] = torch.nan
        out = run(project, inputs, gradient_of(device, widths[2], out_grids=grids[1]))["out"]
        expected = torch.cat([windows[:, 5], torch.zeros_like(windows[:, 5])])
        assert torch.equal(~out.isfinite(), expected[:, None].expand_as(out))

        inputs = inputs_of(device, *widths, in_grids=grids[0])
        gradient = gradient_of(device, widths[2], out_grids=grids[1])
        gradient[3, 1] = torch.inf
        grad = run(project, inputs, gradient, ["x"])["x"]
        expected = torch.cat([windows[3], torch.zeros_like(windows[3])])
        assert torch.equal(~grad.isfinite(), expected[:, None].expand_as(grad))


class TestDtypes:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_float32_weights_with_narrow_activations(self, device, dtype, save):
        inputs = inputs_of(device, in_grids=IN_GRIDS)
        inputs["x"] = inputs["x"].to(dtype)
        ours, peer = ours_and_peer(IN_GRIDS, OUT_GRIDS, save=save)

        def cast(x, **weights):
            return peer(x, **{name: tensor.to(x.dtype) for name, tensor in weights.items()})

        results = check(ours, cast, inputs, gradient_of(device, dtype=dtype, out_grids=OUT_GRIDS))
        assert results["out"].dtype == results["x"].dtype == dtype
        assert all(results[name].dtype == torch.float32 for name in PARAMETERS)

    @pytest.mark.parametrize(("dtype", "save"), sampled(3, DTYPES, SAVES))
    def test_autocast_gives_the_dtypes_and_values_of_linears(self, device, dtype, save):
        ours, peer = ours_and_peer(save=save)
        draws = []
        for _ in range(4):
            inputs = inputs_of(device, width=96)
            inputs["x"] = inputs["x"].to(dtype)
            gradient = gradient_of(device, dtype=torch.bfloat16)
            with torch.autocast(device, torch.bfloat16):
                got = run(ours, inputs, gradient)
                # PyTorch has no LayerNorm of narrow rows with float32 weights on every device.
                expected = run(peer, {**inputs, "x": inputs["x"].float()}, gradient)
            expected["x"] = expected["x"].to(dtype)
            assert got["out"].dtype == torch.bfloat16
            assert got["x"].dtype == dtype
            draws.append((got, expected, run(peer, wide(inputs), gradient.cpu().double())))
        assert_as_close_as_eager(*map(together, zip(*draws, strict=True)))


LAYOUTS = [
    lambda t: torch.cat([t + 1, t], -1)[..., t.shape[-1] :],  # part of wider rows
    lambda t: t.T.contiguous().T,
    lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t),  # unaligned
]


class TestLayouts:
    @pytest.mark.parametrize(("config", "lay_out"), sampled(8, CONFIGS, LAYOUTS))
    def test_any_memory_layout_gives_the_same(self, device, products, config, lay_out):
        products(config)
        inputs, gradient = inputs_of(device, 32, 64, 32), gradient_of(device, 32)
        op, _ = ours_and_peer()
        expected = run(op, inputs, gradient)
        laid_out = {name: lay_out(t) if t.ndim == 2 else t for name, t in inputs.items()}
        for name, result in run(op, laid_out, lay_out(gradient)).items():
            torch.testing.assert_close(result, expected[name], msg=lambda m, name=name: name + m)

    @pytest.mark.parametrize(("config", "save"), sampled(4, CONFIGS, SAVES))
    def test_expanded_gradient_equals_a_dense_one(self, device, products, config, save):
        products(config)
        inputs = inputs_of(device, 32, 64, 32)
        gradient = torch.randn((), device=device).expand(rows_of(FEW_OUT_GRIDS), 32)
        op, _ = ours_and_peer(save=save)
        expected = run(op, inputs, gradient.contiguous())
        for name, result in run(op, inputs, gradient).items():
            torch.testing.assert_close(result, expected[name], msg=lambda m, name=name: name + m)


GUARDED = """
import ctypes, mmap
import torch
from tests.kernels.common import *
from tokenflex_kernels import project_tokens, swiglu

regions = []

def guarded(tensor):
    # The last byte lies before a page that must not be touched.
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    regions.append(mmap.mmap(-1, size + mmap.PAGESIZE))
    end = ctypes.addressof(ctypes.c_char.from_buffer(regions[-1])) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    at = {"count": tensor.numel(), "offset": size - tensor.nbytes}
    return torch.frombuffer(regions[-1], dtype=tensor.dtype, **at).view(tensor.shape).copy_(tensor)

# Odd, and multiples of 16 but not of the tiles of 32.
for mode, save, widths in zip(MODES, SAVES, [(33, 71, 19), (48, 80, 16)]):
    inputs = {"x": torch.randn(rows_of(FEW_IN_GRIDS), widths[0]), **parameters_of(*widths)}
    inputs = {name: guarded(tensor) for name, tensor in inputs.items()}
    gradient = guarded(torch.randn(rows_of(FEW_OUT_GRIDS), widths[2]))

    def op(x, **parameters):
        return project_tokens(x, FEW_IN_GRIDS, FEW_OUT_GRIDS, **parameters, mode=mode, save=save)

    run(op, inputs, gradient)
    run(op, inputs, gradient, [name for name in inputs if name != "x"])
    gated = {name: inputs[name] for name in ("x", *GATED)}
    run(swiglu, gated, guarded(torch.randn(len(gated["x"]), widths[1])))
"""


def test_nothing_is_read_beyond_inputs_and_gradient(device):
    if device != "cpu":
        pytest.skip("guard pages are of host memory; on a GPU, compute-sanitizer shows the same")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-c", GUARDED],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-2000:]}"


def subsets():
    """Every input alone, every pair of inputs, and all of them."""
    return [*combinations(NAMES, 1), *combinations(NAMES, 2), NAMES]


class TestGradients:
    @pytest.mark.parametrize(("wanted", "save"), sampled(len(subsets()), subsets(), SAVES))
    def test_any_subset_of_inputs(self, device, products, wanted, save):
        # Fused and library products by turns: a seed of its own for each subset would hide order.
        products(FUSED if len("".join(wanted)) % 2 else None)
        inputs = inputs_of(device, 6, 10, 4, in_grids=[(2, 3)])
        ours, peer = ours_and_peer([(2, 3)], [(2, 2)], save=save)
        gradient = gradient_of(device, 4, out_grids=[(2, 2)])
        check(ours, peer, inputs, gradient, list(wanted), ulps=16)

    @pytest.mark.parametrize(
        ("wanted", "save", "backward"),
        [
            (["down_bias"], "preactivation", []),
            (["down_bias"], "input", []),
            (["down_weight"], "preactivation", []),
            (["down_weight"], "input", ["scale_shift", "gate_up"]),
            (["gate_bias"], "preactivation", ["down_gradient"]),
            (["up_weight"], "preactivation", ["scale_shift", "down_gradient"]),
            (["up_weight"], "input", ["scale_shift", "gate_up", "down_gradient"]),
            (
                ["norm_bias"],
                "preactivation",
                ["down_gradient", "input_gradient", "norm_gradient"],
            ),
            (
                ["x"],
                "preactivation",
                ["down_gradient", "input_gradient", "norm_gradient", "unpool"],
            ),
            (
                ["x", "gate_weight"],
                "input",
                [
                    "scale_shift",
                    "gate_up",
                    "down_gradient",
                    "input_gradient",
                    "norm_gradient",
                    "unpool",
                ],
            ),
        ],
    )
    def test_only_what_is_wanted_runs(self, device, stages, wanted, save, backward):
        op, _ = ours_and_peer(save=save)
        run(op, inputs_of(device), gradient_of(device), wanted)
        assert [name for name, _ in stages] == ["pool_norm_forward", "gate_up", *backward]

    @pytest.mark.parametrize(
        ("wanted", "save", "expected"),
        [
            # Whether the forward pass keeps normalised rows, and gate and up.
            ([], "preactivation", (False, False)),
            (["down_bias"], "preactivation", (False, False)),
            (["down_bias"], "input", (False, False)),
            (["down_weight"], "preactivation", (False, False)),
            (["down_weight"], "input", (True, False)),
            (["x"], "preactivation", (True, True)),
            (["x"], "input", (True, False)),
        ],
    )
    def test_forward_keeps_no_more_than_backward_reads(
        self, device, stages, wanted, save, expected
    ):
        inputs = inputs_of(device)
        for name in wanted:
            inputs[name].requires_grad_()
        ours_and_peer(save=save)[0](**inputs)
        assert tuple(options["save"] for _, options in stages) == expected

    @pytest.mark.parametrize(
        ("wanted", "product", "bias"),
        [
            (["gate_weight"], False, False),
            (["down_weight", "x"], True, False),
            (["gate_bias"], False, True),
            (["up_bias", "down_weight"], True, True),
        ],
    )
    def test_the_epilogue_computes_what_is_wanted(self, device, stages, wanted, product, bias):
        run(ours_and_peer()[0], inputs_of(device), gradient_of(device), wanted)
        options = dict(stages)["down_gradient"]
        assert (options["product"], options["bias"]) == (product, bias)

    @pytest.mark.parametrize(("config", "save"), sampled(4, CONFIGS, SAVES))
    def test_nothing_is_written_in_place_and_retain_graph_gives_the_same_again(
        self, device, products, config, save
    ):
        products(config)
        inputs = {name: t.requires_grad_() for name, t in inputs_of(device, 32, 64, 32).items()}
        leaves, gradient = list(inputs.values()), gradient_of(device, 32)
        saved: list[tuple[torch.Tensor, torch.Tensor]] = []

        def pack(tensor):
            saved.append((tensor, tensor.detach().clone()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = ours_and_peer(save=save)[0](**inputs)
        before = [(tensor, tensor.detach().clone()) for tensor in (*leaves, gradient, out)]
        first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        second = torch.autograd.grad(out, leaves, gradient)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert len(saved) >= 7
        for tensor, copy in before + saved:
            assert torch.equal(tensor, copy)

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, device, save, use_reentrant):
        inputs, gradient = inputs_of(device), gradient_of(device)
        op, _ = ours_and_peer(save=save)

        def gradients(through):
            leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
            through(leaves).backward(gradient)
            return [leaf.grad for leaf in leaves.values()]

        def checkpointed(leaves):
            def call(*values):
                return op(**dict(zip(leaves, values, strict=True)))

            return checkpoint(call, *leaves.values(), use_reentrant=use_reentrant)

        plain, again = gradients(lambda leaves: op(**leaves)), gradients(checkpointed)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    @pytest.mark.parametrize("save", SAVES)
    def test_output_used_twice(self, device, save):
        def twice(op):
            def used(**inputs):
                out = op(**inputs)
                return out.sin() + out * out

            return used

        check(*map(twice, ours_and_peer(save=save)), inputs_of(device), gradient_of(device))

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_forward_and_backward_repeat_bitwise(self, device, dtype, save):
        inputs, gradient = inputs_of(device, dtype=dtype), gradient_of(device, dtype=dtype)
        op, _ = ours_and_peer(save=save)
        first, second = (run(op, inputs, gradient) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_second_derivatives_are_refused(self, device):
        inputs = inputs_of(device)
        inputs["x"].requires_grad_()
        loss = ours_and_peer()[0](**inputs).square().sum()
        (gradient,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


class TestWhatTrainingKeeps:
    """KERNELS.md: at most 0.55 (preactivation) and 0.15 (input) of what eager keeps."""

    WIDTH, HIDDEN, TEXT = 32, 96, 56  # the proportions of 1152, 3456 and 2048
    GRIDS = [(6, 6)] * 2, [(4, 4)] * 2

    def kept(self, device, op, dtype):
        """Bytes of the distinct storages that are kept for backward, inputs aside."""
        inputs = inputs_of(
            device, self.WIDTH, self.HIDDEN, self.TEXT, dtype, in_grids=self.GRIDS[0]
        )
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        ours = {tensor.untyped_storage().data_ptr() for tensor in leaves.values()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ours:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = op(**leaves)
        assert out.requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    @pytest.mark.parametrize(
        ("bound", "dtype", "config"),
        sampled(
            4,
            [("preactivation", 0.55), ("input", 0.15)],
            [torch.bfloat16, torch.float16],
            CONFIGS[::3],
        ),
    )
    def test_share_of_eager(self, device, products, config, dtype, bound):
        save, share = bound
        products(config)
        ours, peer = ours_and_peer(*self.GRIDS, save=save)
        assert 0 < self.kept(device, ours, dtype) <= share * self.kept(device, peer, dtype)

    @pytest.mark.parametrize("save", SAVES)
    def test_to_the_byte(self, device, save):
        tokens = rows_of(self.GRIDS[1])
        hidden = 2 * self.HIDDEN if save == "preactivation" else 0
        expected = tokens * (2 * (self.WIDTH + hidden) + 4)  # bfloat16, and a float32 a token
        on_host = plan_pooling(*self.GRIDS).grids.nbytes
        ours, _ = ours_and_peer(*self.GRIDS, save=save)
        assert self.kept(device, ours, torch.bfloat16) == expected + on_host


class TestEmpty:
    @pytest.mark.parametrize("save", SAVES)
    def test_no_hidden_features_leave_the_bias(self, device, save):
        inputs = inputs_of(device, hidden=0)
        gradient = gradient_of(device)
        results = run(ours_and_peer(save=save)[0], inputs, gradient)
        assert torch.equal(results["out"], inputs["down_bias"].expand_as(results["out"]))
        assert torch.equal(results["x"], torch.zeros_like(inputs["x"]))
        assert results["gate_weight"].shape == inputs["gate_weight"].shape

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("wanted", [NAMES, ("x",), ("down_weight",), ("gate_weight",)])
    def test_no_images_launch_nothing(self, device, launched, save, wanted):
        inputs = inputs_of(device, in_grids=[])
        op, _ = ours_and_peer([], [], save=save)
        results = run(op, inputs, torch.empty(0, 20, device=device), wanted)
        assert launched == []
        assert results["out"].shape == (0, 20)
        for name in wanted:
            assert torch.equal(results[name], torch.zeros_like(inputs[name]))
