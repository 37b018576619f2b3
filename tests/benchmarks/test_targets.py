"""The verdicts: each target's figure, its bound, the rows it is about, and what did not run."""

from __future__ import annotations

import pytest

from benchmarks.results import comparisons
from benchmarks.targets import NOT_MEASURED, verdicts
from tests.benchmarks.rows import not_run, row

EAGER, COMPILED = "PyTorch eager", "torch.compile, max-autotune"
SCATTER = "embedding + masked_scatter"


def pair(op, peer, *, variant="tokenflex", case="8 images", column="p50_us", **values):
    """(value) -> ours and a peer whose ``column`` is that many times ours; in every other time
    the peer is far ahead, so that a verdict on the wrong column shows."""

    def rows(value):
        ours = {"p50": 100, "eager_us": 100, "saved_bytes": 100, "error": 0.001}
        theirs = {"p50": 1, "eager_us": 1, "saved_bytes": 1, "error": 0.00001}
        name = column.removesuffix("_us") if column == "p50_us" else column
        theirs[name] = value * ours[name]
        return [row(op, case, variant, **ours, **values), row(op, case, peer, **theirs, **values)]

    return rows


def inverse(make):
    return lambda value: make(1 / value)


def share(op, case, variant="tokenflex", **values):
    return lambda value: [row(op, case, variant, 10, share_of_copy=value, **values)]


def mixed(op):
    return lambda value: [
        row(op, "40 images, mixed", "tokenflex", 100 * value),
        row(op, "40 images, uniform", "tokenflex", 100),
    ]


TRAINING = {"mode": "forward+backward"}
CPU = {"device": "cpu", "backend": "cpp", "tokens": 16}
SIZES = "4x(4 text + 4 vision) D=64"

# The bounds are those of the project's plan; (bound, figure must be at least it, rows of a figure).
PLAN = {
    "pool+LN forward: >= 85 % of copy bandwidth": (
        0.85,
        True,
        share("pool_norm", "128 images, n=16"),
    ),
    "pool+LN backward: >= 80 % of copy bandwidth": (
        0.80,
        True,
        share("pool_norm", "128 images, n=16", mode="backward"),
    ),
    "pool+LN: >= 3x the eager chain": (3, True, pair("pool_norm", EAGER)),
    "pool+LN: >= 1.3x torch.compile": (1.3, True, pair("pool_norm", COMPILED)),
    "gate/up forward, T >= 2048: <= 1.06x the bare product": (
        1.06,
        False,
        inverse(pair("swiglu", "bare product")),
    ),
    "gate/up forward, T >= 2048: <= 1.00x the bare product (stretch)": (
        1.00,
        False,
        inverse(pair("swiglu", "bare product")),
    ),
    "gate/up forward, T >= 2048: >= 1.10x torch.compile": (1.10, True, pair("swiglu", COMPILED)),
    "projector, T >= 2048: >= 1.2x eager": (1.2, True, pair("project_tokens", EAGER)),
    "projector, T >= 2048: >= 1.08x torch.compile": (1.08, True, pair("project_tokens", COMPILED)),
    "projector, T >= 2048: >= liger-kernel": (1, True, pair("project_tokens", "liger-kernel")),
    "projector, T >= 2048: >= quack-kernels": (1, True, pair("project_tokens", "quack-kernels")),
    "projector, T >= 2048: >= flash-swiglu-mlp (no biases)": (
        1,
        True,
        pair("project_tokens", "flash-swiglu-mlp, no biases", variant="tokenflex, no biases"),
    ),
    "projector, T <= 256: >= 2x eager, wall clock": (
        2,
        True,
        pair("project_tokens", EAGER, column="eager_us", tokens=256),
    ),
    "projector, any T: never slower than eager": (
        1,
        True,
        pair("project_tokens", EAGER, tokens=1024),
    ),
    "projector, any T: nor by the wall clock": (
        1,
        True,
        pair("project_tokens", EAGER, column="eager_us", tokens=1024),
    ),
    "pool_norm, mixed counts: <= 1.05x uniform": (1.05, False, mixed("pool_norm")),
    "pool_norm, mixed counts: >= 1.5x a loop over groups": (
        1.5,
        True,
        pair("pool_norm", EAGER, case="40 images, mixed"),
    ),
    "project_tokens, mixed counts: <= 1.05x uniform": (1.05, False, mixed("project_tokens")),
    "project_tokens, mixed counts: >= 1.5x a loop over groups": (
        1.5,
        True,
        pair("project_tokens", EAGER, case="40 images, mixed"),
    ),
    "saved for backward, preactivation: <= 0.55x eager": (
        0.55,
        False,
        inverse(pair("project_tokens", EAGER, column="saved_bytes", **TRAINING)),
    ),
    "saved for backward, input: <= 0.15x eager": (
        0.15,
        False,
        inverse(
            pair(
                "project_tokens",
                EAGER,
                variant="tokenflex, save=input",
                column="saved_bytes",
                **TRAINING,
            )
        ),
    ),
    "pack forward: >= 90 % of copy bandwidth": (0.90, True, share("pack_embeddings", SIZES)),
    "pack forward+backward, frozen table: >= 85 %": (
        0.85,
        True,
        share("pack_embeddings", f"{SIZES}, frozen table", **TRAINING),
    ),
    "pack forward+backward, trained table: >= 85 %": (
        0.85,
        True,
        share("pack_embeddings", f"{SIZES}, trained table", **TRAINING),
    ),
    "pack forward+backward, sparse table gradient: >= 85 %": (
        0.85,
        True,
        share(
            "pack_embeddings",
            f"{SIZES}, sparse table gradient",
            "tokenflex, sparse_grad",
            **TRAINING,
        ),
    ),
    "pack: >= 5x masked_scatter": (5, True, pair("pack_embeddings", SCATTER)),
    "pack: 0 synchronisations": (
        0,
        False,
        lambda value: [row("pack_embeddings", SIZES, "tokenflex", 1, synchronisations=value)],
    ),
    "pack on the CPU: >= 2x masked_scatter": (2, True, pair("pack_embeddings", SCATTER, **CPU)),
    "merge on the CPU: >= 2x masked_scatter": (
        2,
        True,
        pair("merge_vision", "masked_scatter", **CPU),
    ),
    "host cost of an op call, forward: <= 15 us": (
        15,
        False,
        lambda value: [
            row("host_cost", "no grad", "merge_vision", value, backend="cpp", tokens="")
        ],
    ),
    "error against float64: <= 1.2x eager's": (
        1.2,
        False,
        inverse(pair("swiglu", EAGER, column="error")),
    ),
}


def verdict_of(rows, name):
    (found,) = [verdict for verdict in verdicts(rows) if verdict.name == name]
    return found


def test_every_target_of_the_plan_is_judged_and_no_other():
    assert [verdict.name for verdict in verdicts([])] == list(PLAN)


@pytest.mark.parametrize("name", PLAN)
def test_just_met_and_just_short(name):
    bound, at_least, rows_of = PLAN[name]
    little = 0.001 * bound or 1
    above = verdict_of(rows_of(bound + little), name)
    below = verdict_of(rows_of(bound - little), name) if bound else verdict_of(rows_of(0), name)
    met, short = (above, below) if at_least else (below, above)
    assert (met.met, short.met) == (True, False)
    assert met.text.startswith("met on 1 of 1 cases")
    assert short.text.startswith("SHORT")
    assert met.value == pytest.approx(bound, rel=0.002)


T_2048 = "projector, T >= 2048: >= 1.2x eager"
T_256 = "projector, T <= 256: >= 2x eager, wall clock"


@pytest.mark.parametrize(
    ("name", "values", "counts"),
    [
        (T_2048, {"tokens": 2048}, True),
        (T_2048, {"tokens": 2047}, False),
        (T_2048, {"case": "40 images, mixed"}, True),
        (T_2048, {"case": "40 images, uniform"}, True),
        (T_2048, {"mode": "forward+backward"}, True),
        (T_2048, {"mode": "backward"}, False),
        (T_256, {"tokens": 256}, True),
        (T_256, {"tokens": 64, "mode": "forward+backward"}, True),
        (T_256, {"tokens": 257}, False),
        ("projector, any T: never slower than eager", {"tokens": 64, "mode": "backward"}, True),
        ("gate/up forward, T >= 2048: >= 1.10x torch.compile", {"tokens": 2047}, False),
        ("gate/up forward, T >= 2048: >= 1.10x torch.compile", {"tokens": 2048}, True),
        ("pool+LN: >= 3x the eager chain", {"case": "1 image, n=8", "tokens": 64}, True),
        ("pool+LN: >= 3x the eager chain", {"case": "40 images, mixed"}, True),
        ("pack: >= 5x masked_scatter", {"tokens": 16}, True),
        ("pack: >= 5x masked_scatter", {"case": f"{SIZES}, trained table", **TRAINING}, True),
        ("pack on the CPU: >= 2x masked_scatter", {"mode": "backward"}, True),
        ("merge on the CPU: >= 2x masked_scatter", {"mode": "forward+backward"}, True),
        ("pack on the CPU: >= 2x masked_scatter", {"device": "cuda"}, False),
        ("pack: >= 5x masked_scatter", {"device": "cpu"}, False),
        ("projector, any T: never slower than eager", {"device": "cpu"}, False),
        ("projector, any T: never slower than eager", {"backend": "reference"}, False),
    ],
)
def test_the_rows_that_a_target_is_about(name, values, counts):
    bound, _, rows_of = PLAN[name]
    rows = [one | {key: str(value) for key, value in values.items()} for one in rows_of(bound / 2)]
    assert verdict_of(rows, name).met is (False if counts else None)


@pytest.mark.parametrize(
    "name", [name for name in PLAN if "T >= 2048" in name or "T <= 256" in name]
)
def test_the_sizes_that_a_target_names(name):
    inside, outside = (2048, 2047) if "T >= 2048" in name else (256, 257)
    rows = PLAN[name][2](1.5)
    for tokens, counts in ((inside, True), (outside, False)):
        sized = [row | {"tokens": str(tokens)} for row in rows]
        assert (verdict_of(sized, name).met is not None) is counts


@pytest.mark.parametrize(
    "name", [name for name in PLAN if name.startswith(("pool+LN f", "pool+LN b", "pack f"))]
)
def test_small_batches_count_towards_bandwidth(name):
    _, _, rows_of = PLAN[name]
    small = [one | {"tokens": "16"} for one in rows_of(0.5)]
    assert verdict_of(small, name).met is False


def test_a_target_is_judged_by_its_worst_case():
    rows = [
        *pair("project_tokens", EAGER, case="8 images, n=16")(2),
        *pair("project_tokens", EAGER, case="32 images, n=16")(1.1),
    ]
    text = verdict_of(rows, T_2048).text
    assert text == ("SHORT by 8.3%: 1.1 at worst (32 images, n=16, forward); met on 1 of 2 cases")
    better = [*rows[:2], *pair("project_tokens", EAGER, case="32 images, n=16")(1.3)]
    assert verdict_of(better, T_2048).text == (
        "met on 2 of 2 cases, 8.3% to spare: 1.3 at worst (32 images, n=16, forward)"
    )


def test_a_wrong_result_of_ours_misses_the_target():
    rows = [
        *pair("project_tokens", EAGER, case="8 images")(2),
        *pair("project_tokens", EAGER, case="32 images")(2),
    ]
    rows[2]["status"] = "failed: ValueError: result of set 0 is off"
    verdict = verdict_of(rows, T_2048)
    assert verdict.met is False
    assert verdict.text == (
        "SHORT: 1 of ours failed (32 images, forward: failed: ValueError: result of set 0 is off); "
        "met on 1 of 2 cases"
    )
    # What was held against nothing says nothing: no such peer is installed here.
    assert verdict_of(rows, "projector, T >= 2048: >= liger-kernel").text == NOT_MEASURED


def test_a_peer_that_fails_does_not_make_ours_short():
    rows = pair("project_tokens", EAGER)(2)
    rows[1]["status"] = "failed: RuntimeError: no"
    assert verdict_of(rows, T_2048).text == NOT_MEASURED


def test_cases_that_did_not_run_are_counted():
    rows = [
        *pair("project_tokens", EAGER)(1.5),
        not_run("project_tokens", "16 images", "forward"),
        not_run("project_tokens", "32 images", "forward+backward"),
        not_run("project_tokens", "1 image", "forward", tokens=256),
    ]
    assert verdict_of(rows, T_2048).text.startswith(
        "met on 1 of 3 cases, 2 not run, 25.0% to spare"
    )
    assert verdict_of(rows[2:], T_2048).text == f"{NOT_MEASURED}, 2 not run"


def test_a_suite_that_was_stopped_is_named_in_the_verdict():
    rows = pair("project_tokens", EAGER)(1.5)
    stopped = row("project_tokens suite", "", "", "", mode="", status="stopped after 60 s")
    assert "and the suite did not end" in verdict_of([*rows, stopped], T_2048).text
    for values in ({"op": "packing suite"}, {"device": "cpu"}):
        assert "did not end" not in verdict_of([*rows, stopped | values], T_2048).text


def test_nothing_is_judged_where_nothing_was_measured():
    assert {verdict.text for verdict in verdicts([])} == {NOT_MEASURED}
    assert {verdict.met for verdict in verdicts([])} == {None}


# A graph leaves the host out: it is never held against a wall clock.
UNLIKE = [
    row("pack_embeddings", "4x", "tokenflex", 10, eager_us=60),
    row("pack_embeddings", "4x", SCATTER, 100, eager_us=120, timing="eager"),
]


def test_unlike_clocks_are_compared_by_the_wall_clock_of_both():
    verdict = verdict_of(UNLIKE, "pack: >= 5x masked_scatter")
    assert verdict.value == pytest.approx(2)
    assert "4x, forward, wall clock" in verdict.text
    (one,) = comparisons(UNLIKE)
    assert (one.figure.value, one.figure.remark) == (2, "wall clock")


def test_like_clocks_are_compared_by_their_medians():
    (one,) = comparisons([UNLIKE[0], UNLIKE[1] | {"timing": "graph"}])
    assert (one.figure.value, one.figure.remark) == (10, "")


def test_peers_are_held_against_ours_that_does_the_same():
    rows = [
        row("project_tokens", "8 images", "tokenflex", 10),
        row("project_tokens", "8 images", "tokenflex, no biases", 8),
        row("project_tokens", "8 images", "flash-swiglu-mlp, no biases", 4),
        row("pack_embeddings", "4x, sparse table gradient", "tokenflex, sparse_grad", 5),
        row("pack_embeddings", "4x, sparse table gradient", "embedding(sparse) + index_put", 15),
        row("pack_embeddings", "5x", SCATTER, 15),  # nothing of ours beside it
    ]
    assert [one.figure.value for one in comparisons(rows)] == [0.5, 3]


def test_what_could_not_be_captured_has_waited():
    rows = [row("pack_embeddings", "4x", "tokenflex", 1, synchronisations=0, timing="eager")]
    verdict = verdict_of(rows, "pack: 0 synchronisations")
    assert (verdict.value, verdict.met) == (1, False)


def test_a_share_of_the_copy_stands_beside_that_of_the_data_sheet():
    rows = [row("pool_norm", "x", "tokenflex", 1, share_of_copy=0.9, share_of_sheet=0.81)]
    text = verdict_of(rows, "pool+LN forward: >= 85 % of copy bandwidth").text
    assert "0.9 at worst (x, forward, 0.81 of the data sheet)" in text


def test_host_cost_is_that_of_the_dearest_op_without_gradients():
    rows = [
        row("host_cost", "no grad", "swiglu", 9, backend="triton"),
        row("host_cost", "no grad", "merge_vision", 16, backend="cuda"),
        row("host_cost", "no grad", "pool_norm", 99, backend="reference"),
        row("host_cost", "no grad", "plan_packing", 9000, backend="cpp"),
        row("host_cost", "grad", "swiglu", 90, backend="triton"),
    ]
    text = verdict_of(rows, "host cost of an op call, forward: <= 15 us").text
    assert text == "SHORT by 6.7%: 16 at worst (merge_vision); met on 1 of 2 cases"
