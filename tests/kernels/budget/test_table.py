"""Counts of the shipped kernels, and the published table of predictions.

Counting compiles, so it runs in a process of its own: see ``tests/kernels/test_aot.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.kernels.test_aot import ROOT, run_python
from tokenflex_kernels import versions
from tokenflex_kernels.budget import __main__ as command
from tokenflex_kernels.budget import page, table
from tokenflex_kernels.budget.model import REFERENCE_GPUS
from tokenflex_kernels.budget.table import Budget, Case, Verdict, read_budgets
from tokenflex_kernels.launch_configs import STAGES

pytest.importorskip("triton")

PUBLISHED = ROOT / "docs/results/kernels.csv"
PAGE = ROOT / "docs/kernels.md"
C, H, D = 1152, 3456, 2048

COUNTING = """
import json, torch, triton
from tokenflex_kernels import aot
aot.set_target("sm_90")
from tokenflex_kernels.budget import page, table
from tokenflex_kernels.budget.model import REFERENCE_GPUS
from tokenflex_kernels.budget.recording import recording
from tokenflex_kernels.budget.walk import walk
from tokenflex_kernels.launch_configs import launch_config
from tokenflex_kernels.stage_calls import rows_of_stage, stage_calls

def walk_some(launch, number):
    return [walk(launch, k * launch.programs // number) for k in range(number)]

GPU = REFERENCE_GPUS["sm_90"]
counted = {}
for stage, variant, side, number in CASES:
    rows = rows_of_stage(stage, 1, (side, side))
    config = launch_config(stage, rows, torch.bfloat16, "sm_90")
    calls = dict(stage_calls(stage, torch.bfloat16, 1, (side, side), torch.device("meta")))
    with recording(90, GPU.multiprocessors) as launches:
        calls[variant](config=config)
    counted[stage] = [
        {
            "kernel": recorded.kernel, "programs": recorded.launch.programs, "config": config,
            **{
                name: recorded.launch.programs * sum(getattr(t, name) for t in walked) / len(walked)
                for name in ("loaded", "stored", "flops")
            },
        }
        for recorded in launches
        for walked in [walk_some(recorded.launch, number)]
    ]
config = launch_config("gate_up", rows_of_stage("gate_up", 9, (8, 8)), torch.bfloat16, "sm_90")
calls = dict(stage_calls("gate_up", torch.bfloat16, 9, (8, 8), torch.device("meta")))
with recording(90, GPU.multiprocessors) as launches:
    calls["bias product save"](config=config)
by_descriptors = {
    "config": config, "programs": launches[0].launch.programs,
    "stored": {k: walk(launches[0].launch, k).stored for k in DESCRIPTOR_PROGRAMS},
}
rows = table.predict_case(table.Case("scale_shift", "", 128, 8), "sm_90")
budget = table.read_budgets()["scale_shift", "", 128]
verdict = table.Verdict(rows[0].case, budget, rows, rows[0].case.limit(GPU))
page.write_csv(OUT, [verdict], GPU)
found = {"counted": counted, "by_descriptors": by_descriptors, "triton": triton.__version__}
print(json.dumps(found))
"""
# Stages, variants, sides of the grid, and the blocks that are walked: those of a product are alike.
CASES = [
    ("scale_shift", "", 8, 2),
    ("pool_norm_forward", "adaptive norm save", 8, 8),
    ("pool_norm_backward", "adaptive norm", 8, 8),
    ("gate_up", "bias product save", 8, 1),
    ("down_gradient", "product bias", 8, 1),
]
# Of gate and up for nine images: 5 x 27 tiles, of which the last row has half; 132 blocks.
DESCRIPTOR_PROGRAMS = (2, 4)


@pytest.fixture(scope="module")
def recount(tmp_path_factory):
    """Counts of all blocks of one image's launches, and a table of one line."""
    folder: Path = tmp_path_factory.mktemp("budget")
    out = folder / "counted.csv"
    code = f"from pathlib import Path\nCASES, OUT = {CASES!r}, Path({str(out)!r})\n"
    code += f"DESCRIPTOR_PROGRAMS = {DESCRIPTOR_PROGRAMS!r}\n" + COUNTING
    return {**run_python(folder, code), "line": lambda: page.read_csv(out)[0]}


class TestCountsAreRight:
    """Bytes and operations of all blocks together are those of the arithmetic."""

    T = 64

    def test_scale_shift(self, recount):
        (launch,) = recount["counted"]["scale_shift"]
        assert launch["stored"] == 2 * self.T * C
        assert launch["loaded"] == 2 * self.T * C + launch["programs"] * 2 * 2 * C

    def test_pool_norm_forward(self, recount):
        launches = recount["counted"]["pool_norm_forward"]
        # Tokens, and the normalised rows with a standard deviation each.
        assert sum(launch["stored"] for launch in launches) == 2 * 2 * self.T * C + 4 * self.T
        assert sum(launch["loaded"] for launch in launches) >= 2 * 27 * 27 * C

    def test_pool_norm_backward(self, recount):
        launches = recount["counted"]["pool_norm_backward"]
        # Tiles at the right edge are narrower, and not all blocks are walked.
        stored = sum(launch["stored"] for launch in launches)
        assert stored == pytest.approx(2 * 27 * 27 * C, rel=0.05)
        assert sum(launch["loaded"] for launch in launches) >= 2 * 2 * self.T * C

    def test_gate_up(self, recount):
        (launch,) = recount["counted"]["gate_up"]
        assert launch["flops"] == 4 * self.T * C * H
        assert launch["stored"] == 3 * 2 * self.T * H
        m, n = launch["config"][:2]
        tiles = 2 * C * (m + 2 * n)
        assert launch["programs"] * tiles <= launch["loaded"] < 1.05 * launch["programs"] * tiles

    def test_gate_up_by_descriptors(self, recount):
        """Blocks walk every 132nd tile, down the five rows of tiles first."""
        launch = recount["by_descriptors"]
        m, n = launch["config"][:2]
        assert (m, n, launch["programs"]) == (128, 128, 132)
        whole = 3 * 2 * m * n
        # Tiles 2 and 134: the third row of the first column, the last row of the last one.
        assert launch["stored"] == {"2": 1.5 * whole, "4": 0.5 * whole}

    def test_down_gradient(self, recount):
        (launch,) = recount["counted"]["down_gradient"]
        assert launch["flops"] == 2 * self.T * H * D
        # The gradients of gate and up, the product, and float32 sums for the biases.
        assert launch["stored"] == 3 * 2 * self.T * H + 4 * 2 * H * (self.T // launch["config"][0])


def test_the_published_counts_are_fresh(recount):
    """One line is counted again; a different compiler may differ a little."""
    line = recount["line"]()
    (published,) = [
        row
        for row in page.read_csv(PUBLISHED)
        if (row["stage"], row["images"], row["side"]) == ("scale_shift", "128", "8")
    ]
    if published["triton"] == recount["triton"]:
        assert line == published
    else:
        expected = pytest.approx(int(published["warp_instructions"]), rel=0.1)
        assert int(line["warp_instructions"]) == expected


def outputs(line) -> int:
    """Return the bytes of all outputs of a published launch, sums of partial sums left out."""
    images, words = int(line["images"]), set(line["variant"].split())
    tokens = images * int(line["side"]) ** 2
    saved, product = "save" in words, "product" in words
    hidden = 2 * tokens * H
    return {
        "pool_norm_forward": 2 * tokens * C * (1 + saved) + 4 * tokens * saved,
        "pool_norm_backward": 2 * images * 27 * 27 * C,
        "norm_gradient": 4 * 2 * tokens,
        "scale_shift": 2 * tokens * C,
        "gate_up": hidden * (product + 2 * saved),
        "down_gradient": hidden * (2 + product),
        "input_gradient": 2 * tokens * C,
        "pointwise": hidden * (product + 2 * ("gradients" in words)),
    }[line["stage"]]


def test_every_published_launch_stores_its_outputs():
    """Up to what the blocks differ that are not walked: the last tiles are not whole."""
    for line in page.read_csv(PUBLISHED):
        stored = int(line["programs"]) * int(line["bytes_stored"])
        assert stored >= 0.99 * outputs(line) > 0, line
        assert stored <= 1.4 * outputs(line) or line["stage"] == "norm_gradient", line


def test_the_page_shows_the_published_table():
    text = PAGE.read_text(encoding="utf-8")
    assert page.replace_section(text, page.read_csv(PUBLISHED)) == text


def test_a_page_without_the_section_is_an_error():
    with pytest.raises(ValueError, match="lacks"):
        page.replace_section("# A page", page.read_csv(PUBLISHED))


def row(microseconds):
    """A stand-in of a launch's prediction."""
    prediction = SimpleNamespace(microseconds=microseconds)
    return SimpleNamespace(prediction=prediction, describe=lambda: "a launch")


class TestBudgets:
    def test_every_stage_has_one_with_a_reason(self):
        budgets = read_budgets()
        always_library = {"packed_down"}
        assert {stage for stage, _, _ in budgets} == set(STAGES) - always_library
        for budget in budgets.values():
            assert budget.shares, budget
            assert all(0 < share <= 1 for share in budget.shares.values()), budget
            assert budget.reason, budget

    def test_the_published_predictions_keep_them(self):
        budgets = read_budgets()
        lines = page.read_csv(PUBLISHED)
        for line in lines:
            key = line["stage"], line["variant"], int(line["images"])
            assert float(line["share"]) >= float(line["budget"]), line
            assert float(line["budget"]) == budgets[key].shares[int(line["side"])]
            assert line["target"] == str(budgets[key].target or "")
        shown = {(line["stage"], line["variant"], int(line["images"])) for line in lines}
        assert shown <= budgets.keys()

    def test_a_stage_below_its_share_is_a_fault(self):
        budget = Budget("gate_up", "product", 1, {8: 0.5}, 0.9, "a reason")
        case = Case("gate_up", "product", 1, 8)
        assert Verdict(case, budget, [row(10.0)], limit=5.0).fault == ""
        late = Verdict(case, budget, [row(10.0), row(10.0)], limit=9.0)
        assert late.microseconds == 20
        assert "0.450 of the limit of 9.0 us, and 0.5 is stated" in late.fault

    @pytest.mark.parametrize(
        ("release", "share", "expected"),
        [
            ("3.7.1", 0.49, False),
            ("3.9.0", 0.49, True),
            ("3.9.0", 0.44, False),
            ("3.9.0", 0.5, False),
        ],
    )
    def test_a_little_less_by_another_compiler_is_told_apart(
        self, monkeypatch, release, share, expected
    ):
        monkeypatch.setattr(versions, "version", lambda package: release)
        budget = Budget("gate_up", "product", 1, {8: 0.5}, 0.9, "a reason")
        verdict = Verdict(Case("gate_up", "product", 1, 8), budget, [row(10.0)], limit=10 * share)
        assert bool(verdict.fault) == (share < 0.5)
        assert verdict.is_of_another_compiler == expected

    def test_the_published_counts_are_of_the_compiler_of_the_budgets(self):
        for line in page.read_csv(PUBLISHED):
            assert line["triton"].startswith(f"{table.COUNTED_WITH}.")

    def test_accepted_budgets_are_the_predictions_less_a_margin(self, tmp_path):
        path = tmp_path / "budgets.csv"
        path.write_bytes(table.BUDGETS.read_bytes())
        before = read_budgets()
        judged = [
            Verdict(Case(b.stage, b.variant, b.images, 8), b, [row(10.0)], limit=5.0)
            for b in before.values()
        ]
        table.write_budgets(judged, path)
        for key, budget in read_budgets(path).items():
            assert budget == replace(before[key], shares={8: 0.485})


class TestCommand:
    @pytest.fixture
    def judged(self, monkeypatch):
        """The verdicts that the command gets; one keeps its budget."""
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(command, "set_target", lambda architecture: None)
        budget = read_budgets()["scale_shift", "", 128]
        good = Verdict(Case("scale_shift", "", 128, 8), budget, [row(10.0)], limit=9.9)
        judged = [good]
        monkeypatch.setattr(command, "verdicts", lambda architecture: judged)
        return judged

    def test_budgets_that_are_kept_are_exit_code_0(self, judged, capsys):
        assert command.main([]) == 0
        printed = capsys.readouterr().out
        assert "a launch  0.990 of its limit, budget 0.97" in printed
        assert "1 predictions: 0 over their budget" in printed

    def test_a_little_over_by_another_compiler_is_said(self, judged, capsys, monkeypatch):
        for module in versions, table:
            monkeypatch.setattr(module, "version", lambda package: "3.9.0")
        judged.append(replace(judged[0], limit=9.6))
        assert command.main([]) == 0
        printed = capsys.readouterr().out
        assert "over its budget: 0.960 of the limit" in printed
        assert "2 predictions: 0 over their budget\n1 a little worse by Triton 3.9.0" in printed

    def test_one_that_is_not_is_exit_code_1(self, judged, capsys):
        judged.append(replace(judged[0], limit=1.0))
        assert command.main([]) == 1
        printed = capsys.readouterr().out
        assert "over its budget: 0.100 of the limit" in printed
        assert "2 predictions: 1 over their budget" in printed

    def test_a_page_needs_a_table(self, capsys):
        with pytest.raises(SystemExit) as exited:
            command.main(["--page", "docs/kernels.md"])
        assert exited.value.code == 2
        assert "--csv" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--csv", "x.csv", "--page", "README.md"], "--page: expected a page with a section"),
            (["--csv", "x.csv", "--page", "nowhere.md"], "--page: expected a page with a section"),
            (["--csv", "docs"], "--csv: expected a file to write, got the folder 'docs'"),
            (["--csv", "README.md/x.csv"], "--csv: expected a file to write, got 'README.md/x.csv"),
            (["--architecture", "sm_75"], "--architecture: invalid choice: 'sm_75'"),
        ],
    )
    def test_misuse_is_refused_before_anything_is_compiled(
        self, arguments, message, capsys, monkeypatch
    ):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(command, "set_target", lambda architecture: pytest.fail("compiles"))
        with pytest.raises(SystemExit) as exited:
            command.main(arguments)
        assert exited.value.code == 2
        assert message in capsys.readouterr().err

    @pytest.mark.usefixtures("judged")
    def test_the_interpreter_is_refused(self, capsys, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(SystemExit) as exited:
            command.main([])
        assert exited.value.code == 2
        assert "TRITON_INTERPRET" in capsys.readouterr().err

    @pytest.mark.usefixtures("judged")
    def test_the_folder_of_the_table_is_made(self, monkeypatch, tmp_path):
        written = []
        monkeypatch.setattr(command, "write_csv", lambda path, *_: written.append(path))
        path = tmp_path / "new" / "folder" / "kernels.csv"
        assert command.main(["--csv", str(path)]) == 0
        assert written == [path]
        assert path.parent.is_dir()


class TestLimits:
    GPU = REFERENCE_GPUS["sm_90"]

    @pytest.mark.parametrize(
        ("stage", "variant", "side", "microseconds"),
        [
            # Bytes over 4300 GB/s, or operations over 770 TFLOP/s.
            ("pool_norm_forward", "adaptive norm", 16, 128 * (729 + 256) * C * 2 / 4.3e6),
            ("pool_norm_forward", "adaptive norm save", 16, 128 * (729 + 512) * C * 2 / 4.3e6),
            ("pool_norm_backward", "adaptive norm", 8, 128 * (729 + 128) * C * 2 / 4.3e6),
            ("gate_up", "bias product save", 16, 4 * 32768 * C * H / 770e6),
            ("down_gradient", "product bias", 16, 2 * 32768 * D * H / 770e6),
            ("input_gradient", "", 12, 4 * 18432 * C * H / 770e6),
            ("pointwise", "product", 16, 3 * 32768 * H * 2 / 4.3e6),
            ("pointwise", "gradients product bias", 16, 6 * 32768 * H * 2 / 4.3e6),
            ("pointwise", "gradients", 16, 5 * 32768 * H * 2 / 4.3e6),
            ("scale_shift", "", 16, 2 * 32768 * C * 2 / 4.3e6),
        ],
    )
    def test_each_is_its_arithmetic(self, stage, variant, side, microseconds):
        assert Case(stage, variant, 128, side).limit(self.GPU) == pytest.approx(microseconds)

    def test_a_small_product_is_bound_by_its_weights(self):
        limit = Case("gate_up", "bias product", 1, 8).limit(self.GPU)
        assert limit == pytest.approx((64 * (C + H) + 2 * C * H) * 2 / 4.3e6)


def test_walked_blocks_are_of_the_grid():
    for programs, images in ((1, 1), (3, 1), (128, 128), (1000, 128), (2048, 128)):
        walked = table.walked_programs(programs, Case("gate_up", "", images, 8))
        assert len(walked) == len(set(walked)) >= 1
        assert all(0 <= program < programs for program in walked)


def test_architectures_without_facts_have_no_predictions():
    assert table.verdicts("sm_120") == []
