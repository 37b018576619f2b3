"""The table of launch configs: what is in it, how it is read, and how it is refused."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from tokenflex_kernels import launch_configs
from tokenflex_kernels.gpus import is_amd, number_of
from tokenflex_kernels.launch_configs import (
    DTYPES,
    INTERPRETER,
    PRODUCTS,
    STAGES,
    RowConfig,
    TileConfig,
    architecture,
    fits_rows,
    launch_config,
    nearest,
    parse_stage,
    read_table,
)

SHIPPED = sorted(read_table())
TILE = {**launch_config("gate_up", 1, torch.float32, INTERPRETER)._asdict(), "block_m": 64}


class TestShippedTable:
    def test_has_the_architectures_that_aot_compiles_for(self):
        assert {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950", INTERPRETER} <= set(SHIPPED)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_says_where_its_numbers_are_from(self, name):
        assert read_table()[name]["source"].strip()

    @pytest.mark.parametrize("name", SHIPPED)
    def test_answers_every_stage_and_dtype(self, name):
        stages = read_table()[name]["stages"]
        assert set(stages) == set(STAGES)
        for stage, kind in STAGES.items():
            parsed = parse_stage(stages, stage)
            assert set(parsed) == set(DTYPES)
            for buckets in parsed.values():
                for _, config in buckets:
                    assert isinstance(config, kind) or (config is None and stage in PRODUCTS)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_blocks_are_powers_of_two_and_counts_are_positive(self, name):
        stages = read_table()[name]["stages"]
        for stage in STAGES:
            for buckets in parse_stage(stages, stage).values():
                for _, config in buckets:
                    if config is None:
                        continue
                    assert config.num_warps in (1, 2, 4, 8, 16)
                    if isinstance(config, RowConfig):
                        assert min(config.rows, config.columns, config.unroll) >= 1
                        continue
                    blocks = [config.block_m, config.block_n]
                    blocks += [config.block_k] if stage in PRODUCTS else []
                    assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
                    assert config.group_m >= 1
                    assert config.num_stages >= 1

    @pytest.mark.parametrize("name", SHIPPED)
    def test_descriptors_only_where_there_is_a_copy_engine(self, name):
        stages = read_table()[name]["stages"]
        configs = [
            config
            for stage in PRODUCTS
            for buckets in parse_stage(stages, stage).values()
            for _, config in buckets
        ]
        if name == INTERPRETER or is_amd(name) or number_of(name) < 90:
            assert not any(config is not None and config.tma for config in configs)

    @pytest.mark.parametrize("name", SHIPPED)
    @pytest.mark.parametrize("stage", STAGES)
    def test_small_calls_build_no_descriptors(self, name, stage):
        for dtype in DTYPES.values():
            for rows in (1, 64, 256, 512):
                assert fits_rows(launch_config(stage, rows, dtype, name), rows)

    def test_float32_keeps_its_digits(self):
        # An IEEE product has no tensor cores: PyTorch's is the faster form of it on a GPU.
        for name in SHIPPED:
            if name != INTERPRETER:
                for stage in PRODUCTS:
                    assert launch_config(stage, 512, torch.float32, name) is None


def test_descriptors_are_for_more_than_512_rows():
    with_tma = TileConfig(**TILE)._replace(tma=True)
    assert [fits_rows(with_tma, rows) for rows in (1, 512, 513)] == [False, False, True]
    assert fits_rows(TileConfig(**TILE), 1)
    assert fits_rows(None, 1)
    assert fits_rows(launch_config("scale_shift", 1, torch.float32, INTERPRETER), 1)


class TestLookup:
    @pytest.fixture
    def table(self, monkeypatch):
        """A table of one architecture whose gate_up has three buckets for bfloat16."""
        stages = copy.deepcopy(read_table()[INTERPRETER]["stages"])
        stages["gate_up"] = {
            "bfloat16": [
                {"up_to": 64, "use": {**TILE, "block_m": 16}},
                {"up_to": 512, "use": "library"},
                {"up_to": None, "use": TILE},
            ],
            "float16,float32": [{"up_to": None, "use": "library"}],
        }
        table = {"sm_80": {"source": "a test", "stages": stages}}
        monkeypatch.setattr(launch_configs, "read_table", lambda: table)
        launch_configs._buckets.cache_clear()
        yield table
        launch_configs._buckets.cache_clear()

    @pytest.mark.parametrize(
        ("rows", "block_m"),
        [(0, 16), (1, 16), (63, 16), (64, 16), (65, None), (512, None), (513, 64), (2**40, 64)],
    )
    def test_the_first_bucket_that_is_large_enough_answers(self, table, rows, block_m):
        config = launch_config("gate_up", rows, torch.bfloat16, "sm_80")
        assert (None if config is None else config.block_m) == block_m

    def test_each_dtype_has_its_own_answer(self, table):
        assert launch_config("gate_up", 1, torch.float16, "sm_80") is None
        assert launch_config("gate_up", 1, torch.float32, "sm_80") is None
        assert launch_config("gate_up", 1, torch.bfloat16, "sm_80") is not None

    @pytest.mark.parametrize("name", SHIPPED)
    @pytest.mark.parametrize("stage", STAGES)
    def test_shipped_edges(self, name, stage):
        stages = read_table()[name]["stages"]
        for dtype, buckets in parse_stage(stages, stage).items():
            start = 0
            for up_to, config in buckets:
                last = 2**50 if up_to is None else up_to
                for rows in (start, last):
                    assert launch_config(stage, rows, DTYPES[dtype], name) == config
                start = last + 1

    def test_is_pure(self):
        calls = [(stage, 100, torch.bfloat16, name) for stage in STAGES for name in SHIPPED]
        first = [launch_config(*call) for call in calls]
        again = [launch_config(*call) for call in reversed(calls)][::-1]
        assert first == again
        assert all(a is b for a, b in zip(first, again, strict=True))

    def test_touches_no_device(self, monkeypatch):
        def fail(*args, **options):
            raise AssertionError("the device was asked")

        for name in ("get_device_capability", "current_device", "synchronize", "_lazy_init"):
            monkeypatch.setattr(torch.cuda, name, fail)
        assert launch_config("gate_up", 100, torch.bfloat16, "sm_90") is not None


class TestArchitecture:
    KNOWN = ("interpreter", "sm_100", "sm_80", "gfx950", "sm_90", "gfx942")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("sm_80", "sm_80"),
            ("sm_90", "sm_90"),
            ("sm_100", "sm_100"),
            ("interpreter", "interpreter"),
            ("sm_86", "sm_80"),
            ("sm_89", "sm_80"),
            ("sm_103", "sm_100"),
            ("sm_120", "sm_100"),
            ("sm_75", "sm_80"),  # older than all: the oldest
            ("gfx942", "gfx942"),
            ("gfx90a", "gfx942"),
            ("gfx949", "gfx942"),
            ("gfx1250", "gfx950"),
        ],
    )
    def test_the_newest_that_is_not_newer_serves(self, name, expected):
        assert nearest(name, self.KNOWN) == expected
        assert nearest(name, tuple(reversed(self.KNOWN))) == expected

    def test_a_table_without_its_vendor_is_refused(self):
        with pytest.raises(ValueError, match="no entry for gfx942 or its vendor, only sm_80"):
            nearest("gfx942", ("sm_80", "interpreter"))

    def test_an_unlisted_one_gets_its_neighbours_configs(self):
        for stage in STAGES:
            listed = launch_config(stage, 700, torch.float16, "sm_80")
            assert launch_config(stage, 700, torch.float16, "sm_86") == listed

    def test_the_cpu_is_the_interpreter(self):
        assert architecture(torch.device("cpu")) == INTERPRETER

    def test_an_amd_gpu_is_named_by_its_compiler(self, monkeypatch):
        properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
        monkeypatch.setattr(torch.version, "hip", "7.1")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        launch_configs._cuda_architecture.cache_clear()
        assert architecture(torch.device("cuda", 0)) == "gfx942"
        launch_configs._cuda_architecture.cache_clear()

    @pytest.mark.gpu
    def test_a_gpu_is_named_by_its_capability(self):
        major, minor = torch.cuda.get_device_capability()
        assert architecture(torch.device("cuda", 0)) == f"sm_{major}{minor}"


class TestMalformedTables:
    def parse(self, *buckets, stage="gate_up"):
        return parse_stage({stage: {"bfloat16,float16": list(buckets)}}, stage)

    def test_a_good_one_parses(self):
        parsed = self.parse({"up_to": 8, "use": TILE}, {"up_to": None, "use": "library"})
        expected = ((8, TileConfig(**TILE)), (None, None))
        assert parsed == {"bfloat16": expected, "float16": expected}

    @pytest.mark.parametrize("ends", [[8], [8, 16], [16, 8, None], [8, 8, None], [None, 8], []])
    def test_ends_that_do_not_rise_to_none(self, ends):
        buckets = [{"up_to": end, "use": TILE} for end in ends]
        with pytest.raises(ValueError, match=r"gate_up, bfloat16,float16: buckets must rise"):
            self.parse(*buckets)

    @pytest.mark.parametrize(
        "use",
        [
            {name: value for name, value in TILE.items() if name != "block_k"},
            {**TILE, "block_q": 3},
            launch_config("scale_shift", 1, torch.float32, INTERPRETER)._asdict(),
            {},
            "cublas",
        ],
    )
    def test_fields_that_do_not_fit(self, use):
        with pytest.raises(ValueError, match=r"gate_up, bfloat16,float16, up to 64: "):
            self.parse({"up_to": 64, "use": use}, {"up_to": None, "use": TILE})

    @pytest.mark.parametrize("bucket", [{"up_to": None}, {"use": TILE}])
    def test_a_bucket_without_its_fields(self, bucket):
        with pytest.raises(ValueError, match="gate_up, bfloat16,float16"):
            self.parse(bucket)

    @pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in PRODUCTS])
    def test_no_library_form(self, stage):
        with pytest.raises(ValueError, match=rf"{stage} has no library form.*bfloat16,float16"):
            self.parse({"up_to": None, "use": "library"}, stage=stage)

    def test_another_table_may_be_read(self, tmp_path):
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"sm_90": {"source": "x", "stages": {}}}), encoding="utf-8")
        assert read_table(path) == {"sm_90": {"source": "x", "stages": {}}}

    def test_a_variable_names_the_table_in_use(self, tmp_path, monkeypatch):
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"sm_90": {"source": "y", "stages": {}}}), encoding="utf-8")
        monkeypatch.setenv("TOKENFLEX_LAUNCH_CONFIGS", str(path))
        read_table.cache_clear()
        assert read_table() == {"sm_90": {"source": "y", "stages": {}}}
        monkeypatch.setenv("TOKENFLEX_LAUNCH_CONFIGS", "")
        read_table.cache_clear()
        assert set(read_table()) == set(SHIPPED)
