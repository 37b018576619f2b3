"""Every variant of every op computes the same; packages through stand-ins."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import packing, peers, plain, pool_norm, project_tokens, swiglu
from benchmarks.cases import MODES, TRAINING, Variant
from benchmarks.packing import FORWARD, FROZEN_TABLE, SPARSE_TABLE, TRAINED_TABLE
from benchmarks.peers import SPARSE_GRADIENT, load_peers
from benchmarks.plain import mixed, number_of_tokens, square, uniform
from benchmarks.prompts import Prompts
from benchmarks.results import COMPILED, EAGER
from tests.benchmarks.small import rows_of, run_of, square_case

WIDTHS = (8, 32, 8)
SMALL = Prompts(samples=3, text=5, width=8, vocabulary=20)
GRIDS = [[(8, 8)], [(3, 2), (5, 5), (3, 2)]]


def assert_all_ok(rows):
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    assert rows


# ---- stand-ins


class SiluMul(torch.autograd.Function):
    """As Liger's own, backward writes its gradients into what forward saved."""

    @staticmethod
    def forward(ctx, gate, up, gate_multiplier, down_multiplier):
        assert (gate_multiplier, down_multiplier) == (1.0, 1.0)
        ctx.saved = gate.clone(), up.clone()
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [saved.detach().requires_grad_() for saved in ctx.saved]
            product = F.silu(leaves[0].clone()) * leaves[1].clone()
        gradients = torch.autograd.grad(product, leaves, grad)
        for saved, gradient in zip(ctx.saved, gradients, strict=True):
            saved.copy_(gradient)
        return *ctx.saved, None, None


class LayerNorm:
    @staticmethod
    def apply(x, weight, bias, eps):
        return F.layer_norm(x, weight.shape, weight, bias, eps)


def linear_gated_func(x, weight, activation, bias, store_preact, tuned, concat_layout=False):
    assert (activation, tuned) == ("swiglu", False)
    before = F.linear(x, weight, bias)
    gate, up = before.chunk(2, 1) if concat_layout else (before[:, ::2], before[:, 1::2])
    return None, F.silu(gate) * up


def mlp_func(x, weight1, weight2, activation, bias1, bias2, tuned, concat_layout=False):
    _, product = linear_gated_func(x, weight1, activation, bias1, True, tuned, concat_layout)
    return F.linear(product, weight2, bias2)


def flash_swiglu(x, gate, up, down):
    assert x.ndim == 3
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def fused_swiglu(x, weight):
    gate, up = F.linear(x, weight).chunk(2, 1)
    return F.silu(gate) * up


def gemm_swiglu_wrapper_sm100(x, weight, ab12_dtype, c_dtype):
    assert x.shape[2] == weight.shape[2] == 1
    assert ab12_dtype == c_dtype == x.dtype
    up, gate = (x[..., 0] @ weight[..., 0].T).unflatten(1, (-1, 2, 32)).unbind(2)
    return {"c_tensor": (up * F.silu(gate)).flatten(1)[..., None]}


def unpad_input(hidden_states, attention_mask):
    return hidden_states[attention_mask], None, None, None, None


MODULES = {
    "liger_kernel": {},
    "liger_kernel.ops": {
        "LigerLayerNormFunction": LayerNorm,
        "LigerSiLUMulFunction": SiluMul,
    },
    "quack": {},
    "quack.linear": {"linear_gated_func": linear_gated_func},
    "quack.mlp": {"mlp_func": mlp_func},
    "flash_swiglu_mlp": {"flash_swiglu": flash_swiglu},
    "liger_kernel.ops.cutedsl": {},
    "liger_kernel.ops.cutedsl.ops": {},
    "liger_kernel.ops.cutedsl.ops.swiglu": {"fused_swiglu": fused_swiglu},
    "cudnn": {"gemm_swiglu_wrapper_sm100": gemm_swiglu_wrapper_sm100},
    "flash_attn": {},
    "flash_attn.bert_padding": {"unpad_input": unpad_input},
}


@pytest.fixture
def installed(monkeypatch):
    """(op) -> its peers, every package installed and nothing compiled."""
    for name, members in MODULES.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    missing = []
    yield lambda op: load_peers(op, run_of(emit=missing.extend))
    assert missing == []


# ---- the projector


@pytest.mark.parametrize("grids", GRIDS)
def test_every_projector_is_the_truth(installed, grids):
    case = project_tokens.case("small", grids, installed("project_tokens"), WIDTHS)
    rows = rows_of(case)
    assert_all_ok(rows)
    by_mode = {m: {row["variant"] for row in rows if row["mode"] == m} for m in MODES}
    training = {
        "tokenflex",
        "tokenflex, save=input",
        "tokenflex, no biases",
        EAGER,
        f"{EAGER}, again",
        COMPILED,
        "liger-kernel",
        "quack-kernels",
        "quack-kernels, concat_layout",
    }
    assert by_mode["forward+backward"] == training
    # Where backward writes into what was saved, it cannot be timed alone, many times.
    assert by_mode["backward"] == training - {"liger-kernel"}
    lean, flash = {"tokenflex, save=input"}, {"flash-swiglu-mlp, no biases"}
    assert by_mode["forward"] == training - lean | flash
    # 32 hidden, 8 in, 8 out; backward is twice forward.
    flops = {row["mode"]: row["flops"] for row in rows}
    once = 2 * number_of_tokens(grids) * (8 * 64 + 32 * 8)
    assert flops == {"forward": once, "backward": 2 * once, "forward+backward": 3 * once}


def test_every_stage_is_the_truth(installed):
    for grids in GRIDS:
        rows = rows_of(pool_norm.case("small", grids, installed("pool_norm"), 8))
        assert_all_ok(rows)
        peers_of_pooling = {EAGER, f"{EAGER}, again", COMPILED, "liger-kernel"}
        assert {row["variant"] for row in rows} == {"tokenflex"} | peers_of_pooling
    rows = rows_of(swiglu.case(5, installed("swiglu"), WIDTHS))
    assert_all_ok(rows)
    forward = {row["variant"] for row in rows if row["mode"] == "forward"}
    packages = {"liger-kernel", "quack-kernels", "quack-kernels, concat_layout"}
    packages |= {"tokenflex, no biases", "liger-kernel fused_swiglu, no biases", "cudnn, no biases"}
    own = {"tokenflex", EAGER, f"{EAGER}, again", COMPILED, "bare product"}
    assert forward == own | packages
    assert rows[0]["flops"] == 2 * 5 * 8 * 64
    assert rows[0]["backend"]


def test_a_loop_over_groups_keeps_the_images_order():
    grids = plain.grids_of([(2, 2), (3, 3), (2, 2)], "cpu")
    x = torch.randn(3 * 27 * 27, 4)
    images = zip(x.split(27 * 27), grids.outputs, strict=True)
    wanted = torch.cat([plain.pool(image, grid) for image, grid in images])
    torch.testing.assert_close(plain.by_group(x, grids, plain.pool), wanted)
    torch.testing.assert_close(plain.by_image(x, grids, plain.pool), wanted)


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (8, 23), (27, 27)])
def test_pooling_is_that_of_the_definition(grid):
    """Cell i of n averages the patches [floor(i S / n), ceil((i + 1) S / n)) of each axis."""

    def averages(cells):
        rows = torch.zeros(cells, plain.SIDE, dtype=torch.float64)
        for i in range(cells):
            start, end = i * plain.SIDE // cells, -(-(i + 1) * plain.SIDE // cells)
            rows[i, start:end] = 1 / (end - start)
        return rows

    x = torch.randn(2 * plain.SIDE**2, 4, dtype=torch.float64)
    images = x.view(2, plain.SIDE, plain.SIDE, 4)
    cells = torch.einsum("ih,bhwc,jw->bijc", averages(grid[0]), images, averages(grid[1]))
    torch.testing.assert_close(plain.pool(x, grid), cells.reshape(-1, 4))


def test_mixed_and_uniform_have_as_many_images_and_tokens():
    tokens = 2 * (2 * 64 + 3 * 144 + 5 * 256)
    assert number_of_tokens(mixed(2)) == number_of_tokens(uniform(2)) == tokens
    assert len(mixed(2)) == len(uniform(2)) == 20
    assert sorted(mixed(1)) == [*square(2, 8), *square(3, 12), *square(5, 16)]


def test_ideal_bytes_of_pooling():
    case = pool_norm.case("small", [(2, 2)] * 3, [], 8)
    assert case.work("forward", 2).bytes == 2 * 8 * 3 * (729 + 4)
    assert case.work("backward", 2).bytes == 2 * 8 * 3 * (729 + 8)


@pytest.mark.parametrize("cases", [pool_norm.cases, swiglu.cases, project_tokens.cases])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_case_is_measured_once_and_what_compiles_joins_few(cases, device):
    slow, quick = Variant("slow", plain.swiglu, slow_start=True), Variant("quick", plain.swiglu)
    full = list(cases(run_of(device), [slow, quick]))
    names = [case.name for case in full]
    assert len(set(names)) == len(names)
    assert 0 < len(list(cases(run_of(device, quick=True), []))) < len(full)
    assert all(quick in case.variants for case in full)
    assert 0 < sum(slow in case.variants for case in full) < len(full)


# ---- the registry


def test_a_peer_is_one_function(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {})

    @peers.peer("product", "other package", module="math", modes=("forward",))
    def other(math, leaves, _):
        return leaves["a"] * leaves["b"] * math.sqrt(1)

    rows = rows_of(square_case(*load_peers("product", run_of())))
    assert [(row["variant"], row["mode"], row["status"]) for row in rows] == [
        ("other package", "forward", "ok")
    ]


def test_torch_compile_takes_each_shape_and_leaves_graphs_to_us(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(options) or call)
    (variant,) = (v for v in load_peers("swiglu", run_of()) if v.name == COMPILED)
    assert compiled == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}]
    assert (variant.call, variant.slow_start) == (plain.swiglu, True)


@pytest.mark.parametrize(
    ("device", "dtype", "threads", "compiles"),
    [
        ("cuda", torch.bfloat16, 16, True),
        ("cpu", torch.float32, 1, True),
        ("cpu", torch.bfloat16, 2, True),
        ("cpu", torch.float32, 2, False),
        ("cpu", torch.bfloat16, 1, False),
    ],
)
def test_a_cpu_compiles_in_two_settings(device, dtype, threads, compiles):
    run = dataclasses.replace(run_of(device), dtype=dtype, threads=threads)
    assert run.compiles is compiles


def test_peers_that_are_missing_or_broken_or_slow_are_rows(monkeypatch):
    def broken(name):
        raise OSError(f"lib{name}.so: cannot open\nmore")

    monkeypatch.setattr(peers, "PEERS", {})
    peers.peer("op", "absent", module="no_such_package")(print)
    peers.peer("op", "broken", module="cuda")(print)
    peers.PEERS["op"][COMPILED] = lambda: pytest.fail("compiled")
    importer = peers.importlib.import_module
    fake = SimpleNamespace(import_module=lambda n: broken(n) if n == "cuda" else importer(n))
    monkeypatch.setattr(peers, "importlib", fake)
    rows = []
    assert load_peers("op", run_of(quick=True, emit=rows.extend)) == []
    assert {row["variant"]: row["status"] for row in rows} == {
        "absent": "not installed: no module no_such_package",
        "broken": "does not import: OSError: libcuda.so: cannot open",
        COMPILED: "not run: a quick run compiles nothing",
    }


# ---- packing


@pytest.mark.parametrize("count", [None, 1])
@pytest.mark.parametrize(
    ("make", "op", "wanted"),
    [
        (
            partial(packing.pack_case, kind=FORWARD),
            "pack_embeddings",
            {
                "embedding + masked_scatter",
                "embedding + index_put",
                "embedding + vLLM merge",
                "embedding + vLLM index mask",
                "embedding + nested jagged",
                "padded embedding + flash-attn unpad",
            },
        ),
        (partial(packing.pack_case, kind=FROZEN_TABLE), "pack_embeddings", set()),
        (partial(packing.pack_case, kind=TRAINED_TABLE), "pack_embeddings", set()),
        (
            partial(packing.pack_case, kind=SPARSE_TABLE),
            SPARSE_GRADIENT,
            {"embedding(sparse) + index_put"},
        ),
        (packing.merge_case, "merge_vision", {"masked_scatter", "index_put", "vLLM index mask"}),
        (packing.unpack_case, "unpack_vision", {"index", "index_select", "index by a mask"}),
    ],
)
def test_every_way_to_pack_is_the_truth(installed, make, op, wanted, count):
    prompts = dataclasses.replace(SMALL, count=count)
    rows = rows_of(make(prompts, peers=installed(op)))
    assert_all_ok(rows)
    assert {row["variant"] for row in rows} >= wanted
    vision = 3 if count else 64 + 144 + 256
    assert rows[0]["tokens"] == vision + (0 if op == "unpack_vision" else 15)


@pytest.mark.parametrize(
    "make",
    [
        partial(packing.pack_case, kind=FORWARD),
        partial(packing.pack_case, kind=FROZEN_TABLE),
        packing.merge_case,
        packing.unpack_case,
    ],
)
def test_rows_that_are_only_moved_must_agree_bit_by_bit(make):
    case = make(SMALL, peers=[])
    call = case.variants[0].call
    off = Variant("off", lambda leaves, fixed: call(leaves, fixed) * (1 + 1e-15))
    rows = rows_of(dataclasses.replace(case, variants=[off]))
    assert rows
    assert all("is off" in row["status"] for row in rows)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_packing_is_measured_in_every_way(device, quick):
    cases = list(packing.cases(run_of(device, quick), [], [], [], []))
    *sizes, sparse, trained = [(case.op, case.name, tuple(case.modes)) for case in cases]
    names = list(dict.fromkeys(name.partition(", ")[0] for _, name, _ in sizes))
    assert len(names) == {"cuda": 1, "cpu": 2}[device] if quick else len(names) > 4
    assert sizes == [
        way
        for name in names
        for way in (
            ("pack_embeddings", name, ("forward",)),
            ("pack_embeddings", f"{name}, frozen table", TRAINING),
            ("merge_vision", name, MODES),
            ("unpack_vision", name, MODES),
        )
    ]
    # The longest come last: on a CPU the largest batch, and the table's gradient anywhere.
    main = names[-1 if device == "cpu" else 0]
    assert sparse == ("pack_embeddings", f"{main}, sparse table gradient", ("forward+backward",))
    assert trained == ("pack_embeddings", f"{main}, trained table", ("forward+backward",))


def test_ideal_bytes_of_packing_count_each_row_once():
    """10 rows, 6 of them vision, 3 different ids, 4 bytes a row."""
    prompts = Prompts(2, 2, 1, 9, count=3)

    def moved(ids):
        case = square_case(numbers=packing.pack_numbers(prompts, ids))
        return [case.work(mode, 4).bytes for mode in MODES]

    assert moved(None) == [4 * 20, 4 * 12, 4 * 32]
    assert moved(3) == [4 * 20, 4 * (12 + 4 + 3), 4 * (32 + 4 + 3)]


def test_masked_scatter_waits_for_its_count_in_backward(installed):
    variants = [*installed("pack_embeddings"), *installed("merge_vision")]
    waiting = {v.name: v.waits for v in variants if v.waits and "flash" not in v.name}
    expected = {"embedding + masked_scatter": TRAINING, "masked_scatter": TRAINING}
    assert waiting.items() >= expected.items()
