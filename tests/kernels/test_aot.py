"""Compiling without a GPU: how many binaries there are, and which of them `aot` refuses.

Triton keeps one target and one interpreter setting a process, so all that compiles here does so in
processes of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.selection import ALL
from tokenflex_kernels import aot, versions
from tokenflex_kernels.aot import Compiled, Predicted, faults
from tokenflex_kernels.budget import table

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run_python(folder, code):
    """Run ``code`` by a Python that compiles and does not interpret; return its output as JSON."""
    script = folder / "script.py"  # Triton reads a kernel's source from its file
    script.write_text(code, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    result = subprocess.run(
        [sys.executable, script],
        env={**kept, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


COUNTING = """
import json
from collections import defaultdict
import torch
from tokenflex_kernels import aot
aot.set_target("sm_90")
from tokenflex_kernels import launch
from tokenflex_kernels.launch_configs import INTERPRETER, launch_config, overriding
from tokenflex_kernels.pool_norm.plan import plan_pooling
from tokenflex_kernels.pool_norm.stages import (
    launch_pool_norm_backward, launch_pool_norm_forward, launch_scale_shift)
from tokenflex_kernels.project_and_pack.stages import launch_packed_down
from tokenflex_kernels.swiglu.stages import (
    launch_down_gradient, launch_gate_up, launch_input_gradient)

binaries, launches = defaultdict(set), defaultdict(int)

def compiled(kernel, binary):
    binaries[kernel].add(binary.hash)
    launches[kernel] += 1

launch.on_compile = compiled
meta = torch.device("meta")
WIDTH, HIDDEN, TEXT = 48, 80, 64

def rows(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=meta)

def report():
    print(json.dumps({"binaries": {name: len(found) for name, found in binaries.items()},
                      "launches": launches}))
"""

BATCHES = """
grids = [(1, 1), (27, 27), (5, 7), (16, 16), (31, 2), (3, 1), (32, 32), (13, 11), (8, 64), (9, 9)]
cells = [(1, 1), (8, 8), (2, 3), (16, 16), (3, 1), (12, 12), (5, 5), (1, 16), (7, 4), (4, 4)]
stages = "pool_norm_forward", "pool_norm_backward", "norm_gradient", "scale_shift"
configs = {stage: launch_config(stage, 1, torch.float32, INTERPRETER) for stage in stages}
for batch in range(NUMBER):
    images = 1 + batch * 5 % 37
    in_grids = [grids[(batch + image * image) % 10] for image in range(images)]
    out_grids = [cells[(batch * 3 + image) % 10] for image in range(images)]
    plan = plan_pooling(in_grids, out_grids)
    x, weight = rows(plan.num_patches, WIDTH), rows(WIDTH)
    with overriding(**configs):
        out, normalised, inverse_std = launch_pool_norm_forward(
            x, weight, weight, plan.grids, plan.num_cells, MODE, 1e-5, x.dtype, True)
        saved = normalised, inverse_std, weight, plan.grids, plan.num_patches, MODE
        launch_pool_norm_backward(out, *saved, x.dtype, True, True)
        launch_pool_norm_backward(out, *saved, x.dtype, False, False)
        launch_pool_norm_backward(out, *saved, None, True, True)
        launch_scale_shift(normalised, weight, weight)
report()
"""

LENGTHS = """
config = launch_config("gate_up", 1, torch.float32, INTERPRETER)._replace(tma=TMA)
weights, bias, down = rows(2, HIDDEN, WIDTH).unbind(), rows(HIDDEN), rows(TEXT, HIDDEN)
lengths = [1, 2, 15, 16, 17, 32, 64, 128, 4096, 65536, 2**20, *range(255, 294)]
assert len(set(lengths)) == 50
for length in lengths[:NUMBER]:
    x, row_map = rows(length, WIDTH), rows(length, dtype=torch.int32)
    for fused in (config, None):
        names = "gate_up", "down_gradient", "input_gradient", "packed_down"
        products = dict.fromkeys(names, fused)
        with overriding(pointwise=config, **products):
            product, g, u = launch_gate_up(x, *weights, bias, bias, True, True)
            grads, _, _ = launch_down_gradient(rows(length, TEXT), down, g, u, True, True)
            launch_input_gradient(grads, *weights)
            launch_packed_down(product, down, rows(TEXT), rows(3, TEXT), row_map, row_map, -1)
report()
"""


class TestCompilations:
    """R10: one binary for a config and a variant, whatever the lengths and grids of the batches."""

    # Fifty at a release, as R10 asks; in a part of them a binary for each would show as well.
    NUMBER = 50 if ALL else 15

    # A batch of which every weight is 1 takes the binary that does not look at weights.
    @pytest.mark.parametrize(("mode", "variants"), [("adaptive", 1), ("resize", 2)])
    def test_all_batches_share_one_binary_of_each_row_kernel(self, tmp_path, mode, variants):
        settings = f"MODE, NUMBER = {mode!r}, {self.NUMBER}\n"
        counted = run_python(tmp_path, COUNTING + settings + BATCHES)
        # The reducing kernel has one binary for means, one for sums, and one for both.
        assert counted["binaries"] == {
            "pool_norm_forward_kernel": variants,
            "pool_norm_backward_kernel": variants,
            "norm_gradient_kernel": 3,
            "scale_shift_kernel": 1,
        }
        assert counted["launches"] == {
            "pool_norm_forward_kernel": self.NUMBER,
            "pool_norm_backward_kernel": 2 * self.NUMBER,
            "norm_gradient_kernel": 3 * self.NUMBER,
            "scale_shift_kernel": self.NUMBER,
        }

    @pytest.mark.parametrize("tma", [False, True])
    def test_all_lengths_share_one_binary_of_each_product(self, tmp_path, tma):
        counted = run_python(tmp_path, COUNTING + f"TMA, NUMBER = {tma}, {self.NUMBER}\n" + LENGTHS)
        kernels = (
            "gate_up_pair_kernel" if tma else "gate_up_kernel",
            "down_gradient_kernel",
            "input_gradient_pair_kernel" if tma else "input_gradient_kernel",
            "packed_down_kernel",
            "gated_product_kernel",
            "gate_gradient_kernel",
        )
        assert counted["launches"] == dict.fromkeys(kernels, self.NUMBER)
        assert counted["binaries"] == dict.fromkeys(kernels, 1)


def compiled(**changes):
    """A product for sm_90 without faults, but for ``changes``."""
    good = {
        "architecture": "sm_90",
        "kernel": "gate_up_kernel",
        "variant": "bfloat16",
        "registers": 168,
        "stack": 0,
        "shared": 200_000,
        "instruction": "wgmma",
        "doubles": False,
        "wide": True,
    }
    return Compiled(**{**good, **changes})


class TestFaults:
    @pytest.mark.parametrize(
        "good",
        [
            {},
            {"shared": 232_448},
            {"architecture": "sm_80", "instruction": "mma", "shared": 166_912},
            {"architecture": "sm_100", "instruction": "tcgen05"},
            {"kernel": "pool_norm_forward_kernel", "instruction": ""},
            {"kernel": "gate_gradient_kernel", "instruction": ""},
            {"architecture": "gfx942", "instruction": "mfma", "shared": 65_536},
            {"architecture": "gfx950", "instruction": "mfma", "shared": 163_840},
        ],
    )
    def test_none(self, good):
        assert faults(compiled(**good)) == []

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            ({"stack": 8}, ["spills", "8 bytes"]),
            ({"doubles": True}, [".f64"]),
            ({"wide": False}, ["no 16-byte loads"]),
            ({"shared": 232_449}, ["232449", "232448"]),
            ({"architecture": "sm_80", "instruction": "mma"}, ["200000", "166912"]),
            ({"architecture": "sm_86", "instruction": "mma"}, ["200000", "101376"]),
            # An architecture that nobody listed gets the least that any has.
            ({"architecture": "sm_87", "instruction": "mma"}, ["200000", "101376"]),
            ({"instruction": "mma"}, ["no wgmma", "mma"]),
            ({"instruction": ""}, ["no matrix instruction", "no wgmma"]),
            ({"architecture": "sm_100", "instruction": ""}, ["no matrix instruction"]),
            ({"kernel": "down_gradient_kernel", "instruction": "mma"}, ["no wgmma"]),
            ({"kernel": "input_gradient_kernel", "instruction": "mma"}, ["no wgmma"]),
            ({"kernel": "scale_shift_kernel", "instruction": "", "stack": 16}, ["spills"]),
            ({"architecture": "gfx942", "shared": 65_537}, ["65537", "65536"]),
            ({"architecture": "gfx950", "doubles": True, "shared": 0}, [".f64 in the assembly"]),
            ({"architecture": "gfx942", "instruction": ""}, ["no matrix instruction"]),
        ],
    )
    def test_each_is_named(self, bad, words):
        found = "; ".join(faults(compiled(**bad)))
        for word in words:
            assert word in found

    def test_several_are_all_named(self):
        bad = compiled(stack=8, doubles=True, shared=10**6, instruction="", wide=False)
        assert len(faults(bad)) == 6


BAD_KERNELS = """
import json
import torch, triton
import triton.language as tl
from tokenflex_kernels import aot
aot.set_target("sm_90")
from tokenflex_kernels import launch

@triton.jit
def good(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, tl.load(x + at) * 2)

@triton.jit
def narrow(x, stride, N: tl.constexpr):
    at = tl.arange(0, N) * stride
    tl.store(x + at, tl.load(x + at) * 2)

@triton.jit
def doubles(x, addend, N: tl.constexpr):
    at = tl.arange(0, N)
    wide = tl.load(x + at).to(tl.float64)
    tl.store(x + at, (wide * wide + addend).to(tl.float32))

@triton.jit
def spills(x, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + row * N + column)
    tl.store(x + row * N + column, a * tl.sum(a, 0)[None, :] + tl.sum(a, 1)[:, None])

@triton.jit
def gate_up_kernel(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, tl.load(x + at) * 3)

@triton.jit
def input_gradient_kernel(x, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + row * N + column)
    tl.store(x + row * N + column, tl.dot(a, a).to(a.dtype))  # wgmma needs 64 rows

found = {}

def compiled(name, binary):
    found[name] = aot.faults(aot.inspect("sm_90", name, "", binary))

launch.on_compile = compiled
x = torch.empty(2**20, device="meta")
launch.launch(good, 1, x, x, N=512, num_warps=4)
launch.launch(narrow, 1, x, x, 7, N=512, num_warps=4)
launch.launch(doubles, 1, x, x, 0.5, N=512, num_warps=4)
launch.launch(spills, 1, x, x, N=128, num_warps=1)
launch.launch(gate_up_kernel, 1, x, x, N=512, num_warps=4)
launch.launch(input_gradient_kernel, 1, x, x.bfloat16(), N=16, num_warps=4)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_python(tmp_path_factory.mktemp("bad_kernels"), BAD_KERNELS)


class TestInspection:
    """Kernels with one fault each, through the compiler, ``inspect`` and ``faults``."""

    def test_a_good_kernel_has_none(self, found):
        assert found["good"] == []

    def test_double_precision_is_seen(self, found):
        assert found["doubles"] == [".f64 in the PTX"]

    def test_narrow_loads_are_seen(self, found):
        assert found["narrow"] == ["no 16-byte loads"]

    def test_a_spill_is_seen(self, found):
        assert any(fault.startswith("spills: ") for fault in found["spills"])

    def test_a_product_without_matrix_instruction_is_seen(self, found):
        assert found["gate_up_kernel"] == ["no matrix instruction", "no wgmma but nothing"]

    def test_a_product_with_an_older_matrix_instruction_is_seen(self, found):
        assert "no wgmma but mma" in found["input_gradient_kernel"]


AMD_KERNELS = """
import json
import torch
from tokenflex_kernels import aot, launch
aot.set_target("gfx942")
from tokenflex_kernels.launch_configs import launch_config
from tokenflex_kernels.stage_calls import stage_calls

found = {}

def compiled(name, binary):
    result = aot.inspect("gfx942", name, "", binary)
    found[name] = [aot.faults(result), result.registers, result.instruction]

launch.on_compile = compiled
meta = torch.device("meta")
for stage in ("scale_shift", "gate_up"):
    config = launch_config(stage, 4096, torch.bfloat16, "gfx942")
    next(stage_calls(stage, torch.bfloat16, 2, (16, 16), meta))[1](config=config)
print(json.dumps(found))
"""


def test_kernels_compile_for_amd_and_are_inspected(tmp_path):
    found = run_python(tmp_path, AMD_KERNELS)
    kernels = found["scale_shift_kernel"], found["gate_up_kernel"]
    faults_of, registers, instruction = zip(*kernels, strict=True)
    assert faults_of == ([], [])
    assert instruction == ("", "mfma")
    assert all(0 < number <= 512 for number in registers)


ASSEMBLY = """
	v_fma_f32 v4, v4, v5, v6
	global_load_dwordx4 v[0:3], v4, s[2:3]
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 0
    .sgpr_count:     20
    .vgpr_count:     64
    .vgpr_spill_count: 0
"""


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("size: 0", "size: 16", ["spills: 16 bytes of stack"]),
        ("v_fma_f32", "v_fma_f64", [".f64 in the assembly"]),
        ("dwordx4", "dwordx2", ["no 16-byte loads"]),
        ("", "", []),
    ],
)
def test_assembly_of_amd_is_read(before, after, expected):
    binary = SimpleNamespace(
        asm={"amdgcn": ASSEMBLY.replace(before, after)}, metadata=SimpleNamespace(shared=8192)
    )
    found = aot.inspect("gfx942", "scale_shift_kernel", "", binary)
    assert (found.registers, found.shared, found.instruction) == (64, 8192, "")
    assert faults(found) == expected


def test_assembly_without_its_description_is_an_error():
    binary = SimpleNamespace(asm={"amdgcn": ""}, metadata=SimpleNamespace(shared=0))
    with pytest.raises(RuntimeError, match="the assembly of x for gfx942 has no vgpr_count"):
        aot.inspect("gfx942", "x", "", binary)


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--architectures", "sm_90,sm_42"],
                "--architectures: expected names of .*sm_80, sm_90, sm_100, .*got sm_42",
            ),
            (["--architectures", ""], "--architectures: expected names of .*got an empty name"),
            (["--jobs", "x"], "--jobs: expected a whole number, got 'x'"),
            (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        ],
    )
    @pytest.mark.usefixtures("inspected")
    def test_misuse_is_one_clear_line(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as exited:
            aot.main(arguments)
        assert exited.value.code == 2
        assert re.search(message, capsys.readouterr().err)

    @pytest.mark.usefixtures("inspected")
    def test_an_architecture_that_is_given_twice_is_compiled_once(self, capsys):
        assert aot.main(["--architectures", "sm_80,sm_80"]) == 0
        assert "1 kernels for sm_80: 0 with faults" in capsys.readouterr().out

    def test_the_interpreter_is_a_usage_error(self, capsys, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(SystemExit) as exited:
            aot.main([])
        assert exited.value.code == 2
        assert "TRITON_INTERPRET" in capsys.readouterr().err

    @pytest.fixture
    def inspected(self, monkeypatch):
        """Findings of the command for sm_80 with Triton 3.7; nothing is compiled."""
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(versions, "version", lambda package: "3.7.1")
        results = {"sm_80": [compiled(architecture="sm_80", shared=0, instruction="mma")]}
        predictions = [Predicted("in budget")]

        class InThisProcess:
            def __init__(self, *args, **options):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                return None

            def map(self, function, architectures):
                return [aot.Inspected(results[name], predictions) for name in architectures]

        monkeypatch.setattr(aot, "ProcessPoolExecutor", InThisProcess)
        return results["sm_80"], predictions

    def test_a_fault_is_exit_code_1_and_none_is_0(self, capsys, inspected):
        kernels, predictions = inspected
        assert aot.main(["--architectures", "sm_80"]) == 0
        printed = capsys.readouterr().out
        assert "1 kernels for sm_80: 0 with faults" in printed
        assert "in budget" in printed
        kernels.append(compiled(stack=4))
        assert aot.main(["--architectures", "sm_80", "--quiet"]) == 1
        printed = capsys.readouterr().out
        assert "spills: 4 bytes of stack" in printed
        assert "2 kernels for sm_80: 1 with faults" in printed
        assert len(printed.splitlines()) == 3
        kernels.pop()
        predictions.append(Predicted("slow", is_over=True))
        assert aot.main(["--architectures", "sm_80", "--quiet"]) == 1
        assert capsys.readouterr().out.splitlines() == [
            "slow",
            "1 kernels for sm_80: 0 with faults",
            "2 predictions: 1 over their budget",
        ]

    def test_what_another_compiler_makes_a_little_worse_is_said(
        self, capsys, inspected, monkeypatch
    ):
        kernels, predictions = inspected
        for module in versions, table:
            monkeypatch.setattr(module, "version", lambda package: "3.9.0")
        kernels += [compiled(stack=8), compiled(stack=16)]
        predictions.append(Predicted("slower", is_over=True, is_little=True))
        assert aot.main(["--architectures", "sm_80", "--quiet"]) == 0
        *lines, kernel_count, prediction_count, remark = capsys.readouterr().out.splitlines()
        assert ("spills: 8" in lines[0], "spills: 16" in lines[1]) == (True, True)
        assert lines[2:] == ["slower"]
        assert kernel_count == "3 kernels for sm_80: 0 with faults"
        assert prediction_count == "2 predictions: 0 over their budget"
        assert remark.startswith("3 a little worse by Triton 3.9.0 than by 3.7")

    @pytest.mark.parametrize("changes", [{"stack": 24}, {"stack": 8, "wide": False}])
    def test_a_fault_of_another_compiler_is_one(self, capsys, inspected, monkeypatch, changes):
        monkeypatch.setattr(versions, "version", lambda package: "3.9.0")
        inspected[0].append(compiled(**changes))
        assert aot.main(["--architectures", "sm_80", "--quiet"]) == 1
        assert "2 kernels for sm_80: 1 with faults" in capsys.readouterr().out
