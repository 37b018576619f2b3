"""The verdicts: each target's figure, its bound, the rows it is about, and what did not run."""

from __future__ import annotations

import csv
import re

import pytest

from benchmarks.results import Results
from benchmarks.targets import FIGURES, NOT_MEASURED, TABLE, verdicts
from tests.benchmarks.rows import not_run, row

with TABLE.open(newline="", encoding="utf-8") as file:
    TARGETS = {line["target"]: line for line in csv.DictReader(file)}

EAGER = "PyTorch eager"
SCATTER = "embedding + masked_scatter"
TRAINING = {"mode": "forward+backward"}
SIZES = "4x(4 text + 4 vision) D=64"
COLUMNS = {"faster_by_wall_clock": "eager_us", "saved": "saved_bytes", "inexact": "error"}


def rows_of(name, value, case="8 images"):
    """Rows of ours, and of a peer, that make a target's figure so much. In every other column the
    peer is far ahead, so that a verdict on the wrong column shows."""
    target = TARGETS[name]
    figure, device = target["figure"], target["device"] or "cuda"
    op, mode, ours = (target[key].split("; ")[0] for key in ("ops", "modes", "variants"))
    fields = {"mode": mode or "forward", "device": device, "tokens": "", "backend": "native"}
    fields["tokens"] = target["least_tokens"] or target["most_tokens"]
    case = f"{case}, {target['case_ends']}".removesuffix(", ")
    if figure == "over_uniform":
        mixed = row(op, case, ours, 100 * value, **fields)
        return [mixed, row(op, case.replace("mixed", "uniform"), ours, 100, **fields)]
    if figure in ("share_of_copy", "synchronisations"):
        return [row(op, case, ours, 1, **fields, **{figure: f"{value:g}"})]
    if figure == "microseconds":
        return [row(op, "no grad", ours, value, **fields)]
    column = COLUMNS.get(figure, "p50_us")
    columns = {"p50_us": 100, "eager_us": 100, "saved_bytes": 100, "error": 0.1}
    theirs = dict.fromkeys(columns, 0.01)
    faster = figure in ("faster", "faster_by_wall_clock")
    theirs[column] = columns[column] * (value if faster else 1 / value)
    ours_p50, theirs_p50 = columns.pop("p50_us"), theirs.pop("p50_us")
    return [
        row(op, case, ours, ours_p50, **columns, **fields),
        row(op, case, target["peer"], theirs_p50, **theirs, **fields),
    ]


def verdict_of(rows, name):
    (verdict,) = [v for v in verdicts(rows) if v.name == name]
    return verdict


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_called_what_it_is(name):
    target = TARGETS[name]
    bound = re.search(r"([<>]=) ([\d.]+)( %)?", name.rpartition(": ")[2])
    if bound:
        scale = 100 if bound[3] else 1
        wanted = (bound[1], float(bound[2]) / scale)
    elif "0 synchronisations" in name:
        wanted = ("<=", 0)
    else:  # never slower than
        wanted = (">=", 1)
    assert (target["sense"], float(target["bound"])) == wanted
    tokens = re.search(r"T ([<>]=) (\d+)", name)
    limits = {">=": "", "<=": ""} | ({tokens[1]: tokens[2]} if tokens else {})
    assert [target["least_tokens"], target["most_tokens"]] == list(limits.values())
    assert target["figure"] in FIGURES
    assert (target["figure"] == "faster_by_wall_clock") is ("wall clock" in name)
    for word in ("eager", "torch.compile", "liger", "quack", "flash", "masked_scatter", "product"):
        assert (word not in name) or (word in target["peer"])
    cpu = "CPU" in name
    assert target["device"] == ("" if "host" in name else "cpu" if cpu else "cuda")


@pytest.mark.parametrize("name", TARGETS)
def test_just_met_and_just_short(name):
    bound, at_least = float(TARGETS[name]["bound"]), TARGETS[name]["sense"] == ">="
    little = 0.001 * bound or 1
    above = verdict_of(rows_of(name, bound + little), name)
    below = verdict_of(rows_of(name, bound - little if bound else 0), name)
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
    rows = rows_of(name, float(TARGETS[name]["bound"]) / 2)
    rows = [line | {key: str(value) for key, value in values.items()} for line in rows]
    assert verdict_of(rows, name).met is (False if counts else None)


def test_small_batches_count_towards_bandwidth():
    name = "pool+LN forward: >= 85 % of copy bandwidth"
    small = [line | {"tokens": "16"} for line in rows_of(name, 0.5)]
    assert verdict_of(small, name).met is False


def test_a_target_is_judged_by_its_worst_case():
    rows = [
        *rows_of(T_2048, 2, "8 images, n=16"),
        *rows_of(T_2048, 1.1, "32 images, n=16"),
    ]
    text = verdict_of(rows, T_2048).text
    assert text == ("SHORT by 8.3%: 1.1 at worst (32 images, n=16, forward); met on 1 of 2 cases")
    better = [*rows[:2], *rows_of(T_2048, 1.3, "32 images, n=16")]
    assert verdict_of(better, T_2048).text == (
        "met on 2 of 2 cases, 8.3% to spare: 1.3 at worst (32 images, n=16, forward)"
    )


def test_a_wrong_result_of_ours_misses_the_target():
    rows = [
        *rows_of(T_2048, 2, "8 images"),
        *rows_of(T_2048, 2, "32 images"),
    ]
    rows[2]["status"] = "failed: ValueError: result of set 0 is off"
    verdict = verdict_of(rows, T_2048)
    assert verdict.met is False
    assert verdict.text == (
        "SHORT: 1 of ours failed (32 images, forward: failed: ValueError: result of set 0 is off); "
        "met on 1 of 2 cases"
    )
    # Without the peer there is no comparison.
    assert verdict_of(rows, "projector, T >= 2048: >= liger-kernel").text == NOT_MEASURED


def test_a_peer_that_fails_does_not_make_ours_short():
    rows = rows_of(T_2048, 2)
    rows[1]["status"] = "failed: RuntimeError: no"
    assert verdict_of(rows, T_2048).text == NOT_MEASURED


def test_cases_that_did_not_run_are_counted():
    rows = [
        *rows_of(T_2048, 1.5),
        not_run("project_tokens", "16 images", "forward"),
        not_run("project_tokens", "32 images", "forward+backward"),
        not_run("project_tokens", "1 image", "forward", tokens=256),
    ]
    assert verdict_of(rows, T_2048).text.startswith(
        "met on 1 of 3 cases, 2 not run, 25.0% to spare"
    )
    assert verdict_of(rows[2:], T_2048).text == f"{NOT_MEASURED}, 2 not run"


def test_a_suite_that_was_stopped_is_named_in_the_verdict():
    rows = rows_of(T_2048, 1.5)
    stopped = row("project_tokens suite", "", "", "", mode="", status="stopped after 60 s")
    assert "and the suite did not end" in verdict_of([*rows, stopped], T_2048).text
    for values in ({"op": "packing suite"}, {"device": "cpu"}):
        assert "did not end" not in verdict_of([*rows, stopped | values], T_2048).text


def test_nothing_is_judged_where_nothing_was_measured():
    assert {verdict.text for verdict in verdicts([])} == {NOT_MEASURED}
    assert {verdict.met for verdict in verdicts([])} == {None}


# A graph leaves the host out: it is never compared with a wall clock.
UNLIKE = [
    row("pack_embeddings", "4x", "tokenflex", 10, eager_us=60),
    row("pack_embeddings", "4x", SCATTER, 100, eager_us=120, timing="eager"),
]


def test_unlike_clocks_are_compared_by_the_wall_clock_of_both():
    verdict = verdict_of(UNLIKE, "pack: >= 5x masked_scatter")
    assert verdict.value == pytest.approx(2)
    assert "4x, forward, wall clock" in verdict.text
    (pair,) = Results(UNLIKE).comparisons()
    assert (pair.figure.value, pair.figure.remark) == (2, "wall clock")


def test_like_clocks_are_compared_by_their_medians():
    (pair,) = Results([UNLIKE[0], UNLIKE[1] | {"timing": "graph"}]).comparisons()
    assert (pair.figure.value, pair.figure.remark) == (10, "")


def test_peers_are_held_against_ours_that_does_the_same():
    rows = [
        row("project_tokens", "8 images", "tokenflex", 10),
        row("project_tokens", "8 images", "tokenflex, no biases", 8),
        row("project_tokens", "8 images", "flash-swiglu-mlp, no biases", 4),
        row("pack_embeddings", "4x, sparse table gradient", "tokenflex, sparse_grad", 5),
        row("pack_embeddings", "4x, sparse table gradient", "embedding(sparse) + index_put", 15),
        row("pack_embeddings", "5x", SCATTER, 15),  # nothing of ours beside it
    ]
    assert [pair.figure.value for pair in Results(rows).comparisons()] == [0.5, 3]


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
        row("host_cost", "no grad", "plan_packing", 9000, backend="native"),
        row("host_cost", "grad", "swiglu", 90, backend="triton"),
    ]
    text = verdict_of(rows, "host cost of an op call, forward: <= 15 us").text
    assert text == "SHORT by 6.7%: 16 at worst (merge_vision); met on 1 of 2 cases"
