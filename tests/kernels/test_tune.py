"""`python -m tokenflex_kernels.tune` without a GPU: everything but the clock."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from tokenflex_kernels import tune
from tokenflex_kernels.gpus import shared_memory
from tokenflex_kernels.journal import UNFINISHED, Journal
from tokenflex_kernels.launch_configs import (
    NAMES,
    PRODUCTS,
    STAGES,
    TABLE_PATH,
    RowConfig,
    TileConfig,
    parse_stage,
    read_table,
)
from tokenflex_kernels.stage_calls import rows_of_stage
from tokenflex_kernels.tune import (
    BRIEF,
    FULL,
    LOST,
    SIZES,
    DeviceLost,
    OutOfTime,
    Times,
    Timing,
    buckets,
    candidate_configs,
    fastest,
    finalists,
    search,
    write_table,
)

SMALL = TileConfig(64, 64, 64, 8, 4, 3)
LARGE = TileConfig(128, 128, 64, 8, 8, 3)


def timing(config, microseconds, remark="") -> Timing:
    return Timing("gate_up", "bfloat16", 64, config, microseconds, remark)


class TestCandidates:
    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
    @pytest.mark.parametrize("stage", STAGES)
    def test_are_different_and_of_the_stages_kind(self, stage, architecture):
        configs = candidate_configs(stage, torch.bfloat16, architecture)
        assert len(configs) == len(set(configs)) > 1
        assert (None in configs) == (stage in PRODUCTS)
        for config in configs:
            assert config is None or isinstance(config, STAGES[stage])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("stage", STAGES)
    def test_those_that_are_shipped_are_tried(self, stage, dtype):
        for architecture in ("sm_80", "sm_90", "gfx942"):
            buckets = parse_stage(read_table()[architecture]["stages"], stage)[NAMES[dtype]]
            tried = candidate_configs(stage, dtype, architecture)
            assert {config for _, config in buckets} <= set(tried)

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

    @pytest.mark.parametrize("stage", PRODUCTS)
    def test_amd_has_no_copy_engine_and_less_shared_memory(self, stage):
        for config in candidate_configs(stage, torch.bfloat16, "gfx942")[1:]:
            assert not config.tma
            assert config.max_registers is None
            blocks = config.block_k * (config.block_m + config.block_n) * 2
            assert blocks <= shared_memory("gfx942")

    def test_the_down_gradient_tries_half_the_registers(self):
        configs = candidate_configs("down_gradient", torch.bfloat16, "sm_90")
        limited = [c for c in configs if c is not None and c.max_registers == 128]
        assert limited
        assert {config._replace(max_registers=None) for config in limited} < {*configs}


class FakeGpu:
    """A GPU on which a call takes the microseconds that ``cost(config, rows)`` returns.

    Args:
        cost: Of a call; 10 by default.
        results: Results of configs that do not return ones; exceptions are raised.
        left_out: Why a config is not worth measuring.
        lost_by: The config that ends all use of the GPU.
    """

    architecture = "sm_90"

    def __init__(self, cost=None, results=None, left_out=None, lost_by="none"):
        self.cost = cost or (lambda config, rows: 10.0)
        self.results, self.reasons, self.lost_by = results or {}, left_out or {}, lost_by
        self.compiled, self.timed = [], []
        self.lost = False

    def left_out(self, launches, seconds):
        if launches:
            self.compiled.append([launch.config for launch in launches])
        for launch in launches:
            yield launch, self.reasons.get(launch.config, "")

    def call(self, stage, dtype, images, out_grid):
        rows = rows_of_stage(stage, images, out_grid)

        def run(config):
            self.lost |= config == self.lost_by
            if self.lost:
                raise RuntimeError("an illegal memory access was encountered")
            result = self.results.get(config, torch.ones(3))
            if isinstance(result, Exception):
                raise result
            self.last = config, rows
            return result

        return run

    def microseconds(self, run, effort):
        run()
        self.timed.append((*self.last, effort))
        return self.cost(*self.last)

    def is_lost(self):
        return self.lost


def times_of(path=None):
    return Times(Journal(path, Timing._fields, "a GPU"))


ONE_IMAGE = SIZES[1]


class TestMeasure:
    @staticmethod
    def run(gpu, candidates, times=None, end=math.inf):
        times = times or times_of()
        return times.measure(gpu, "gate_up", "bfloat16", ONE_IMAGE, candidates, FULL, end)

    def test_every_candidate_is_timed(self):
        gpu = FakeGpu(lambda config, rows: 5.0 if config is None else 7.0)
        measured = self.run(gpu, [None, SMALL])
        assert [(one.config, one.rows, one.microseconds, one.remark) for one in measured] == [
            (None, 256, 5.0, ""),
            (SMALL, 256, 7.0, ""),
        ]

    def test_what_fails_is_marked_and_the_next_one_tried(self):
        gpu = FakeGpu(results={SMALL: RuntimeError("out of resources\nand more")})
        failed, good = self.run(gpu, [SMALL, LARGE])
        assert math.isnan(failed.microseconds)
        assert failed.remark == "RuntimeError: out of resources .. and more"
        assert good.microseconds == 10

    @pytest.mark.parametrize("wrong", [1.1, float("nan")])
    def test_a_wrong_result_is_not_timed(self, wrong):
        results = {LARGE: (torch.ones(4), torch.full((4,), wrong))}
        results[SMALL] = (torch.ones(4), torch.ones(4))
        gpu = FakeGpu(results=results)
        _, bad = self.run(gpu, [SMALL, LARGE])
        assert math.isnan(bad.microseconds)
        assert "differs" in bad.remark
        assert [config for config, *_ in gpu.timed] == [SMALL]

    def test_results_may_differ_by_rounding_and_may_be_absent(self):
        results = {c: (torch.full((4,), 1.0), None, torch.empty(0, 3)) for c in (SMALL, LARGE)}
        results[LARGE] = (torch.full((4,), 1.001), None, torch.empty(0, 3))
        assert all(one.microseconds == 10 for one in self.run(FakeGpu(results=results), results))

    def test_what_was_measured_before_is_not_again_and_still_decides_what_is_right(self, tmp_path):
        path = tmp_path / "times.csv"
        self.run(FakeGpu(), [None, SMALL], times_of(path))
        gpu = FakeGpu(results={LARGE: torch.zeros(3)})
        measured = self.run(gpu, [None, SMALL, LARGE], times_of(path))
        assert gpu.timed == []
        assert [one.microseconds for one in measured[:2]] == [10, 10]
        assert "differs" in measured[2].remark

    def test_each_time_is_on_the_disk_before_the_next_is_measured(self, tmp_path):
        path = tmp_path / "times.csv"

        def cost(config, rows):
            if config == LARGE:
                assert '""block_m"": 64' in path.read_text(encoding="utf-8")
                raise KeyboardInterrupt
            return 3.0

        with pytest.raises(KeyboardInterrupt):
            self.run(FakeGpu(cost), [SMALL, LARGE], times_of(path))
        rows = Journal(path, Timing._fields, "a GPU").rows
        assert [row["microseconds"] for row in rows] == ["3.0"]

    def test_no_time_left(self):
        gpu = FakeGpu()
        with pytest.raises(OutOfTime):
            self.run(gpu, [SMALL], end=-math.inf)
        assert gpu.timed == []

    def test_a_candidate_that_breaks_the_gpu_is_left_out_by_the_next_process(self, tmp_path):
        path = tmp_path / "times.csv"
        with pytest.raises(DeviceLost):
            self.run(FakeGpu(lost_by=SMALL), [None, SMALL, LARGE], times_of(path))
        gpu = FakeGpu(lost_by=SMALL)
        _, bad, good = self.run(gpu, [None, SMALL, LARGE], times_of(path))
        assert "illegal memory access" in bad.remark
        assert good.microseconds == 10

    def test_a_candidate_that_killed_the_process_is_left_out_by_the_next(self, tmp_path):
        path = tmp_path / "times.csv"
        times_of(path)
        key = ["gate_up", "bfloat16", json.dumps(SMALL._asdict())]
        path.with_name("times.csv.running").write_text(json.dumps(key), encoding="utf-8")
        times, arguments = times_of(path), ("gate_up", "bfloat16", [SMALL, LARGE], math.inf)
        assert finalists(FakeGpu(), times, *arguments) == [LARGE]
        assert times.remark("gate_up", "bfloat16", SMALL) == LOST


def small_configs(number):
    return [TileConfig(64, 64, 64, 8, 4, stages) for stages in range(1, number + 1)]


class TestFinalists:
    @staticmethod
    def run(gpu, candidates, times=None):
        return finalists(gpu, times or times_of(), "gate_up", "bfloat16", candidates, math.inf)

    def test_are_the_fastest_at_any_of_three_sizes_and_the_library(self):
        """Of 30, small batches like few stages, large ones many."""
        configs = small_configs(30)

        def cost(config, rows):
            stages = 100 if config is None else config.num_stages
            return 1 + abs(stages - {256: 1, 2048: 15, 32768: 30}[rows])

        gpu = FakeGpu(cost)
        chosen = self.run(gpu, [None, *configs])
        stages = [config.num_stages for config in chosen[1:]]
        assert chosen[0] is None
        assert {1, 2, 3, 4, 5, 15, 26, 27, 28, 29, 30} <= {*stages}
        assert len(stages) == 15
        assert stages == sorted(stages)
        assert {effort for *_, effort in gpu.timed} == {BRIEF}

    def test_what_spills_or_does_not_compile_is_not_run(self):
        configs = small_configs(12)
        gpu = FakeGpu(left_out=dict.fromkeys(configs[3:], "spills: 8 bytes of stack"))
        assert self.run(gpu, [None, *configs]) == [None, *configs[:3]]
        assert gpu.compiled == [configs]
        assert gpu.timed == []  # few enough to be measured in full

    def test_if_all_spill_all_are_tried(self):
        configs = small_configs(8)
        gpu = FakeGpu(left_out=dict.fromkeys(configs, "spills: 8 bytes of stack"))
        self.run(gpu, configs)
        assert {config for config, *_ in gpu.timed} == {*configs}

    def test_nothing_is_compiled_twice(self, tmp_path):
        path, configs = tmp_path / "times.csv", small_configs(8)
        first = self.run(FakeGpu(), configs, times_of(path))
        gpu = FakeGpu()
        assert self.run(gpu, configs, times_of(path)) == first
        assert (gpu.compiled, gpu.timed) == ([], [])


class TestSearch:
    STAGES = ("gate_up", "scale_shift")

    def run(self, gpu, times=None, end=math.inf, dtypes=("bfloat16", "float16")):
        written = []
        write = lambda tuned: written.append({s: list(d) for s, d in tuned.items()})  # noqa: E731
        failed = search(gpu, times or times_of(), self.STAGES, dtypes, end, write)
        return failed, written

    def test_bfloat16_of_all_stages_comes_first_and_each_result_is_written(self):
        failed, written = self.run(FakeGpu())
        assert not failed
        assert written == [
            {"gate_up": ["bfloat16"]},
            {"gate_up": ["bfloat16"], "scale_shift": ["bfloat16"]},
            {"gate_up": ["bfloat16", "float16"], "scale_shift": ["bfloat16"]},
            {"gate_up": ["bfloat16", "float16"], "scale_shift": ["bfloat16", "float16"]},
        ]

    def test_all_stages_of_a_dtype_are_compiled_at_once(self):
        gpu = FakeGpu()
        self.run(gpu)
        number = sum(
            config is not None
            for stage in self.STAGES
            for config in candidate_configs(stage, torch.bfloat16, "sm_90")
        )
        assert [len(configs) for configs in gpu.compiled] == [number, len(gpu.compiled[1])]
        assert len(gpu.compiled[1]) < number

    def test_float16_tries_the_finalists_of_bfloat16(self):
        gpu = FakeGpu(lambda config, rows: config[0] if config else 1000.0)
        times = times_of()
        self.run(gpu, times)
        of_bfloat16 = finalists(
            FakeGpu(), times, "gate_up", "bfloat16",
            candidate_configs("gate_up", torch.bfloat16, "sm_90"), math.inf,
        )  # fmt: skip
        of_float16 = finalists(FakeGpu(), times, "gate_up", "float16", of_bfloat16, math.inf)
        assert {*of_float16} <= {*of_bfloat16}
        assert len(of_bfloat16) < len(candidate_configs("gate_up", torch.bfloat16, "sm_90")) / 2

    def test_a_search_that_was_stopped_anywhere_continues_to_the_same_end(self, tmp_path):
        """Stopped after every 40th time: nothing is measured twice, and the choice is the same."""

        def cost(config, rows):
            return 5.0 + hash((config, rows)) % 1000

        whole = FakeGpu(cost)
        tuned = []
        search(whole, times_of(), self.STAGES, ["bfloat16"], math.inf, tuned.append)
        path, timed, again = tmp_path / "times.csv", [], []
        for _ in range(100):
            gpu = FakeGpu(cost)

            def limited(config, rows, gpu=gpu):
                if len(gpu.timed) > 40:
                    raise KeyboardInterrupt
                return cost(config, rows)

            gpu.cost = limited
            try:
                search(gpu, times_of(path), self.STAGES, ["bfloat16"], math.inf, again.append)
            except KeyboardInterrupt:
                timed += gpu.timed[:-1]
                continue
            timed += gpu.timed
            break
        assert again[-1] == tuned[-1]
        assert sorted(map(str, timed)) == sorted(map(str, whole.timed))

    def test_a_stage_of_which_nothing_runs_does_not_stop_the_others(self, capsys):
        configs = candidate_configs("gate_up", torch.bfloat16, "sm_90")
        gpu = FakeGpu(results=dict.fromkeys(configs, ValueError("no")))
        failed, written = self.run(gpu, dtypes=["bfloat16"])
        assert failed
        assert written == [{"scale_shift": ["bfloat16"]}]
        assert "no candidate of gate_up ran: ValueError: no" in capsys.readouterr().out


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
            (["--stages", "gate_up,nonsense"], "--stages: expected names of .* got nonsense"),
            (["--dtypes", "int8"], "--dtypes: expected names of .* got int8"),
            (["--seconds", "0"], "--seconds: expected seconds above 0, got 0"),
            (["--seconds", "nan"], "--seconds: expected seconds above 0, got nan"),
            (["--stages", ""], "--stages: expected names of .* got an empty name"),
            (["--csv", "/"], "--csv: expected a file to write, got the folder '/'"),
            (["--table", "/dev/null/x"], "--table: expected a file .* /dev/null is a file"),
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

    @pytest.fixture
    def command(self, tmp_path, monkeypatch):
        """``command(gpu, *arguments)``: the whole command on a fake GPU."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

        def run(gpu, *arguments):
            gpu.setting = "Fake GPU, torch 1"
            monkeypatch.setattr(tune, "Gpu", lambda: gpu)
            files = ["--table", str(tmp_path / "table.json"), "--csv", str(tmp_path / "tune.csv")]
            return tune.main([*files, "--stages", "scale_shift,gate_up", *arguments])

        return run

    def test_a_run_that_has_no_time_says_so_and_another_ends_it(self, command, tmp_path, capsys):
        assert command(FakeGpu(), "--seconds", "1e-9") == UNFINISHED
        assert (tmp_path / "table.json").read_bytes() == TABLE_PATH.read_bytes()
        assert "run it again" in capsys.readouterr().out
        assert command(FakeGpu()) == 0
        entry = json.loads((tmp_path / "table.json").read_text())["sm_90"]
        assert entry["source"].startswith("measured on Fake GPU, torch 1; stages that")
        again = FakeGpu()
        assert command(again) == 0
        assert (again.timed, again.compiled) == ([], [])
        assert json.loads((tmp_path / "table.json").read_text())["sm_90"] == entry

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"sm_90": {}}', '{"sm_90": {"source": "", "stages": {}}}', "\xff"]
    )
    def test_another_table_is_refused_before_anything_is_measured(
        self, command, tmp_path, capsys, text
    ):
        path, gpu = tmp_path / "table.json", FakeGpu()
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(SystemExit) as stop:
            command(gpu)
        assert stop.value.code == 2
        assert f"--table must be a table of launch configs: {path}" in capsys.readouterr().err
        assert (gpu.timed, gpu.compiled) == ([], [])

    def test_a_csv_of_another_kind_is_refused(self, command, tmp_path, capsys):
        (tmp_path / "tune.csv").write_text("a,b\n", encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            command(FakeGpu())
        assert stop.value.code == 2
        assert "--csv must be a file that tune wrote" in capsys.readouterr().err

    def test_a_lost_gpu_restarts_the_command(self, command, monkeypatch):
        started = []

        def restart(module, arguments):
            started.append((module, arguments[-2]))
            raise SystemExit

        monkeypatch.setattr(tune, "restart", restart)
        bad = candidate_configs("gate_up", torch.bfloat16, "sm_90")[3]
        with pytest.raises(SystemExit):
            command(FakeGpu(lost_by=bad), "--seconds", "100")
        assert started == [("tokenflex_kernels.tune", "--seconds")]
        assert command(FakeGpu(lost_by=bad)) == 0

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
