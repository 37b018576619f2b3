"""A run for the targets alone: one case for each, with the peer that it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import cases, packing, plain, pool_norm, project_tokens, swiglu
from benchmarks.cases import Variant, for_targets
from benchmarks.comparisons import Results
from benchmarks.targets import is_about, read_targets
from tests.benchmarks.rows import row
from tests.benchmarks.small import product, rows_of, run_of, square_case


@pytest.mark.parametrize("suite", [pool_norm, swiglu, project_tokens, packing])
def test_every_target_of_a_suite_has_a_case(suite):
    """With a stand-in for each peer, without computing anything."""
    op = suite.__name__.removeprefix("benchmarks.")
    names = {op} if op != "packing" else {"pack_embeddings", "merge_vision", "unpack_vision"}
    table = [t for t in read_targets() if t["device"] in ("", "cuda")]
    table = [t for t in table if names & {*t["ops"].split("; ")}]
    peers = [Variant(t["peer"], print, without=()) for t in table if t["peer"]]
    peers = list({peer.name: peer for peer in peers}.values())
    slow = [replace(peer, slow_start="compile" in peer.name) for peer in peers]
    slow = [
        replace(peer, without=plain.BIASES) if "no biases" in peer.name else peer for peer in slow
    ]
    run = run_of("cuda")
    lists = [slow] if op != "packing" else [slow, [], slow, slow]
    every = list(suite.cases(run, *lists))
    wanted = for_targets(every, "cuda")
    rows = [
        row(case.op, case.name, v.name, 1.0, mode=mode, tokens=case.tokens)
        for case in every
        for mode in case.modes
        if (case.name, mode) in wanted
        for v in case.variants
        if mode in v.modes
    ]
    for target in table:
        about = [r for r in rows if is_about(target, r)]
        assert about, target["target"]
        if target["peer"]:
            beside = [Results(rows).beside(r, variant=target["peer"]) for r in about]
            assert any(beside), target["target"]
        if target["figure"] == "over_uniform":
            assert any(Results(rows).uniform(r) for r in about), target["target"]
    assert len(wanted) < len(every) * 3 / 2


def test_a_run_for_targets_measures_those_cases_alone(monkeypatch):
    """Of two cases of an op, the one with fewer variants that has the target's peer."""
    target = dict.fromkeys(read_targets()[0], "")
    target |= {"target": "t", "figure": "faster", "sense": ">=", "bound": "1", "ops": "pool_norm"}
    target |= {"variants": "tokenflex", "modes": "backward; forward", "peer": "peer"}
    monkeypatch.setattr(cases, "read_targets", lambda: [target])
    ours, peer = Variant("tokenflex", product, ours=True), Variant("peer", product)
    alone = square_case(ours, name="alone", op="pool_norm")
    both = square_case(ours, peer, name="both", op="pool_norm")
    many = square_case(ours, peer, replace(peer, name="other"), name="many", op="pool_norm")
    rows = rows_of(many, alone, both, for_targets=True)
    assert {(r["case"], r["mode"]) for r in rows} == {("both", "forward")}
    assert {r["status"] for r in rows} == {"ok"}
