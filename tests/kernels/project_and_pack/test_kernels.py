"""`project_and_pack` by the Triton kernels: the down projection into the packed buffer."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.common import (
    DTYPES,
    ON_TRITON,
    PARAMETERS,
    SAVES,
    assert_as_close_as_eager,
    check,
    run,
    together,
)
from tests.kernels.project_and_pack.batches import (
    BATCHES,
    WITHOUT_IMAGES,
    gradient_of,
    inputs_of,
    ours,
    peer,
    random_batch,
)
from tokenflex_kernels.backend import extension
from tokenflex_kernels.launch import launch, product_options
from tokenflex_kernels.launch_configs import INTERPRETER, launch_config
from tokenflex_kernels.project_and_pack.stages import launch_packed_down, packed_down

# The text rows are the extension's, of its CUDA build on a GPU.
pytestmark = [ON_TRITON, pytest.mark.skipif(extension() is None, reason="needs the extension")]

FUSED = launch_config("packed_down", 1, torch.float32, INTERPRETER)  # tiles of 32 x 32 x 32
CONFIGS = [
    pytest.param(FUSED, id="fused"),
    pytest.param(FUSED._replace(block_m=16, block_n=64, group_m=3), id="wide-tiles"),
    pytest.param(FUSED._replace(tma=True), id="tma"),
    pytest.param(None, id="library"),
]


@pytest.mark.first
class TestAgainstFloat64:
    @pytest.mark.parametrize(("save", "config"), [(SAVES[0], FUSED), (SAVES[1], None)])
    def test_forward_and_backward(self, device, products, config, save):
        products(config)
        batch = BATCHES["interleaved"]
        inputs = inputs_of(batch, 24, 40, 36, device=device)
        gradient = gradient_of(batch, 36, device=device)
        check(ours(batch, save=save), peer(batch), inputs, gradient)

    @pytest.mark.parametrize("name", BATCHES)
    def test_every_row_of_a_batch_is_written(self, device, products, name):
        products(FUSED)
        batch = BATCHES[name]
        check(
            ours(batch),
            peer(batch),
            inputs_of(batch, device=device),
            gradient_of(batch, device=device),
        )


class TestStage:
    """The stage by itself: [T, 40] x [72, 40] -> T of the rows of [total, 72]."""

    @staticmethod
    def arguments(name, device, dtype=torch.float32):
        batch = (BATCHES | WITHOUT_IMAGES)[name]
        plan, tokens = batch.plan.to(device), batch.tokens
        shapes = (tokens, 40), (72, 40), (72,), (11, 72)
        tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
        return [*tensors, plan.source, plan.vision_rows, -1]

    @staticmethod
    def expected(product, weight, bias, embedding, source, vision_rows, _):
        text = F.embedding(source.clamp(min=0), embedding)
        return text.index_copy(0, vision_rows.long(), F.linear(product, weight, bias))

    @pytest.mark.first
    @pytest.mark.parametrize("config", CONFIGS[:3])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_random_shapes_are_as_close_to_float64_as_pytorch(
        self, device, products, launched, config, dtype
    ):
        products(config)
        draw = random.Random(str(dtype))
        for _ in range(3):
            batch = random_batch(draw)
            maps = batch.plan.source.to(device), batch.plan.vision_rows.to(device)
            hidden, width = draw.randint(1, 70), draw.randint(1, 70)
            bias = (width,) if draw.random() < 0.7 else None
            results = []
            for _ in range(4):
                shapes = (batch.tokens, hidden), (width, hidden), bias, (11, width)
                tensors = [
                    None if shape is None else torch.randn(shape).to(device, dtype)
                    for shape in shapes
                ]
                precise = [None if t is None else t.cpu().double() for t in tensors]
                truth = self.expected(*precise, *(rows.cpu() for rows in maps), -1)
                out = launch_packed_down(*tensors, *maps, -1)
                results.append(
                    ({"out": out}, {"out": self.expected(*tensors, *maps, -1)}, {"out": truth})
                )
            assert_as_close_as_eager(*map(together, zip(*results, strict=True)))
        assert set(launched) == {"packed_down"}

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize(
        "lay_out",
        [
            pytest.param(lambda t: torch.cat([t + 1, t], -1)[..., t.shape[-1] :], id="part"),
            pytest.param(lambda t: t.T.contiguous().T, id="transposed"),
            pytest.param(lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t), id="unaligned"),
            pytest.param(lambda t: t[:1].expand_as(t), id="expanded"),
        ],
    )
    def test_any_memory_layout(self, device, products, config, lay_out):
        products(config)
        arguments = self.arguments("interleaved", device)
        for at in (0, 1, 3):
            arguments[at] = lay_out(arguments[at])
        expected = self.expected(*arguments)
        torch.testing.assert_close(launch_packed_down(*arguments), expected)

    def test_a_bad_token_spoils_its_row_alone(self, device, products):
        products(FUSED)
        arguments = self.arguments("interleaved", device)
        arguments[0][5, 2] = torch.nan
        row = int(arguments[5][5])
        bad = ~launch_packed_down(*arguments).isfinite()
        assert bool(bad[row].all())
        assert int(bad.sum()) == 72

    @pytest.mark.parametrize(
        ("config", "kernels"),
        [(FUSED, ["packed_down"]), (FUSED._replace(ragged=False), []), (None, [])],
    )
    def test_sides_of_no_16_and_small_tables_are_the_librarys(
        self, device, products, launched, config, kernels
    ):
        products(config)
        launch_packed_down(*self.arguments("one image", device))
        assert launched == kernels

    def test_rows_that_follow_one_another_are_the_librarys(self, device, products, launched):
        products(FUSED)
        *arguments, _ = self.arguments("one image", device)
        start = BATCHES["one image"].plan.vision_start
        assert start == 1
        expected = self.expected(*arguments, start)
        torch.testing.assert_close(launch_packed_down(*arguments, start), expected)
        assert launched == []

    def test_rows_beyond_2_to_the_31_elements(self, device):
        from tokenflex_kernels.project_and_pack.kernels import packed_down_kernel

        row, width = 2**15 + 1, 2**16  # only the pages that are written take memory
        packed = torch.empty(row + 1, width, dtype=torch.float16, device=device)
        product, weight = (torch.randn(1, 16).to(packed) for _ in range(2))
        row_map = torch.tensor([row], dtype=torch.int32, device=device)
        options = {"WHOLE_K": False, "TMA": False, **product_options(FUSED, packed.dtype)}
        sizes = 1, width, 16, 16, 0  # every column has the one weight
        launch(
            packed_down_kernel, 1, packed, *(product, weight, None, row_map, packed), *sizes,
            BIAS=False, **options
        )  # fmt: skip
        torch.testing.assert_close(packed[row, :32], (product @ weight.T)[0].expand(32))

    def test_text_alone_launches_nothing(self, device, launched):
        for name in WITHOUT_IMAGES:
            arguments = self.arguments(name, device)
            assert torch.equal(launch_packed_down(*arguments), self.expected(*arguments))
        assert launched == []

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_repeats_bitwise(self, device, products, dtype):
        products(FUSED)
        arguments = self.arguments("neighbours", device, dtype)
        first, second = launch_packed_down(*arguments), launch_packed_down(*arguments)
        assert torch.equal(first, second)

    def test_opcheck(self, device, products):
        products(FUSED)
        torch.library.opcheck(packed_down.overload, self.arguments("interleaved", device))


class TestGradients:
    @pytest.mark.parametrize(
        ("wanted", "backward"),
        [
            (["embedding"], []),
            (["down_bias"], []),
            (["down_weight", "embedding"], []),
            (["gate_bias"], ["down_gradient"]),
            (["x"], ["down_gradient", "input_gradient", "norm_gradient", "unpool"]),
        ],
    )
    def test_only_what_is_wanted_runs(self, device, stages, wanted, backward):
        batch = BATCHES["interleaved"]
        run(ours(batch), inputs_of(batch, device=device), gradient_of(batch, device=device), wanted)
        forward = ["pool_norm_forward", "gate_up", "packed_down"]
        assert [name for name, _ in stages] == [*forward, *backward]

    @pytest.mark.parametrize("save", SAVES)
    def test_backward_runs_again_and_writes_into_nothing(self, device, products, save):
        products(FUSED)
        batch = BATCHES["interleaved"]
        inputs = {n: t.requires_grad_() for n, t in inputs_of(batch, device=device).items()}
        leaves, gradient = list(inputs.values()), gradient_of(batch, device=device)
        out = ours(batch, save=save)(**inputs)
        before = [(t, t.detach().clone()) for t in (*leaves, gradient, out)]
        first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        second = torch.autograd.grad(out, leaves, gradient)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(tensor, copy) for tensor, copy in before)

    @pytest.mark.parametrize("save", SAVES)
    def test_without_images_the_weights_get_zeros(self, device, launched, save):
        batch = WITHOUT_IMAGES["text alone"]
        inputs, gradient = inputs_of(batch, device=device), gradient_of(batch, device=device)
        results = run(ours(batch, save=save), inputs, gradient)
        assert launched == []
        for name in ("x", *PARAMETERS):
            assert torch.equal(results[name], torch.zeros_like(inputs[name])), name
