"""The walk of machine code: control flow, memory, counts, and the clock of a block."""

from __future__ import annotations

import pytest

from tests.kernels.budget.code import assemble, launch_of, table, values_after
from tokenflex_kernels.budget.state import (
    LATENCY,
    Buffer,
    DependsOnDataError,
    Launch,
    TensorMap,
)
from tokenflex_kernels.budget.walk import walk

X, Y = Launch.address(0), Launch.address(1)
# R2:R3 is the argument plus 16 bytes a lane.
LANE = [
    "S2R R0, SR_TID.X",
    "MOV R8, c[0x0][0x210]",
    "MOV R9, c[0x0][0x214]",
    "IMAD.WIDE R2, R0, 0x10, R8",
]


def totals_of(*lines, **options):
    return walk(launch_of(*lines, **options), 0)


class TestParsing:
    def test_an_instruction_has_its_parts(self):
        (load,) = assemble("@!P3 LDG.E.128.CONSTANT R4, desc[UR6][R2.64+-0x10]")
        assert (load.name, load.opcode, load.num_bytes, load.pipe) == (
            "LDG.E.128.CONSTANT", "LDG", 16, "global",
        )  # fmt: skip
        assert load.guard is not None
        assert (load.guard.name, load.guard.inverted) == ("P3", True)
        (base, _), (offset, _) = load.operands[1].terms
        assert (base.name, base.wide, offset.number) == ("R2", True, 2**32 - 16)

    @pytest.mark.parametrize(
        ("line", "pipe"),
        [
            ("FFMA R1, R2, R3, R4", "float"),
            ("IMAD.MOV.U32 R1, RZ, RZ, R4", "imad"),
            ("LOP3.LUT R1, R2, R3, R4, 0xc0, !PT", "integer"),
            ("I2FP.F32.S32 R1, R2", "integer"),
            ("I2F.RP R1, R2", "special"),
            ("MUFU.EX2 R1, R2", "special"),
            ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "global"),
            ("LDGDEPBAR", "control"),
            ("LDSM.16.M88.4 R4, [R1]", "shared"),
            ("SHFL.BFLY PT, R4, R5, 0x1, 0x1f", "shared"),
            ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "tensor"),
            ("UIADD3 UR4, UR4, 0x1, URZ", "uniform"),
            ("REDUX.MAX.S32 UR28, R10", "special"),
            ("UTMALDG.2D [UR8], [UR4]", "global"),
            ("REDG.E.ADD.F32 [R2.64], R4", "global"),
            ("LD.E R4, [R2.64]", "global"),
            ("STL [R1], R4", "global"),
            ("ATOMS.ADD R4, [R2], R5", "shared"),
            ("LDC R1, c[0x0][0x28]", "integer"),
            ("ULDC.64 UR4, c[0x0][0x28]", "uniform"),
            ("BRA 0x10", "control"),
        ],
    )
    def test_each_has_a_pipe(self, line, pipe):
        assert assemble(line)[0].pipe == pipe


class TestControl:
    def test_a_loop_is_walked_as_often_as_it_runs(self):
        lines = [
            "MOV R1, RZ",
            "IADD3 R1, R1, 0x1, RZ",
            "ISETP.LT.AND P0, PT, R1, c[0x0][0x210], PT",
            "@P0 BRA 0x10",
        ]
        assert totals_of(*lines, arguments=[7]).issued == 1 + 3 * 7 + 1
        assert totals_of(*lines, arguments=[7], num_warps=4).issued == 4 * (1 + 3 * 7 + 1)

    def test_warps_part_and_meet_again(self):
        lines = [
            "S2R R0, SR_TID.X",
            "ISETP.GE.AND P0, PT, R0, 0x20, PT",  # all but the first warp
            "@P0 BRA 0x50",
            "FADD R1, R1, R1",
            "FADD R1, R1, R1",
            "FMUL R1, R1, R1",
        ]
        counted = totals_of(*lines, num_warps=4)
        assert counted.instructions["float"] == 2 + 4
        assert counted.issued == 4 * 3 + 2 + 4 + 4

    def test_lanes_of_a_warp_part_and_meet_again(self):
        lines = [
            "S2R R0, SR_TID.X",
            "ISETP.NE.AND P0, PT, R0, RZ, PT",  # all but one lane
            "@P0 BRA 0x40",
            "FADD R1, R1, R1",
            "FMUL R1, R1, R1",
        ]
        counted = totals_of(*lines, num_warps=2)
        assert counted.instructions["float"] == 1 + 2

    def test_what_a_guard_stops_still_issues_but_moves_nothing(self):
        lines = [*LANE, "ISETP.LT.AND P0, PT, R0, 0x8, PT", "@P0 STG.E.128 [R2.64], R4"]
        counted = totals_of(*lines, arguments=[X], buffers=[Buffer(512)], num_warps=2)
        assert counted.instructions["global"] == 2
        assert counted.stored == 8 * 16

    def test_registers_keep_what_other_lanes_wrote(self):
        values = values_after(
            "S2R R0, SR_TID.X", "MOV R1, 0x5", "ISETP.LT.AND P0, PT, R0, 0x8, PT", "@P0 MOV R1, R0"
        )
        assert values["R1"].tolist() == [*range(8), *[5] * 24]

    def test_a_branch_on_data_is_an_error(self):
        lines = [*LANE, "LDG.E R4, [R2.64]", "ISETP.GT.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x0"]
        with pytest.raises(DependsOnDataError, match="depends on data"):
            totals_of(*lines, arguments=[X], buffers=[Buffer(512)])

    @pytest.mark.parametrize(
        "access",
        [
            "@P0 STG.E [R2.64], R4",
            "@P0 LDG.E R5, [R2.64]",
            "@P0 LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]",
            "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64], P0",
            "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64], !P0",
            "@P0 STS [R0.X4], R5",
            "@P0 STL [RZ], R5",
            "@P0 HMMA.16816.F32.BF16 R8, R12, R16, R8",
            "@P0 DEPBAR.LE SB0, 0x0",
            "@P0 BAR.SYNC.DEFER_BLOCKING 0x0",
        ],
    )
    @pytest.mark.parametrize("compared", ["R4", "R5", "R0"])
    def test_an_access_that_depends_on_data_is_an_error(self, access, compared):
        """On data in all lanes (R4), in one of them (R5), and in none (R0)."""
        lines = [
            *LANE,
            "FADD R4, R4, R4",
            "ISETP.EQ.AND P1, PT, R0, 0x7, PT",
            "MOV R5, 0x1",
            "@P1 FADD R5, R4, R4",
            f"ISETP.GT.AND P0, PT, {compared}, RZ, PT",
        ]
        launch = launch_of(*lines, access, arguments=[X], buffers=[Buffer(512)])
        if compared == "R0":
            walk(launch, 0)
            return
        with pytest.raises(DependsOnDataError, match=r"access depends on data.*P0"):
            walk(launch, 0)

    def test_words_that_spill_keep_their_values(self):
        """ptxas of Triton 3.9 spills an address of the down gradient."""
        values = values_after(
            "S2R R0, SR_TID.X", "MOV R1, 0x1000", "MOV R5, 0x7", "MOV R4, R0",
            "ISETP.LT.AND P0, PT, R0, 0x8, PT",
            "STL [R1+-0x4], RZ", "STL.64 [R1+-0x10], R4", "@P0 STL [R1+-0xc], R0",
            "LDL.64 R6, [R1+-0x10]", "LDL R8, [R1+-0x4]", "LDL R9, [R1+-0x8]",
        )  # fmt: skip
        assert values["R6"].tolist() == list(range(32))
        assert values["R7"].tolist() == [*range(8), *[7] * 24]
        assert not values["R8"].any()
        assert values.get("R9") is None

    @pytest.mark.parametrize("line", ["STL [R0], R4", "LDL R4, [R0]", "LDL.U8 R4, [RZ]"])
    def test_words_of_a_stack_at_different_places_are_an_error(self, line):
        with pytest.raises(RuntimeError, match="a stack that the walk cannot follow"):
            totals_of("S2R R0, SR_TID.X", line)

    @pytest.mark.parametrize(
        "line",
        [
            "LD.E R5, [R2.64]",
            "ST.E [R2.64], R5",
            "ATOM.E.ADD R5, [R2.64], R4",
            "ATOMG.E.ADD R5, [R2.64], R4",
            "ATOMS.ADD R5, [R0], R4",
            "RED.E.ADD [R2.64], R4",
            "REDG.E.ADD.F32.FTZ.RN [R2.64], R4",
            "LDGMC.E.ADD R5, [R2.64]",
            "UBLKCP [UR8], [UR4], UR12",
            "UTMAREDG.2D.ADD [UR8], [UR4]",
            "UTMAPF.2D [UR8], [UR4]",
            "IMMA.16832.S8.S8 R8, R12, R16, R8",
            "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0",
        ],
    )
    @pytest.mark.parametrize("guard", ["", "@P0 "])
    def test_memory_and_tensor_cores_that_it_cannot_count_are_an_error(self, line, guard):
        known = ["ISETP.GE.AND P0, PT, R0, RZ, PT"]
        options = {"arguments": [X], "buffers": [Buffer(512)]}
        with pytest.raises(RuntimeError, match=rf"cannot count: {guard}{line.split()[0]}"):
            totals_of(*LANE, *known, guard + line, **options)
        if guard:
            with pytest.raises(DependsOnDataError, match="P0"):
                totals_of(*LANE, "FSETP.GT.AND P0, PT, R4, R5, PT", guard + line, **options)

    @pytest.mark.parametrize(
        "lines",
        [
            ["@P1 MOV R1, 0x6", "ISETP.EQ.AND P0, PT, R1, 0x6, PT", "@P0 BRA 0xa0"],
            ["@P1 IADD3 R1, R1, 0x1, RZ", "ISETP.EQ.AND P0, PT, R1, 0x6, PT", "@P0 BRA 0xa0"],
            ["@P1 ISETP.EQ.AND P0, PT, RZ, RZ, PT", "NOP", "@P0 BRA 0xa0"],
            ["VOTEU.ANY UP1, P1", "PLOP3.LUT P0, PT, PT, PT, UP1, 0x80, 0x0", "@P0 BRA 0xa0"],
            ["VOTEU.ALL UP1, P1", "PLOP3.LUT P0, PT, PT, PT, UP1, 0x80, 0x0", "@P0 BRA 0xa0"],
            ["VOTEU.ANY UR4, UPT, P1", "ISETP.EQ.AND P0, PT, RZ, UR4, PT", "@P0 BRA 0xa0"],
            ["SHFL.IDX PT, R1, R0, R5, 0x1f", "ISETP.EQ.AND P0, PT, R1, RZ, PT", "@P0 BRA 0xa0"],
            ["FCHK P0, R4, R4", "NOP", "@P0 BRA 0xa0"],
        ],
    )
    @pytest.mark.parametrize("everywhere", [True, False])
    def test_a_branch_on_what_data_may_have_changed_is_an_error(self, lines, everywhere):
        """P1 and R5 depend on data in all lanes, or in the seventh only."""
        guard = "" if everywhere else "@P2 "
        before = [
            "S2R R0, SR_TID.X",
            "ISETP.EQ.AND P2, PT, R0, 0x7, PT",
            "ISETP.EQ.AND P1, PT, RZ, RZ, PT",
            "MOV R5, RZ",
            f"{guard}FADD R5, R4, R4",
            f"{guard}FSETP.GT.AND P1, PT, R4, R4, PT",
            "MOV R1, 0x5",
        ]
        with pytest.raises(DependsOnDataError, match="a branch depends on data"):
            totals_of(*before, *lines)

    def test_lanes_that_take_no_part_in_a_vote_may_depend_on_data(self):
        lines = [
            "S2R R0, SR_TID.X",
            "ISETP.LT.AND P2, PT, R0, 0x8, PT",
            "FSETP.GT.AND P1, PT, R4, R4, PT",
            "@P2 ISETP.EQ.AND P1, PT, RZ, RZ, PT",
            "@!P2 EXIT",
            "VOTEU.ALL UP1, P1",
            "PLOP3.LUT P0, PT, PT, PT, UP1, 0x80, 0x0",
            "@P0 BRA 0x90",
            "FADD R1, R1, R1",
        ]
        assert totals_of(*lines).instructions["float"] == 0

    def test_a_register_that_a_warp_shares_is_written_for_all_its_lanes(self):
        lines = [
            "S2R R0, SR_TID.X",
            "ISETP.EQ.AND P0, PT, R0, 0x27, PT",
            "MOV R1, 0x100",
            "@P0 R2UR UR4, R1",
        ]
        values = values_after(*lines, num_warps=2)["UR4"]
        assert (values[:32] < 0).all()
        assert (values[32:] == 0x100).all()

    def test_a_bulk_copy_of_a_size_that_depends_on_data_is_an_error(self):
        expect = "SYNCS.ARRIVE.TRANS64 RZ, [UR4], R4"
        assert totals_of("MOV R4, 0x40", expect).loaded == 32 * 64
        for lines in (
            ["FADD R4, R5, R5"],
            [*LANE, "MOV R4, 0x40", "ISETP.EQ.AND P0, PT, R0, 0x7, PT", "@P0 FADD R4, R5, R5"],
        ):
            with pytest.raises(DependsOnDataError, match="bytes of a copy depend on data"):
                totals_of(*lines, expect)

    def test_a_branch_on_a_table_is_followed(self):
        lines = [
            "MOV R8, c[0x0][0x210]",
            "MOV R9, c[0x0][0x214]",
            "LDG.E R4, desc[UR4][R8.64+0x4]",
            "FADD R1, R1, R1",
            "IADD3 R4, R4, -0x1, RZ",
            "ISETP.GT.AND P0, PT, R4, RZ, PT",
            "@P0 BRA 0x30",
        ]
        counted = totals_of(*lines, arguments=[X], buffers=[table([9, 3])])
        assert counted.instructions["float"] == 3
        assert counted.loaded == 0  # tables are not data

    def test_a_branch_on_the_largest_number_of_a_warp_is_followed(self):
        """ptxas of Triton 3.9 reduces a bound of a loop so, which all lanes have."""
        lines = [
            "S2R R0, SR_TID.X",
            "REDUX.MAX.S32 UR4, R0",
            "FADD R1, R1, R1",
            "UIADD3 UR4, UR4, -0x8, URZ",
            "UISETP.GE.AND UP0, UPT, UR4, URZ, UPT",
            "PLOP3.LUT P4, PT, PT, PT, UP0, 0x80, 0x0",
            "@P4 BRA 0x20",
        ]
        assert totals_of(*lines).instructions["float"] == 4  # 31, 23, 15, 7
        assert totals_of(*lines, num_warps=2).instructions["float"] == 4 + 8

    @pytest.mark.parametrize(
        ("reduction", "expected"),
        [
            ("REDUX.MAX.S32", 2),
            ("REDUX.MIN.S32", -5),
            ("REDUX.MAX", -1),
            ("REDUX.MIN", 0),
            ("REDUX.SUM", -12),
            ("REDUX", 0),
            ("REDUX.OR", -1),
            ("REDUX.XOR", -5 ^ -4 ^ -3 ^ -2 ^ -1 ^ 0 ^ 1 ^ 2),
        ],
    )
    def test_numbers_of_the_active_lanes_are_reduced(self, reduction, expected):
        values = values_after(
            "S2R R0, SR_TID.X",
            "IADD3 R1, R0, -0x5, RZ",  # from -5 to 26
            "ISETP.LT.AND P0, PT, R0, 0x8, PT",
            f"@P0 {reduction} UR4, R1",
        )
        assert values["UR4"][:8].tolist() == [expected % 2**32] * 8

    def test_a_branch_on_what_data_add_to_such_a_number_is_an_error(self):
        lines = [
            *LANE,
            "LDG.E R4, [R2.64]",
            "REDUX.MAX.S32 UR4, R4",
            "UISETP.GE.AND UP0, UPT, UR4, URZ, UPT",
            "PLOP3.LUT P4, PT, PT, PT, UP0, 0x80, 0x0",
            "@P4 BRA 0x0",
        ]
        with pytest.raises(DependsOnDataError, match="depends on data"):
            totals_of(*lines, arguments=[X], buffers=[Buffer(512)])

    def test_no_end_is_an_error(self):
        with pytest.raises(RuntimeError, match="no end after 50"):
            walk(launch_of("BRA 0x0"), 0, limit=50)

    def test_the_program_has_its_number(self):
        launch = launch_of("S2R R0, SR_CTAID.X", "ISETP.EQ.AND P0, PT, R0, 0x2, PT",
                           "@!P0 EXIT", "FADD R1, R1, R1", programs=3)  # fmt: skip
        assert [walk(launch, program).instructions["float"] for program in range(3)] == [0, 0, 1]


class TestMemory:
    def test_bytes_and_sectors_of_loads(self):
        counted = totals_of(*LANE, "LDG.E.128 R4, [R2.64]", arguments=[X], buffers=[Buffer(512)])
        assert (counted.loaded, counted.sectors) == (512, 16)
        counted = totals_of(*LANE, "LDG.E R4, [R2.64]", arguments=[X], buffers=[Buffer(512)])
        assert (counted.loaded, counted.sectors) == (128, 16)

    def test_a_load_across_sectors_touches_both(self):
        lines = [*LANE, "LDG.E.128 R4, [R2.64+0x8]"]
        counted = totals_of(*lines, arguments=[X], buffers=[Buffer(520)])
        assert counted.sectors == 17

    @pytest.mark.parametrize("instruction", ["LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4"])
    def test_an_access_beyond_a_buffer_is_an_error(self, instruction):
        with pytest.raises(RuntimeError, match="bytes 0 to 512 of a buffer of 511"):
            totals_of(*LANE, instruction, arguments=[X], buffers=[Buffer(511)])

    def test_guards_that_a_register_holds_stop_an_access(self):
        """ptxas of Triton 3.8 keeps them as bits of a register that nothing has written before."""
        lines = [
            *LANE,
            "ISETP.GE.AND P0, PT, R0, 0x8, PT",
            "LOP3.LUT R20, R20, 0xfffffffd, RZ, 0xc0, !PT",
            "@P0 LOP3.LUT R20, R20, 0x2, RZ, 0xfc, !PT",
            "LOP3.LUT P4, RZ, R20, 0x2, RZ, 0xc0, !PT",
            "@!P4 STG.E.128 [R2.64], R4",
        ]
        assert totals_of(*lines, arguments=[X], buffers=[Buffer(128)]).stored == 128

    @pytest.mark.parametrize(
        "access",
        [
            "LDG.E.128 R4, [R2.64]",
            "STG.E.128 [R2.64], R4",
            "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]",
            "LDS R4, [R2]",
            "STS.128 [R2], R4",
            "LDSM.16.M88.4 R4, [R2]",
            "STSM.16.M88.4 [R2], R4",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], RZ",
        ],
    )
    @pytest.mark.parametrize("lane", [0, 7, None])
    def test_an_address_that_depends_on_data_is_an_error(self, access, lane):
        """In one lane, or in all."""
        guard = "" if lane is None else "@P0 "
        lines = [*LANE, f"ISETP.EQ.AND P0, PT, R0, {lane or 0:#x}, PT", f"{guard}FADD R2, R2, R2"]
        options = {"arguments": [X], "buffers": [Buffer(1024)]}
        with pytest.raises(DependsOnDataError, match="an address depends on data"):
            totals_of(*lines, access, **options)
        totals_of(*lines[:-1], access, **options)

    def test_words_that_spill_are_no_traffic_of_global_memory(self):
        spilled = ["MOV R1, 0x1000", "STL [R1+-0x8], R5", "LDL R4, [R1+-0x8]"]
        counted = totals_of(*spilled, "FADD R4, R4, R4")
        assert counted.instructions["global"] == 2
        assert (counted.loaded, counted.stored, counted.sectors) == (0, 0, 0)
        assert counted.cycles > LATENCY["repeated"]

    def test_an_access_of_no_buffer_is_an_error(self):
        with pytest.raises(RuntimeError, match="outside of all buffers"):
            totals_of(*LANE, "LDG.E R4, [R2.64]", arguments=[Y], buffers=[Buffer(512)])

    @pytest.mark.parametrize(
        ("line", "cycles"),
        [
            ("LDS R4, [R0.X4]", 1),  # 4 bytes apart: one cycle
            ("LDS R4, [R0.X8]", 2),  # every other bank
            ("LDS R4, [R5]", 32),  # one bank
            ("LDS R4, [UR4]", 1),  # one word for all
            ("LDS.128 R4, [R0.X16]", 4),
            ("STS.128 [R0.X16], R4", 4),
            ("LDSM.16.M88.4 R4, [R0.X16]", 4),  # rows of 16 bytes side by side
            ("LDSM.16.M88.4 R4, [R5]", 32),  # rows in one group of banks
        ],
    )
    def test_cycles_of_shared_memory(self, line, cycles):
        setup = ["S2R R0, SR_TID.X", "UMOV UR4, 0x100", "IMAD.SHL.U32 R5, R0, 0x80, RZ"]
        assert totals_of(*setup, line).shared_cycles == cycles

    def test_a_copy_to_shared_memory_counts_where_its_predicate_holds(self):
        lines = [
            *LANE,
            "ISETP.LT.AND P0, PT, R0, 0x4, PT",
            "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64], P0",
        ]
        counted = totals_of(*lines, arguments=[X], buffers=[Buffer(64)])
        assert (counted.loaded, counted.sectors) == (64, 2)


class TestClock:
    def test_a_result_is_waited_for(self):
        chain = totals_of(*LANE, "LDG.E R4, [R2.64]", "FADD R5, R4, R4",
                          arguments=[X], buffers=[Buffer(512)]).cycles  # fmt: skip
        free = totals_of(*LANE, "LDG.E R4, [R2.64]", "FADD R5, R7, R7",
                         arguments=[X], buffers=[Buffer(512)]).cycles  # fmt: skip
        assert chain - free == pytest.approx(LATENCY["global"], abs=2)

    def test_loads_overlap_until_they_are_used(self):
        def cycles(loads):
            lines = [f"LDG.E R{4 + k}, [R2.64]" for k in range(loads)]
            return totals_of(*LANE, *lines, "FADD R5, R4, R4",
                             arguments=[X], buffers=[Buffer(512)]).cycles  # fmt: skip

        assert cycles(8) - cycles(1) < 10

    def test_what_a_block_has_loaded_before_is_near(self):
        lines = [*LANE, "LDG.E R4, [R2.64]", "FADD R5, R4, R4"]
        options = {"arguments": [X], "buffers": [Buffer(512)]}
        once = totals_of(*lines, **options).cycles
        twice = totals_of(*lines, "LDG.E R6, [R2.64]", "FADD R5, R6, R6", **options).cycles
        assert twice - once == pytest.approx(LATENCY["repeated"], abs=10)

    def test_a_wait_leaves_as_many_groups_as_it_says(self):
        copy = "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]"
        lines = [*LANE, copy, "LDGDEPBAR", "NANOSLEEP 0x1", copy, "LDGDEPBAR"]

        def cycles(pending):
            wait = f"DEPBAR.LE SB0, {pending:#x}"
            return totals_of(*lines, wait, arguments=[X], buffers=[Buffer(512)]).cycles

        assert cycles(2) < LATENCY["global"] < cycles(1) < cycles(0)

    def test_products_follow_each_other_on_the_tensor_cores(self):
        product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
        lines = [product, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
        counted = totals_of(*lines, num_warps=8)
        flops = 2 * 64 * 128 * 16
        assert counted.flops == 2 * 2 * flops  # two groups of four warps
        assert counted.shared_cycles == 2 * 2 * (64 + 128) * 16 * 2 / 128
        assert counted.cycles == pytest.approx(counted.flops / 4096 + LATENCY["tensor"], abs=6)

    def test_an_operand_in_registers_does_not_load_shared_memory(self):
        product = "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
        assert totals_of(product, num_warps=4).shared_cycles == 128 * 16 * 2 / 128

    def test_a_bulk_copy_is_waited_for_at_its_barrier(self):
        lines = [
            "UMOV UR8, 0x400",
            "UMOV UR9, 0x8000",
            "MOV R5, 0x4000",
            "S2R R0, SR_TID.X",
            "ISETP.NE.AND P1, PT, R0, RZ, PT",
            "@!P1 SYNCS.ARRIVE.TRANS64 RZ, [UR9], R5",
            "@!P1 UTMALDG.2D [UR8], [UR4]",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], RZ",
            "@!P0 BRA 0x70",
        ]
        counted = totals_of(*lines)
        assert counted.loaded == 0x4000
        assert counted.cycles > LATENCY["global"]

    def test_a_bulk_copy_is_waited_for_at_the_barrier_of_its_warp(self):
        """Each warp has its own in UR9; the second alone copies, and waits."""
        lines = [
            "S2R R0, SR_TID.X",
            "ISETP.GE.AND P1, PT, R0, 0x20, PT",
            "R2UR UR8, R0",
            "R2UR UR9, R0",
            "@P1 UTMALDG.2D [UR8], [UR4]",
        ]
        own = "@P1 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], RZ"
        other = "@!P1 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], RZ"
        assert totals_of(*lines, own, num_warps=2).cycles > LATENCY["global"]
        assert totals_of(*lines, other, num_warps=2).cycles < LATENCY["global"]

    def test_a_bulk_copy_to_a_barrier_that_depends_on_data_is_an_error(self):
        with pytest.raises(DependsOnDataError, match="an address depends on data: UTMALDG"):
            totals_of("UMOV UR8, 0x400", "FADD R5, R5, R5", "R2UR UR9, R5",
                      "UTMALDG.2D [UR8], [UR4]")  # fmt: skip


class TestBulkStores:
    """Of boxes of 16 x 64 elements of 2 bytes, to a tensor of 100 x 96."""

    MAPS = {1 << 60: TensorMap((100, 96), (16, 64), 2)}
    STORE = "UTMASTG.2D [UR12], [UR8]"

    def counted(self, row, column, *lines, num_warps=1):
        setup = [
            "ULDC.64 UR8, c[0x0][0x210]",
            "UMOV UR12, 0x400",
            f"UMOV UR13, {column:#x}",
            f"UMOV UR14, {row:#x}",
        ]
        return totals_of(
            *setup, *lines, arguments=[1 << 60], num_warps=num_warps, tensor_maps=self.MAPS
        )

    @pytest.mark.parametrize(
        ("row", "column", "num_bytes"),
        [
            (0, 0, 16 * 64 * 2),
            (96, 0, 4 * 64 * 2),  # at the lower edge
            (80, 64, 16 * 32 * 2),  # at the right edge
            (96, 64, 4 * 32 * 2),
            (-6, -60, 10 * 4 * 2),
            (100, 0, 0),
            (0, 96, 0),
            (-16, 0, 0),
        ],
    )
    def test_the_part_within_the_tensor_is_stored(self, row, column, num_bytes):
        counted = self.counted(row, column, self.STORE)
        assert counted.stored == num_bytes
        assert counted.shared_cycles == num_bytes / 128  # read from there
        assert (counted.loaded, counted.sectors) == (0, 0)

    def test_each_warp_stores_once(self):
        chosen = ["S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", "VOTEU.ANY UP0, P0"]
        assert self.counted(0, 0, self.STORE, num_warps=4).stored == 4 * 2048
        assert self.counted(0, 0, *chosen, f"@UP0 {self.STORE}", num_warps=4).stored == 3 * 2048

    def test_a_wait_is_for_the_reading_of_shared_memory(self):
        stored = [self.STORE, "UTMACMDFLUSH"]
        free = self.counted(0, 0, *stored, "DEPBAR.LE SB0, 0x1").cycles
        waited = self.counted(0, 0, *stored, "DEPBAR.LE SB0, 0x0").cycles
        assert waited - free == pytest.approx(LATENCY["shared"] + 2048 / 128, abs=4)
        nothing = self.counted(100, 0, *stored, "DEPBAR.LE SB0, 0x0").cycles
        assert waited - nothing == pytest.approx(2048 / 128, abs=4)

    @pytest.mark.parametrize("register", ["UR8", "UR9", "UR13", "UR14"])
    def test_a_place_that_depends_on_data_is_an_error(self, register):
        lines = ["FADD R5, R5, R5", f"R2UR {register}, R5", self.STORE]
        with pytest.raises(DependsOnDataError, match="an address depends on data: UTMASTG"):
            self.counted(0, 0, *lines)

    def test_a_place_that_is_no_tensor_map_is_an_error(self):
        with pytest.raises(RuntimeError, match="no tensor map at 0x1000000000000040"):
            self.counted(0, 0, "UIADD3 UR8, UR8, 0x40, URZ", self.STORE)
