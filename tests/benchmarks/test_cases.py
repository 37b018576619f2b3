"""The cases: every variant computes the same, peers through stand-ins of their packages."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness, packing_cases, peers, suites
from benchmarks.harness import Variant
from benchmarks.packing_cases import Prompts
from benchmarks.projector_cases import (
    as_many,
    by_group,
    eager_gate_up,
    gate_up_case,
    grids_of,
    mixed,
    pool,
    pooling_case,
    projector_case,
    square,
)
from benchmarks.timing import sample_in_turn
from tests.benchmarks.small import rows_of, small_shapes  # noqa: F401

SMALL = Prompts(samples=3, text=5, width=8, vocabulary=20)
PLAIN = [[(8, 8)], [(3, 2), (5, 5), (3, 2)]]


def assert_all_ok(rows):
    assert [row["status"] for row in rows] == ["ok"] * len(rows)


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize("out_grids", PLAIN)
@pytest.mark.parametrize("make", [pooling_case, projector_case])
def test_ours_and_eager_are_the_truth(make, out_grids):
    assert_all_ok(rows_of(make("small", out_grids)))


@pytest.mark.usefixtures("small_shapes")
def test_gate_up_and_the_bare_product():
    rows = rows_of(gate_up_case(5))
    assert_all_ok(rows)
    assert [row["variant"] for row in rows if row["mode"] == "forward"] == [
        "tokenflex",
        "bare product",
        "PyTorch eager",
    ]
    assert rows[0]["flops"] == 2 * 5 * 8 * 32
    assert rows[0]["backend"] == "reference"


def test_a_loop_over_groups_keeps_the_images_order():
    grids = grids_of([(2, 2), (3, 3), (2, 2)], "cpu")
    x = torch.randn(3 * 27 * 27, 4)
    images = x.split(27 * 27)
    wanted = [pool(image, grid) for image, grid in zip(images, grids.out_grids, strict=True)]
    torch.testing.assert_close(by_group(x, grids, pool), torch.cat(wanted))


def test_mixed_and_uniform_have_as_many_images_and_tokens():
    tokens = [sum(h * w for h, w in grids) for grids in (mixed(2), as_many(2))]
    assert tokens[0] == tokens[1] == 2 * (2 * 64 + 3 * 144 + 5 * 256)
    assert len(mixed(2)) == len(as_many(2)) == 20
    assert sorted(mixed(1)) == [*square(2, 8), *square(3, 12), *square(5, 16)]


# ---- peers


class SiluMul(torch.autograd.Function):
    """As Liger's own, backward writes its gradients into what forward saved."""

    @staticmethod
    def forward(ctx, gate, up, gate_multiplier, down_multiplier):
        assert (gate_multiplier, down_multiplier) == (1.0, 1.0)
        ctx.saved = gate.clone(), up.clone()
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            product = F.silu(leaves[0]) * leaves[1]
        for saved, found in zip(ctx.saved, torch.autograd.grad(product, leaves, grad), strict=True):
            saved.copy_(found)
        return gate, up, None, None


class LayerNorm:
    @staticmethod
    def apply(x, weight, bias, eps):
        return F.layer_norm(x, weight.shape, weight, bias, eps)


def linear_gated_func(x, weight, activation, bias, store_preact, tuned):
    assert (activation, tuned) == ("swiglu", False)
    before = F.linear(x, weight, bias)
    return None, F.silu(before[:, ::2]) * before[:, 1::2]


def mlp_func(x, weight1, weight2, activation, bias1, bias2, tuned):
    _, product = linear_gated_func(x, weight1, activation, bias1, True, tuned)
    return F.linear(product, weight2, bias2)


def flash_swiglu(x, gate, up, down):
    assert x.ndim == 3
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


MODULES = {
    "liger_kernel": None,
    "liger_kernel.ops": SimpleNamespace(
        LigerLayerNormFunction=LayerNorm, LigerSiLUMulFunction=SiluMul
    ),
    "quack": None,
    "quack.linear": SimpleNamespace(linear_gated_func=linear_gated_func),
    "quack.mlp": SimpleNamespace(mlp_func=mlp_func),
    "flash_swiglu_mlp": SimpleNamespace(flash_swiglu=flash_swiglu),
}


@pytest.fixture
def installed(monkeypatch):
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace())
    monkeypatch.delitem(peers.PEERS, peers.COMPILED)
    found, missing = peers.load_peers()
    assert missing == {}
    return lambda op: [variants[op] for variants in found if op in variants]


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize("out_grids", PLAIN)
def test_adapters_compute_the_projector(installed, out_grids):
    rows = rows_of(projector_case("small", out_grids, installed("project_tokens")))
    assert_all_ok(rows)
    training = {row["variant"] for row in rows if row["mode"] == "forward+backward"}
    assert training == {
        "tokenflex",
        "tokenflex, save=input",
        "tokenflex, no biases",
        "PyTorch eager",
        "liger-kernel",
        "quack-kernels",
    }
    assert "flash-swiglu-mlp, no biases" in {row["variant"] for row in rows}
    # Where backward writes into what was saved, it cannot be timed alone, many times.
    alone = {row["variant"] for row in rows if row["mode"] == "backward"}
    assert alone == training - {"liger-kernel"}


@pytest.mark.usefixtures("small_shapes")
def test_adapters_compute_the_stages(installed):
    rows = rows_of(pooling_case("small", [(3, 2), (5, 5)], installed("pool_norm")))
    rows += rows_of(gate_up_case(5, installed("swiglu")))
    assert_all_ok(rows)
    assert {"liger-kernel", "quack-kernels"} <= {row["variant"] for row in rows}


@pytest.mark.usefixtures("small_shapes")
def test_torch_compile_is_a_peer(monkeypatch):
    asked = []

    def compiled(call, **options):
        asked.append(options)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    variants = peers.compiled()
    assert asked == 3 * [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}]
    rows = rows_of(pooling_case("small", [(3, 2)], [variants["pool_norm"]]))
    assert_all_ok(rows)
    assert peers.COMPILED in {row["variant"] for row in rows}


def test_a_quick_run_compiles_nothing(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {peers.COMPILED: lambda: pytest.fail("compiled")})
    found, missing = peers.load_peers(compiling=False)
    assert found == []
    assert missing == {peers.COMPILED: "not run: a quick run compiles nothing"}


@pytest.mark.parametrize("cases", [suites.pooling_cases, suites.gate_up_cases, suites.whole_cases])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_case_is_measured_once_and_quick_ones_are_among_them(cases, device):
    slow = Variant("slow", eager_gate_up, slow_start=True)
    full = list(cases(device, False, [slow], []))
    quick = list(cases(device, True, [], []))
    names = [case.name for case in full]
    assert len(set(names)) == len(names)
    assert 0 < len(quick) < len(full)
    assert any(slow in case.variants for case in full)
    assert not any(slow in case.variants for case in quick)


def test_peers_that_are_missing_or_broken_are_named(monkeypatch):
    def broken():
        raise OSError("libcuda.so.1: cannot open")

    monkeypatch.setattr(peers, "PEERS", {"liger-kernel": peers.liger, "other": broken})
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found, missing = peers.load_peers()
    assert found == []
    assert missing["liger-kernel"].startswith("not installed: no module liger_kernel")
    assert missing["other"] == "does not import: OSError: libcuda.so.1: cannot open"


# ---- packing


def unpad_input(hidden_states, attention_mask):
    return hidden_states[attention_mask], None, None, None, None


@pytest.mark.parametrize(
    "case",
    [
        packing_cases.forward_case,
        packing_cases.frozen_table_case,
        packing_cases.trained_table_case,
        lambda prompts: packing_cases.trained_table_case(prompts, sparse=True),
        packing_cases.merge_case,
    ],
)
@pytest.mark.parametrize("count", [None, 1])
def test_packers_and_mergers_do_the_same(case, count, monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 1)
    monkeypatch.setattr(packing_cases, "has_flash_attn", lambda: True)
    monkeypatch.setitem(
        sys.modules, "flash_attn.bert_padding", SimpleNamespace(unpad_input=unpad_input)
    )
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    rows = rows_of(case(Prompts(3, 5, 8, 20, count)))
    assert_all_ok(rows)
    assert rows[0]["tokens"] == 15 + (3 if count else 64 + 144 + 256)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (
            packing_cases.forward_case,
            {
                "tokenflex",
                "embedding + masked_scatter",
                "embedding + index_put",
                "embedding + vLLM merge",
                "embedding + nested jagged",
            },
        ),
        (packing_cases.merge_case, {"tokenflex", "masked_scatter", "index_put"}),
    ],
)
def test_every_way_that_other_models_pack_is_there(case, wanted, monkeypatch):
    monkeypatch.setattr(packing_cases, "has_flash_attn", lambda: False)
    assert {variant.name for variant in case(SMALL).variants} == wanted


@pytest.mark.parametrize(
    "case",
    [packing_cases.forward_case, packing_cases.frozen_table_case, packing_cases.merge_case],
)
def test_what_is_only_moved_must_agree_bit_by_bit(case, monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 1)
    right = case(SMALL)
    call = right.variants[0].call
    off = Variant("off", lambda leaves, fixed: call(leaves, fixed) * (1 + 1e-15))
    rows = rows_of(dataclasses.replace(right, variants=[off]))
    assert rows
    assert all("is off" in row["status"] for row in rows)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_packing_is_measured_in_every_way(device, quick):
    cases = list(suites.packing_cases(device, quick))
    *sizes, sparse, trained = [(case.op, case.name, case.modes) for case in cases]
    names = list(dict.fromkeys(name.partition(", ")[0] for _, name, _ in sizes))
    assert len(names) == 1 if quick else len(names) > 4
    assert sizes == [
        way
        for name in names
        for way in (
            ("pack_embeddings", name, ("forward",)),
            ("pack_embeddings", f"{name}, frozen table", ("backward", "forward+backward")),
            ("merge_vision", name, harness.MODES),
        )
    ]
    # What takes longest comes last: on a CPU the largest batch, and the table's gradient anywhere.
    main = names[-1 if device == "cpu" else 0]
    assert sparse == ("pack_embeddings", f"{main}, sparse table gradient", ("forward+backward",))
    assert trained == ("pack_embeddings", f"{main}, trained table", ("forward+backward",))


def test_a_case_without_time_is_a_row_for_each_mode():
    case = packing_cases.frozen_table_case(SMALL)
    rows = list(suites.run_cases(iter([case]), "cpu", True, harness.Deadline(-1)))
    assert [(row["mode"], row["status"]) for row in rows] == [
        ("backward", harness.NO_TIME),
        ("forward+backward", harness.NO_TIME),
    ]


def test_ceilings_count_what_they_move_and_multiply(monkeypatch):
    monkeypatch.setattr(suites, "sample_in_turn", lambda clocks, *_: sample_in_turn(clocks, 1, 0.0))
    copy, matmul = suites.ceilings("cpu", True, harness.Deadline(9))
    assert copy["case"] == "0.0625 GiB"
    assert copy["ideal_bytes"] == 2 * 2**26  # read and written
    assert matmul["case"] == "1024^3"
    assert matmul["flops"] == 2 * 1024**3
    assert matmul["tflop_per_s"] == pytest.approx(2e-6 * 1024**3 / matmul["p50_us"], rel=1e-3)


@pytest.mark.usefixtures("small_shapes")
def test_flops_of_the_projector_are_its_three_products():
    """16 hidden, 8 in, 8 out; backward is twice forward."""
    work = projector_case("small", [(3, 2)], width=8).work(4)
    forward = 2 * 6 * (8 * 2 * 16 + 16 * 8)
    assert [work[mode].flops for mode in harness.MODES] == [forward, 2 * forward, 3 * forward]


def test_ideal_bytes_of_merging():
    """Forward reads and writes each row; backward reads each, and writes two kinds of gradient."""
    work = packing_cases.merge_case(SMALL).work(4)
    rows, vision, size = SMALL.tokens, 64 + 144 + 256, 4 * SMALL.width
    forward, backward = 2 * rows * size, (2 * rows + vision) * size
    assert [work[mode].bytes for mode in harness.MODES] == [forward, backward, forward + backward]


def test_what_waits_for_the_device_is_never_captured():
    scatter = [*packing_cases.PACKERS, *packing_cases.MERGERS]
    waiting = {variant.name: set(variant.waits) for variant in scatter if variant.waits}
    backward = {"backward", "forward+backward"}
    assert waiting == {"embedding + masked_scatter": backward, "masked_scatter": backward}


def test_names_say_the_rows():
    assert SMALL.name == "3x(5 text + 64/144/256 vision) D=8"
    assert SMALL.tokens == 3 * 5 + 64 + 144 + 256


def test_ideal_bytes_count_each_row_once():
    """10 rows, 6 of them vision, 3 different ids, 4 bytes a row."""

    def moved(*trained):
        work = packing_cases.pack_work(10, 6, 3, 4, trained)
        return [work[mode].bytes for mode in ("forward", "backward", "forward+backward")]

    assert moved("vision") == [4 * 20, 4 * 12, 4 * 32]
    assert moved("table", "vision") == [4 * 20, 4 * (12 + 4 + 3), 4 * (32 + 4 + 3)]


@pytest.mark.usefixtures("small_shapes")
def test_ideal_bytes_of_pooling():
    work = pooling_case("small", [(2, 2)] * 3).work(2)
    assert work["forward"].bytes == 2 * 8 * 3 * (729 + 4)
    assert work["backward"].bytes == 2 * 8 * 3 * (729 + 8)
