"""Savings of mixed counts: steps shared, predicted and measured on a tiny model."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.results import ROOT, read_csv
from experiments.speed import mixed_counts as study
from experiments.speed.models import RESULTS, fields, random_model

TINY = dataclasses.replace(
    study.SCALED,
    vision=fields(16, 16, 1, 2, image_size=128, patch_size=16),
    text=study.SCALED.text | fields(16, 16, 2, 2, num_key_value_heads=2, vocab_size=32),
)
FLOPS = study.Flops(tile=51.0, vision_token=0.0, token=1.0, target=0.0)
MANY = {"steps": 4, "ranks": 8, "per_rank": 8}


@pytest.fixture(scope="module")
def model():
    return random_model(TINY.vision, TINY.text, "cpu")


@pytest.mark.parametrize("way", study.WAYS)
def test_every_sample_is_on_one_rank(way):
    sizes = study.draw_step(TINY, 0, 32, tiled=True)
    shares = study.share_step(way, sizes, 4, 18.0)
    assert len(shares) == 4
    assert sorted(i for members in shares for i in members) == list(range(32))


def test_counts_are_drawn_at_the_odds_and_text_is_the_same_for_both_regimes():
    sizes = [study.draw_step(TINY, step, 64, tiled=False) for step in range(30)]
    counts = np.concatenate([step.counts for step in sizes])
    odds = {n: (counts == n).mean() for n in TINY.counts}
    assert odds == pytest.approx({16: 0.2, 36: 0.3, 64: 0.5}, abs=0.03)
    largest = study.with_largest(TINY, sizes[0])
    assert set(largest.counts) == {64}
    assert (largest.text == sizes[0].text).all()


def test_operations_of_a_padded_rank_are_those_of_its_longest_sample():
    sizes = ([10, 30], [1, 1], [16, 64], [5, 15])
    samples = study.Samples(*map(np.array, sizes))
    packed = samples.operations(FLOPS, [0, 1])
    padded = samples.operations(FLOPS, [0, 1], padded=True)
    assert packed == 26 + 94 + 2 * 51
    assert padded == 94 + 94 + 2 * 51


def test_prediction_of_equal_ranks_is_the_arithmetic():
    """One rank waits for no other: all of the saving becomes time, except where it is padded."""
    by_cost, by_tokens, padded = study.predict(
        TINY, FLOPS, steps=3, ranks=1, per_rank=8, tiled=True
    )
    for row in (by_cost, by_tokens):
        assert row["predicted_share"] == pytest.approx(1, abs=1e-3)
        assert (row["balance"], row["padding"]) == (1, 0)
    assert padded["padding"] > 0.2


def test_cost_balanced_bins_keep_the_saving_that_others_lose():
    rows = {row["way"]: row for row in study.predict(TINY, FLOPS, tiled=True, **MANY)}
    assert rows[study.BY_COST]["predicted_share"] >= study.TARGET
    assert rows[study.BY_COST]["balance"] <= 1.03
    assert rows[study.BY_TOKENS]["predicted_share"] < 0.9
    assert rows[study.PADDED]["times_ideal"] > 2


def test_a_padded_rank_computes_the_loss_and_gradients_of_a_packed_one(model):
    samples = study.draw_step(TINY, 1, 3, tiled=True)

    def gradients(packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        loss = study.Step(model, samples, [0, 2, 1], packed)()
        return loss, model.model.projector.gate.weight.grad.clone()

    (loss, gradient), (truth, expected) = gradients(False), gradients(True)
    torch.testing.assert_close(loss, truth, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_measured_seconds_are_those_of_the_slowest_rank(model, monkeypatch):
    """A fake clock makes a rank take as long as its tiles."""

    def timer(step, timer):
        return SimpleNamespace(timeit=lambda number: len(step.inputs["num_image_tokens"]))

    monkeypatch.setattr(study.timeit, "Timer", timer)
    monkeypatch.setattr(study, "random_model", lambda *_: model)
    rows = study.measure(TINY, "cpu", steps=2, ranks=4, per_rank=4, rounds=2, tiled=True)
    for row in rows:
        slowest = 0
        for step in range(2):
            mixed = study.draw_step(TINY, step, 16, tiled=True)
            shares = study.share_step(row["way"], mixed, 4, row["tile_cost"])
            slowest += max(mixed.tiles[members].sum() for members in shares)
        assert row["seconds_mixed"] == slowest
        assert row["measured_balance"] >= 1
    assert rows[-1]["measured_saving"] == 0  # padded: the same tiles for both


def timed_steps(seed, cost, rounds=9):
    """Return seconds of three steps on eight ranks, on a machine that others use.

    Args:
        seed: Of the noise.
        cost: True seconds of each key's ranks: mixed counts, the largest, and so on in turns.
        rounds: Measurements of each.
    """
    rng = np.random.default_rng(seed)
    shape = (len(cost), 3, rounds, 8)
    ranks = np.linspace(0.97, 1.0, 8)
    drift = 1 + 0.1 * np.sin(np.arange(3 * rounds * 8) / 40 + seed).reshape(shape[1:])
    bursts = rng.exponential(0.5, shape) * (rng.random(shape) < 0.03)
    return (
        np.array(cost)[:, None, None, None] * ranks * drift * rng.lognormal(0, 0.02, shape) + bursts
    )


def test_a_planted_saving_lies_in_its_interval_and_a_lost_one_does_not():
    """12 % of the arithmetic: all of it becomes time, or most of it is lost."""
    found, kept, lost = [], [], []
    for seed in range(15):
        savings, low, high = study.savings_of(timed_steps(seed, (0.88, 1.0, 0.98, 1.0)))
        found.append(savings)
        kept.append(low[0] <= 0.12 <= high[0])
        lost.append(low[1] <= 0.12 <= high[1])
    assert np.median(found, axis=0) == pytest.approx([0.12, 0.02], abs=0.01)
    assert sum(kept) >= 13
    assert sum(lost) <= 2


def test_the_slowest_rank_of_each_step_counts_and_a_slow_round_does_not():
    seconds = np.ones((2, 2, 3, 4))
    seconds[0, 0, :, 1] = 3.0
    seconds[1, 1, :, 2] = 2.0
    seconds[:, :, 1] *= 7.0  # while others used the machine
    slowest, average = study.slowest_ranks(seconds)
    assert slowest == pytest.approx([3 + 1, 1 + 2])
    assert average == pytest.approx([1.5 + 1, 1 + 1.25])


def test_command_writes_rows_a_plot_and_a_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "SCALED", TINY)
    monkeypatch.setattr(study, "FAMILY", study.FAMILY[:1])
    few = functools.partial(study.family_predictions, steps=2, ranks=4)
    monkeypatch.setattr(study, "family_predictions", few)
    options = ["--device", "cpu", "--steps", "1", "--rounds", "1", "--ranks", "2"]
    assert study.main([*options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    assert path.with_suffix(".png").stat().st_size > 1000
    rows = read_csv(path)
    assert len(rows) == 2 * 3 + 3 * 2 * 3
    assert [row["measured_saving"] != "" for row in rows] == [True] * 6 + [False] * 18
    assert "packed by cost: >= 95% of the arithmetic saving: predicted" in capsys.readouterr().out


def test_verdict_counts_the_cases_that_fall_short():
    row = {"way": study.BY_COST, "predicted_share": "0.99", "measured_share": "0.94"}
    row |= {"share_low": "0.9", "share_high": "0.97"}
    other = {"way": study.PADDED, "predicted_share": "0.1", "measured_share": "0.1"}
    text = study.verdict([row, {**row, "measured_share": ""}, other])
    assert "predicted 0.990 at worst, met on 2 of 2" in text
    assert "measured 0.940 (0.9 to 0.97) at worst, met on 0 of 1" in text


@pytest.mark.parametrize("option", ["--steps", "--rounds", "--ranks"])
def test_nothing_to_measure_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        study.main([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_what_runs_is_what_the_operations_count(model):
    samples = study.draw_step(TINY, 1, 3, tiled=True)
    step = study.Step(model, samples, [0, 1, 2], packed=True)
    none = study.Flops(tile=0.0, vision_token=0.0, token=0.0, target=0.0)

    def counted(name: str) -> float:
        flops = dataclasses.replace(none, **{name: 1.0})
        return samples.operations(flops, [0, 1, 2])

    plan, counts = step.inputs["plan"], step.inputs["num_image_tokens"]
    assert counted("target") == len(step.answers)
    assert counted("token") == plan.num_tokens
    assert counted("tile") == len(step.inputs["pixel_values"]) == len(counts)
    assert counted("vision_token") == sum(counts) == len(plan.vision_rows)


def test_the_table_has_a_line_for_what_was_predicted_and_one_for_what_was_measured():
    row = {"model": "m", "stage": "s", "tiled": "True", "arithmetic_saving": "0.2"}
    saved = {way: {"predicted_saving": "0.1", "measured_saving": ""} for way in study.WAYS}
    saved[study.BY_COST] = {"predicted_saving": "0.19", "measured_saving": ""}
    lines = study.format_table([{**row, **way} for way in saved.values()]).splitlines()
    assert lines[2:] == ["| m | s | many | 20.0% | 19.0% | 10.0% | 10.0% | predicted |"]
    measured = [{**row, **way, "measured_saving": "0.15"} for way in saved.values()]
    assert len(study.format_table(measured).splitlines()) == 4


def test_the_documents_have_the_table_of_the_results():
    (path,) = (RESULTS / "mixed-counts").glob("*.csv")
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = read_csv(path)
    assert study.format_table(rows) in page
    assert study.verdict(rows).partition(": ")[2] in " ".join(page.split())
    machine = f"{rows[0]['cpu']}, {rows[0]['cores']} cores, load {rows[0]['load']}, commit"
    assert f"{machine} {rows[0]['commit']}" in page
