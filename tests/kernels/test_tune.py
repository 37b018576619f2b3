"""`python -m tokenflex_kernels.tune` without a GPU: everything but the clock."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from tokenflex_kernels import tune
from tokenflex_kernels.launch_configs import (
    PRODUCTS,
    STAGES,
    TABLE_PATH,
    RowConfig,
    TileConfig,
    parse_stage,
)
from tokenflex_kernels.tune import Timing, buckets, candidate_configs, fastest, measure, write_table

SMALL = TileConfig(64, 64, 64, 8, 4, 3)
LARGE = TileConfig(128, 128, 64, 8, 8, 3)


def timing(config, microseconds, remark="") -> Timing:
    return Timing("gate_up", "bfloat16", 64, config, microseconds, remark)


class TestCandidates:
    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
    @pytest.mark.parametrize("stage", STAGES)
    def test_are_different_and_of_the_stages_kind(self, stage, architecture):
        configs = candidate_configs(stage, torch.bfloat16, architecture)
        assert len(configs) == len(set(configs)) > 1
        assert (None in configs) == (stage in PRODUCTS)
        for config in configs:
            assert config is None or isinstance(config, STAGES[stage])

    def test_the_copy_engine_is_for_hopper_and_newer(self):
        def has_tma(architecture):
            configs = candidate_configs("gate_up", torch.float16, architecture)
            return any(config is not None and config.tma for config in configs)

        assert [has_tma(name) for name in ("sm_80", "sm_89", "sm_90", "sm_100")] == [
            *(False, False, True, True)
        ]

    def test_descriptors_of_gate_up_come_with_programs_that_walk_over_tiles(self):
        for config in candidate_configs("gate_up", torch.bfloat16, "sm_90")[1:]:
            assert (config.programs_per_sm in (1, 2)) == config.tma

    def test_the_down_gradient_is_tried_with_two_blocks_on_a_multiprocessor(self):
        configs = candidate_configs("down_gradient", torch.bfloat16, "sm_90")
        limited = [config for config in configs if config and config.max_registers == 128]
        assert {config.tma for config in limited} == {False, True}
        for config in limited:
            tiles = config.block_k * (config.block_m + config.block_n) * 2
            assert 2 * config.num_stages * tiles <= 227 * 1024

    def test_products_of_float32_are_the_librarys(self):
        assert candidate_configs("gate_up", torch.float32, "sm_90") == [None]

    def test_tiles_fit_shared_memory_and_registers(self):
        for config in candidate_configs("gate_up", torch.bfloat16, "sm_90"):
            if config is None:
                continue
            tiles = config.block_k * (config.block_m + 2 * config.block_n) * 2
            assert config.num_stages * tiles <= 227 * 1024
            assert 2 * config.block_m * config.block_n <= 128 * 32 * config.num_warps


class TestMeasure:
    @staticmethod
    def run(call, candidates, times=None):
        times = times or {}
        clocked = []

        def clock(run):
            run()
            clocked.append(1)
            return times.get(len(clocked), 10.0)

        return measure("gate_up", 64, torch.bfloat16, call, candidates, clock)

    def test_every_candidate_is_timed(self):
        measured = self.run(lambda config: torch.ones(3), [None, SMALL], {1: 5.0, 2: 7.0})
        assert [(one.config, one.microseconds, one.remark) for one in measured] == [
            (None, 5.0, ""),
            (SMALL, 7.0, ""),
        ]

    def test_what_fails_is_marked_and_the_next_one_tried(self):
        def call(config):
            if config == SMALL:
                raise RuntimeError("out of resources\nand more")
            return torch.ones(3)

        failed, good = self.run(call, [SMALL, LARGE])
        assert math.isnan(failed.microseconds)
        assert failed.remark == "RuntimeError: out of resources"
        assert good.microseconds == 10

    @pytest.mark.parametrize("wrong", [1.1, float("nan")])
    def test_a_wrong_result_is_not_timed(self, wrong):
        def call(config):
            return (torch.ones(4), torch.full((4,), wrong if config == LARGE else 1.0))

        _, bad = self.run(call, [SMALL, LARGE])
        assert math.isnan(bad.microseconds)
        assert "differs" in bad.remark

    def test_results_may_differ_by_rounding_and_may_be_absent(self):
        def call(config):
            return (torch.full((4,), 1.001 if config == LARGE else 1.0), None, torch.empty(0, 3))

        assert all(one.microseconds == 10 for one in self.run(call, [SMALL, LARGE]))


class TestFastest:
    def test_is_the_least_time_that_was_measured(self):
        slow, quick, failed = timing(None, 9), timing(SMALL, 5), timing(LARGE, math.nan, "no")
        assert fastest([slow, failed, quick]) == quick

    def test_a_tie_keeps_the_choice_of_the_size_below(self):
        measured = [timing(SMALL, 100), timing(LARGE, 99)]
        assert fastest(measured, before=SMALL).config == SMALL
        assert fastest(measured, before=None).config == LARGE

    def test_a_clear_win_changes_the_choice(self):
        assert fastest([timing(SMALL, 100), timing(LARGE, 90)], before=SMALL).config == LARGE

    def test_nothing_that_ran_is_an_error_with_the_reasons(self):
        with pytest.raises(RuntimeError, match=r"no candidate of gate_up ran: a; b"):
            fastest([timing(SMALL, math.nan, "b"), timing(LARGE, math.nan, "a")])


class TestTable:
    def test_equal_neighbours_are_one_bucket_and_the_last_has_no_end(self):
        assert buckets([(64, None), (128, None), (512, SMALL), (2048, SMALL)]) == [
            {"up_to": 128, "use": "library"},
            {"up_to": None, "use": SMALL._asdict()},
        ]

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "table.json"
        path.write_bytes(TABLE_PATH.read_bytes())
        return path

    def test_what_was_tuned_is_found_and_the_rest_stays(self, path):
        before = json.loads(path.read_text())
        write_table(path, "sm_90", "measured", {"gate_up": {"bfloat16": buckets([(64, LARGE)])}})
        after = json.loads(path.read_text())
        assert after["sm_80"] == before["sm_80"]
        assert after["sm_90"]["source"] == "measured"
        parsed = parse_stage(after["sm_90"]["stages"], "gate_up")
        assert parsed["bfloat16"] == ((None, LARGE),)
        assert parsed["float16"] == parse_stage(before["sm_90"]["stages"], "gate_up")["float16"]
        assert list(path.parent.iterdir()) == [path]

    def test_a_new_architecture_starts_from_the_nearest(self, path):
        use = RowConfig(1, 4, 2, 8, 64)
        write_table(path, "sm_89", "measured", {"scale_shift": {"float16": buckets([(8, use)])}})
        stages = json.loads(path.read_text())["sm_89"]["stages"]
        assert parse_stage(stages, "scale_shift")["float16"] == ((None, use),)
        assert set(stages) == set(STAGES)

    def test_nothing_is_written_that_could_not_be_read(self, path):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="gate_up"):
            write_table(path, "sm_90", "x", {"gate_up": {"bfloat16": [{"up_to": 3, "use": {}}]}})
        assert path.read_bytes() == before


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--stages", "gate_up,nonsense"], "--stages must be of .* got nonsense"),
            (["--dtypes", "int8"], "--dtypes must be of .* got int8"),
            pytest.param(
                [],
                "there is no CUDA device",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
            ),
        ],
    )
    def test_refuses_in_one_line(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as stop:
            tune.main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(message, error)

    @pytest.mark.gpu
    def test_measures_and_writes_one_stage(self, tmp_path, capsys):
        table = tmp_path / "table.json"
        table.write_bytes(TABLE_PATH.read_bytes())
        times = tmp_path / "times.csv"
        arguments = ["--stages", "scale_shift", "--dtypes", "bfloat16"]
        assert tune.main([*arguments, "--table", str(table), "--csv", str(times)]) == 0
        written = [e for e in json.loads(table.read_text()).values() if "measured" in e["source"]]
        assert any(entry["source"].startswith("measured on") for entry in written)
        assert times.read_text().startswith("stage,dtype,rows,config,microseconds,remark")
