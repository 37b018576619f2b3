"""A case and its variants: what is called, checked against float64, counted and written."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, harness
from benchmarks.cases import MODES, Variant, relative_error
from benchmarks.harness import NO_TIME, Deadline
from benchmarks.results import COLUMNS
from tests.benchmarks.small import product, rows_of, square_case


def test_every_mode_of_every_variant_has_a_row_with_all_columns():
    rows = rows_of(square_case(Variant("first", product), Variant("second", product)))
    assert [(row["mode"], row["variant"]) for row in rows] == [
        (mode, name) for mode in MODES for name in ("first", "second")
    ]
    for row in rows:
        assert tuple(row) == COLUMNS
        assert (row["status"], row["error"], row["sets"], row["dtype"]) == ("ok", 0, 3, "float64")
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        moved = 18 * 8 * (2 if row["mode"] == "forward+backward" else 1)
        assert row["gb_per_s"] == pytest.approx(moved / row["p50_us"] / 1000, abs=1e-3)
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
def test_another_result_is_never_timed_and_a_row_says_why(call, modes, monkeypatch):
    timed = []

    def sample(pairs, *arguments):
        timed.append(list(pairs))

    wrong = Variant("wrong", call, modes=modes)
    rows = rows_of(square_case(Variant("right", product), wrong))
    for row in rows:
        if row["variant"] == "wrong":
            assert row["status"].startswith("failed: ValueError: ")
            assert row["p50_us"] == ""
        else:
            assert row["status"] == "ok"
    monkeypatch.setattr(harness, "sample_in_turn", sample)
    rows_of(square_case(wrong, modes=modes))
    assert timed == [[]] * len(modes)


def test_the_last_set_is_checked_too():
    addresses = []

    def wrong_on_the_last(leaves, _):
        addresses.append(leaves["a"].data_ptr())
        last = len(set(addresses)) == 3 and addresses[-1] == list(dict.fromkeys(addresses))[-1]
        return leaves["a"] * leaves["b"] + last

    (row,) = rows_of(square_case(Variant("wrong", wrong_on_the_last), modes=("forward",)))
    assert "result of set 2 is off" in row["status"]


def test_what_goes_wrong_while_it_is_timed_is_seen_too():
    calls = []

    def drifting(leaves, _):
        calls.append(1)
        return leaves["a"] * leaves["b"] + (len(calls) > 9)

    # Costs take two calls, and warming up two rounds of three sets.
    (row,) = rows_of(square_case(Variant("drifting", drifting), modes=("forward",)))
    assert "result of set 0 is off" in row["status"]


def test_what_raises_is_a_row_and_the_others_go_on():
    def broken(leaves, _):
        raise RuntimeError("no such kernel\nmore lines")

    rows = rows_of(square_case(Variant("broken", broken), Variant("right", product)))
    by_variant = {row["variant"]: row["status"] for row in rows}
    assert by_variant == {"broken": "failed: RuntimeError: no such kernel", "right": "ok"}


def test_a_batch_that_does_not_fit_is_a_row_for_each_mode():
    def batch(*_):
        raise torch.OutOfMemoryError("no memory")

    rows = rows_of(square_case(Variant("right", product), batch=batch))
    wanted = "failed: OutOfMemoryError: no memory"
    assert [(row["mode"], row["status"]) for row in rows] == [(mode, wanted) for mode in MODES]


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
    full = Variant("full", product)
    rows = rows_of(square_case(lean, full, truth=truth))
    assert [(row["status"], row["error"]) for row in rows] == [("ok", 0.0)] * 6


def test_the_truth_is_float64_whatever_is_measured():
    rows = rows_of(square_case(Variant("rounded", product)), dtype=torch.bfloat16)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert all(1e-4 < row["error"] < 1e-2 for row in rows)


def test_only_what_is_trained_gets_a_gradient():
    rows = rows_of(square_case(Variant("right", product), trained=("b",)))
    assert {row["status"] for row in rows} == {"ok"}
    # y = a b keeps a for b's gradient, and that is an input.
    assert rows[-1]["saved_bytes"] == 0


def test_time_that_has_run_out_is_a_row_for_each_mode():
    rows = rows_of(square_case(Variant("right", product)), deadline=Deadline(-1))
    assert [(row["mode"], row["status"]) for row in rows] == [(mode, NO_TIME) for mode in MODES]


def test_a_process_that_takes_over_goes_on_where_the_last_one_died():
    failure = square_case().row("forward", "hung") | {"status": "failed: hung for 9 s"}
    case = square_case(Variant("hung", product), Variant("right", product))
    done = {("product", "six", "backward")}
    rows = rows_of(case, done=done, banned={"hung": failure})
    assert [(row["mode"], row["variant"], row["status"]) for row in rows] == [
        ("forward", "hung", "failed: hung for 9 s"),
        ("forward", "right", "ok"),
        ("forward+backward", "hung", "not run: failed: hung for 9 s (six, forward)"),
        ("forward+backward", "right", "ok"),
    ]


def test_what_is_about_to_run_is_announced_before_it_runs():
    begun = []

    def call(leaves, _):
        assert begun[-1]["variant"] == "right"
        return product(leaves)

    rows = rows_of(square_case(Variant("right", call)), begin=begun.append)
    assert {row["status"] for row in rows} == {"ok"}


def test_a_gpu_that_fails_for_good_ends_the_process(monkeypatch):
    def lost():
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    row = {}
    run = harness.Run("cuda", True, Deadline(9), emit=print)
    with pytest.raises(RuntimeError, match="illegal memory access"), harness.failure_in(row, run):
        raise RuntimeError("launch failed")


def test_sets_exceed_the_cache_threefold_and_hold_different_numbers():
    assert cases.number_of_sets(10, 100) == 30
    assert cases.number_of_sets(7, 100) == 43
    assert cases.number_of_sets(10**9, 100) == 1
    assert cases.number_of_sets(1, 10**9) == cases.MAX_SETS
    run = harness.Run("cpu", True, Deadline(9), emit=print, dtype=torch.float64)
    batches = cases.Inputs(square_case(), run).batches
    assert len({float(batch.leaves["a"][0]) for batch in batches}) == 3
    assert len({float(batch.grad[0]) for batch in batches}) == 3


def test_relative_error():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2, dtype=torch.float64)) == 2
    assert relative_error(truth.to_sparse(), truth) == 0
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(1, 2\)"):
        relative_error(truth[None], truth)


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"),
    [
        (torch.bfloat16, 4e-3, 2e-2),
        (torch.float16, 1e-3, 4e-3),
        (torch.float32, 5e-5, 2e-4),
        (torch.float64, 5e-11, 2e-10),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_how_far_a_result_may_be_off(dtype, right, wrong, ours, monkeypatch):
    """A peer may be less exact than we may, as PyTorch's gradients of a norm in bfloat16 are."""
    monkeypatch.setattr(cases, "info", lambda: {"ops": {"product": ""}})

    def off(by):
        def call(leaves, _):
            exact = leaves["a"].double() * leaves["b"].double()
            return (exact * (1 + by)).to(dtype)

        return Variant(str(by), call, modes=("forward",), ours=ours)

    rows = rows_of(square_case(off(right), off(wrong), modes=("forward",)), dtype=dtype)
    statuses = [row["status"].split(":")[0] for row in rows]
    assert statuses == (["ok", "failed"] if ours else ["ok", "ok"])
    peer = Variant("peer", lambda leaves, _: product(leaves) * (1 + 6 * wrong), ours=ours)
    assert all("is off" in row["status"] for row in rows_of(square_case(peer), dtype=dtype))
