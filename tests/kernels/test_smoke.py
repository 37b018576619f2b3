"""`python -m tokenflex_kernels.smoke` without a GPU: what is checked, how, and what is kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tokenflex_kernels import smoke
from tokenflex_kernels.aot import WIDTHS
from tokenflex_kernels.journal import LOST, UNFINISHED, DeviceLost, Journal
from tokenflex_kernels.launch_configs import DTYPES, STAGES, read_table
from tokenflex_kernels.smoke import COLUMNS, Check, packing_checks, run_checks, shipped_launches


def journal_of(path):
    return Journal(path, COLUMNS, "a GPU")


def statuses(path):
    return {row["check"]: row["status"] for row in journal_of(path).rows}


def raising(error):
    def run():
        raise error

    return run


class TestRun:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "smoke.csv"

    @staticmethod
    def run(path, *checks, end=math.inf, lost=False):
        return run_checks(iter(checks), journal_of(path), end, lambda: lost)

    def test_every_check_runs_and_is_kept(self, path, capsys):
        bad = Check("bad", raising(ValueError("result 0 is off")))
        assert self.run(path, Check("good", lambda: 1e-3), bad, Check("last", lambda: 0.0)) == 1
        assert statuses(path) == {
            "good": "ok",
            "bad": "failed: ValueError: result 0 is off",
            "last": "ok",
        }
        assert "3 checks, 1 failed" in capsys.readouterr().out

    def test_another_call_runs_what_is_missing_and_remembers_failures(self, path):
        assert self.run(path, Check("bad", raising(ValueError("no")))) == 1
        never = raising(AssertionError("ran again"))
        assert self.run(path, Check("bad", never), Check("good", lambda: 0.0)) == 1
        assert statuses(path)["bad"] == "failed: ValueError: no"

    def test_without_time_the_rest_is_left_to_another_call(self, path):
        assert self.run(path, Check("one", lambda: 0.0), end=-math.inf) == UNFINISHED
        assert self.run(path, Check("one", lambda: 0.0)) == 0

    def test_a_kernel_that_ends_the_use_of_the_gpu_costs_its_own_check(self, path):
        fatal = Check("fatal", raising(RuntimeError("illegal memory access")))
        with pytest.raises(DeviceLost):
            self.run(path, fatal, Check("next", lambda: 0.0), lost=True)
        assert self.run(path, fatal, Check("next", lambda: 0.0)) == 1
        assert statuses(path)["next"] == "ok"

    def test_a_kernel_that_killed_the_process_is_not_run_again(self, path):
        journal_of(path)
        path.with_name("smoke.csv.running").write_text("fatal", encoding="utf-8")
        assert self.run(path, Check("fatal", raising(AssertionError("ran")))) == 1
        assert statuses(path) == {"fatal": f"failed: {LOST}"}


class TestLaunches:
    @pytest.mark.parametrize("architecture", ["sm_90", "sm_103"])
    def test_have_every_stage_dtype_and_config_of_the_table_once(self, architecture):
        launches = shipped_launches(architecture)
        assert len(set(launches)) == len(launches)
        assert {(launch.stage, launch.dtype) for launch in launches} == {
            (stage, dtype) for stage in STAGES for dtype in DTYPES
        }
        assert {launch.widths for launch in launches if launch.dtype == "bfloat16"} == {*WIDTHS}
        assert all(launch.every_variant for launch in launches)

    def test_another_table_is_checked_where_it_is_in_use(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TOKENFLEX_LAUNCH_CONFIGS", str(tmp_path / "table.json"))
        (tmp_path / "table.json").write_text('{"sm_90": {"stages": {}}}', encoding="utf-8")
        read_table.cache_clear()
        with pytest.raises(KeyError):
            shipped_launches("sm_90")
        read_table.cache_clear()


class TestPacking:
    def test_all_ops_agree_with_float64(self):
        checks = list(packing_checks(torch.device("cpu")))
        assert {name.split()[0] for name, _ in checks} == {"pack", "merge", "unpack"}
        assert all(check.error() <= 1e-2 for check in checks)

    @pytest.mark.parametrize("op", ["pack_embeddings", "merge_vision", "unpack_vision"])
    def test_one_number_that_is_off_is_seen(self, monkeypatch, op):
        right = getattr(smoke, op)

        def wrong(*arguments):
            result = right(*arguments)
            if result.dtype == torch.float64:  # the truth
                return result
            off = torch.zeros_like(result)
            off[3, 1000] = 0.5
            return result + off

        monkeypatch.setattr(smoke, op, wrong)
        checks = list(packing_checks(torch.device("cpu")))
        checks = [check for check in checks if check.name.startswith(op.split("_")[0])]
        assert len(checks) == 3
        for check in checks:
            with pytest.raises(ValueError, match="result 0 is off by"):
                check.error()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds: expected seconds above 0, got 0"),
        (["--seconds", "soon"], "--seconds: expected a number of seconds, got 'soon'"),
        (["--csv", "tests"], "--csv: expected a file to write, got the folder 'tests'"),
        (["--csv", "README.md"], "--csv must be a file that smoke wrote: README.md must have"),
    ],
)
def test_it_refuses_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(smoke, "setting_of_gpu", lambda: "a GPU")
    monkeypatch.setattr(smoke, "architecture", lambda device: pytest.fail("went on"))
    with pytest.raises(SystemExit) as stop:
        smoke.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_every_kernel_is_right_on_this_gpu(tmp_path):
    assert smoke.main(["--csv", str(tmp_path / "smoke.csv")]) == 0
