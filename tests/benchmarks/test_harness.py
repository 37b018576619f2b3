"""One case and its variants: what is called, checked, counted and written."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness, timing
from benchmarks.harness import COLUMNS, MODES, NO_TIME, Deadline, Variant, relative_error, shares
from tests.benchmarks.small import ONCE, product, rows_of, square_case


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 100)


def test_every_mode_of_every_variant_has_a_row_with_all_columns():
    rows = rows_of(square_case(Variant("first", product), Variant("second", product)))
    assert [(row["mode"], row["variant"]) for row in rows] == [
        (mode, name) for mode in MODES for name in ("first", "second")
    ]
    assert all(tuple(row) == COLUMNS for row in rows)
    for row in rows:
        assert (row["status"], row["error"], row["sets"], row["dtype"]) == ("ok", 0, 3, "float64")
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(18 * 8 / row["p50_us"] / 1000, abs=1e-3)
        assert row["tokens_per_s"] == pytest.approx(6e6 / row["p50_us"], rel=1e-6, abs=1)


def wrong_backward(leaves, fixed):
    return product(leaves, fixed) + 0.01 * (leaves["a"] - leaves["a"].detach())


@pytest.mark.parametrize(
    ("call", "modes"),
    [
        (lambda leaves, _: 1.01 * leaves["a"] * leaves["b"], MODES),
        (lambda leaves, _: leaves["a"] * leaves["b"] * float("nan"), MODES),
        (lambda leaves, _: (leaves["a"] * leaves["b"])[None], ("forward",)),
        (wrong_backward, ("backward", "forward+backward")),
    ],
)
def test_another_result_is_a_row_with_the_reason_and_no_time(call, modes):
    rows = rows_of(square_case(Variant("right", product), Variant("wrong", call)))
    for row in rows:
        if row["variant"] == "wrong" and row["mode"] in modes:
            assert row["status"].startswith("failed: ValueError: ")
            assert row["p50_us"] == ""
        elif row["variant"] == "right":
            assert row["status"] == "ok"


def test_the_last_set_is_checked_too():
    calls = []

    def wrong_on_the_last(leaves, _):
        calls.append(leaves["a"].data_ptr())
        last = len(set(calls)) == 3 and calls[-1] == list(dict.fromkeys(calls))[-1]
        return leaves["a"] * leaves["b"] + last

    (row,) = rows_of(square_case(Variant("wrong", wrong_on_the_last), modes=("forward",)))
    assert "result of set 2 is off" in row["status"]


def test_what_raises_is_a_row_and_the_others_go_on():
    def broken(leaves, _):
        raise RuntimeError("no such kernel\nmore lines")

    rows = rows_of(square_case(Variant("broken", broken), Variant("right", product)))
    assert {row["status"] for row in rows if row["variant"] == "broken"} == {
        "failed: RuntimeError: no such kernel"
    }
    assert {row["status"] for row in rows if row["variant"] == "right"} == {"ok"}


def test_gradients_are_compared_in_the_layout_that_a_package_keeps():
    def side_by_side(leaves):
        return {"both": torch.stack([leaves["a"], leaves["b"]])}

    def call(leaves, _):
        return leaves["both"][0] * leaves["both"][1]

    rows = rows_of(square_case(Variant("packed", call, prepare=side_by_side)))
    assert [(row["status"], row["error"]) for row in rows] == [("ok", 0.0)] * 3


def test_a_variant_without_a_leaf_has_the_truth_without_it():
    def truth(leaves, _):
        return leaves["a"] * leaves.get("b", 2)

    lean = Variant("lean", lambda leaves, _: leaves["a"] * 2, without=("b",))
    rows = rows_of(square_case(lean, truth=truth))
    assert [(row["status"], row["error"]) for row in rows] == [("ok", 0.0)] * 3


def test_only_what_is_trained_gets_a_gradient():
    rows = rows_of(square_case(Variant("right", product), trained=("b",)))
    assert {row["status"] for row in rows} == {"ok"}
    # y = a b keeps a for b's gradient, and that is an input.
    assert rows[-1]["saved_bytes"] == 0


def test_time_that_has_run_out_is_a_row():
    case = square_case(Variant("right", product))
    rows = list(harness.measure(case, torch.float64, "cpu", ONCE, Deadline(-1)))
    assert [(row["mode"], row["status"]) for row in rows] == [(mode, NO_TIME) for mode in MODES]


def test_a_device_that_fails_for_good_ends_the_process(monkeypatch):
    monkeypatch.setattr(harness, "_device_failure", lambda device: "illegal memory access")
    rows = harness.measure(
        square_case(Variant("right", product)), torch.float64, "cpu", ONCE, Deadline(60)
    )
    assert next(rows)["status"] == "ok"  # what was measured before stays
    with pytest.raises(harness.DeviceLostError, match="illegal memory access"):
        list(rows)


def test_sets_exceed_the_cache_threefold():
    assert harness.number_of_sets(10, 100) == 30
    assert harness.number_of_sets(7, 100) == 43
    assert harness.number_of_sets(10**9, 100) == 2
    assert harness.number_of_sets(1, 10**9) == harness.MAX_SETS


def test_relative_error():
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2, dtype=torch.float64)) == 2
    assert relative_error(wanted.to_sparse(), wanted) == 0
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(1, 2\)"):
        relative_error(wanted[None], wanted)


def test_shares_are_of_the_measured_ceilings_and_of_the_data_sheet():
    rows = [
        {"gb_per_s": 50.0, "tflop_per_s": ""},
        {"gb_per_s": "", "tflop_per_s": 3.0},
    ]
    shares(rows, 200.0, 4.0, (400.0, 6.0))
    assert (rows[0]["share_of_copy"], rows[0]["share_of_sheet"]) == (0.25, 0.125)
    assert (rows[1]["share_of_matmul"], rows[1]["share_of_sheet"]) == (0.75, 0.5)
    unknown = [{"gb_per_s": 50.0, "tflop_per_s": ""}]
    shares(unknown, None, None, None)
    assert unknown == [{"gb_per_s": 50.0, "tflop_per_s": ""}]


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"),
    [
        (torch.bfloat16, 4e-3, 2e-2),
        (torch.float16, 1e-3, 4e-3),
        (torch.float32, 5e-5, 2e-4),
        (torch.float64, 5e-11, 2e-10),
    ],
)
def test_how_far_a_result_may_be_off(dtype, right, wrong):
    def off(by):
        def call(leaves, _):
            exact = leaves["a"].double() * leaves["b"].double()
            return (exact * (1 + by)).to(dtype)

        return Variant(str(by), call, modes=("forward",))

    rows = rows_of(square_case(off(right), off(wrong), modes=("forward",)), dtype)
    assert [row["status"].split(":")[0] for row in rows] == ["ok", "failed"]


def test_what_computes_something_else_is_not_timed(monkeypatch):
    """Numerics come first: a wrong variant is never sampled."""
    timed = []

    def sample(clocks, *_):
        timed.append(list(clocks))
        return timing.sample_in_turn(clocks, 3, 0)

    monkeypatch.setattr(harness, "sample_in_turn", sample)
    wrong = Variant("wrong", lambda leaves, _: 2 * leaves["a"] * leaves["b"])
    rows = rows_of(square_case(Variant("right", product), wrong))
    assert timed == [["right"]] * 3
    assert {row["status"].split(":")[0] for row in rows if row["variant"] == "wrong"} == {"failed"}


def test_what_goes_wrong_while_it_is_timed_is_seen_too():
    calls = []

    def drifting(leaves, _):
        calls.append(1)
        return leaves["a"] * leaves["b"] + (len(calls) > 9)

    # Costs take two calls, and warming up two rounds of three sets.
    (row,) = rows_of(square_case(Variant("drifting", drifting), modes=("forward",)))
    assert "result of set 0 is off" in row["status"]


def test_sets_hold_different_numbers():
    first, *others = square_case().batches(torch.float64, "cpu", 100)
    assert len(others) == 2
    for batch in others:
        assert not torch.equal(batch.leaves["a"], first.leaves["a"])
    assert not torch.equal(others[0].grad, others[1].grad)


def test_a_device_that_is_lost_leaves_no_row_without_a_reason(monkeypatch):
    def broken(leaves, _):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(harness, "_device_failure", lambda device: "illegal memory access")
    case = square_case(Variant("right", product), Variant("broken", broken))
    rows = harness._measure_mode(
        case,
        "forward",
        case.batches(torch.float64, "cpu", 1),
        harness.Truths(case, case.batches(torch.float64, "cpu", 1)),
        torch.float64,
        "cpu",
        ONCE,
    )
    assert [row["status"] for row in rows] == [
        harness.LOST,
        "failed: RuntimeError: illegal memory access",
    ]
