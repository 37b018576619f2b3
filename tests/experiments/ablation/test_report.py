"""The page and the pictures, from a report that was made up."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.ablation import figures
from experiments.ablation.checks import LIMITED_GAIN, quick_checks, quick_limited_checks
from experiments.ablation.extremes import format_extremes
from experiments.ablation.figures import draw_gains, write_figures
from experiments.ablation.gap import format_gap, gains, write_gap_figure
from experiments.ablation.limited import CROSSED, format_limited, write_limited_figure
from experiments.ablation.report import format_report
from experiments.ablation.results import (
    T_QUANTILES,
    difference,
    half_width,
    place,
    places_of,
    spread_of,
)
from experiments.ablation.scales import QUICK_LIMITED
from experiments.ablation.suites import LEVERS, POSITIONED, SUITES
from experiments.ablation.tables import accuracy_table, below_nearest, nearest_trained, points
from experiments.ablation.unseen import format_unseen
from tests.experiments.ablation.tiny import CURVES, canned_report
from tokenflex.plots import plt

FIXED = ("fixed 4", "fixed 9", "fixed 16")


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_spread_is_the_sample_standard_deviation():
    assert spread_of([1.0, 2.0, 4.0]) == {
        "mean": pytest.approx(7 / 3),
        "spread": pytest.approx((14 / 6) ** 0.5),  # ((4/3)^2 + (1/3)^2 + (5/3)^2) / 2
        "values": [1.0, 2.0, 4.0],
    }
    assert spread_of([0.5])["spread"] is None


def test_accuracies_stand_beside_the_papers():
    table = section(format_report(canned_report()), "Trained with, asked at")
    assert cells(table, "fixed 4") == [
        *("86.0 ± 1.0", "51.0 ± 1.0", "56.0 ± 1.0"),
        *("57.5", "57.4", "56.2"),
    ]
    assert cells(table, "stochastic 2:3:5")[3:] == ["58.7", "60.0", "60.7"]
    assert cells(table, "the start")[3:] == ["-"] * 3
    assert "second-hand" in table


def test_differences_are_paired_by_seed():
    """Both models are a point better with each seed: their difference has no spread."""
    report = canned_report()
    gap = difference(report, "stochastic", "fixed-small", "4")
    assert gap["mean"] == pytest.approx(-0.05)
    assert gap["spread"] == pytest.approx(0, abs=1e-12)
    claims = section(format_report(report), "The paper's claim, here")
    assert cells(claims, "fixed 4") == ["**-5.0 ± 0.0**", "+40.0 ± 0.0", "+44.5 ± 0.0"]
    assert cells(claims, "fixed 16") == ["+55.0 ± 0.0", "+60.0 ± 0.0", "**+0.5 ± 0.0**"]


def test_the_verdict_names_where_the_stochastic_model_is_behind():
    claims = section(format_report(canned_report()), "The paper's claim, here")
    assert "at least 35.0 and at most 60.0 points below the stochastic one" in claims
    assert "is ahead at 16 (+0.5); behind at 4 (-5.0), 9 (-3.0). *Ahead*" in claims


def test_the_verdict_turns_with_the_numbers():
    report = canned_report()
    for row, value in (("fixed-small", 0.7), ("fixed-middle", 0.8), ("fixed-large", 0.9)):
        for count in report["counts"]:
            report["regimes"][row]["accuracy"][count] = spread_of([value - 0.3] * 3)
    claims = section(format_report(report), "The paper's claim, here")
    assert "ahead at 4" in claims
    assert "behind at" not in claims
    assert ", as in the paper." in claims
    report["regimes"]["fixed-small"]["accuracy"]["16"] = spread_of([1.2] * 3)
    assert "not always below" in format_report(report)


def test_specialists_with_positions_stand_beside_the_positioned_model():
    names = (*CURVES, *POSITIONED)
    report = canned_report(names=names)
    report["regimes"]["fixed-middle-positions"]["accuracy"]["9"] = spread_of([0.5] * 3)
    page = format_report(report)
    claims = section(page, "The paper's claim, here").split("with positions for both")[1]
    own = difference(report, "positions", "fixed-small-positions", "4")
    assert cells(claims, "fixed 4, positions")[0] == f"**{points(own, signed=True)}**"
    middle = difference(report, "positions", "fixed-middle-positions", "9")
    assert middle["mean"] > 0.2
    gains = {
        count: difference(report, "positions", name, count)
        for name, count in zip(POSITIONED, report["counts"], strict=True)
    }
    assert claims.strip().endswith(f"the one model is {places_of(gains)}.")
    assert f"ahead at 9 ({100 * middle['mean']:+.1f})" in claims
    assert cells(section(page, "Positions"), "fixed 9, positions")[1] == "50.0 ± 0.0"
    for missing in POSITIONED:
        report = canned_report(names=tuple(name for name in names if name != missing))
        assert "with positions for both" not in format_report(report)


def test_grids_stand_in_the_table_of_unseen_counts():
    table = section(format_report(canned_report()), "Counts that no model was trained with")
    assert "at 2x3" in table
    assert cells(table, "stochastic 2:3:5") == ["61.0 ± 1.0", "71.0 ± 1.0"]


def test_unseen_counts_are_compared_with_the_nearest_that_was_trained():
    """6 tokens are nearer to 4 than to 9, 7 are not; 12 to 9, 13 to 16."""
    report = canned_report()
    near = {"1x6": "4", "7x1": "9", "3x4": "9", "13x1": "16", "2x8": "16", "1x5": "4", "11x1": "9"}
    assert {label: nearest_trained(report, label) for label in near} == near
    assert [nearest_trained(report, label) for label in ("1", "2x3", "3x4", "2x4", "25")] == [
        *("4", "4", "9", "9", "16")
    ]
    gain = below_nearest(report, "positions")
    assert gain == {"25": pytest.approx(0.9 - 0.97), "2x3": pytest.approx(0.86 - 0.83)}
    said = section(format_report(report), "Counts that no model was trained with")
    assert (
        "2:3:5, positions: at 1 of 2 within 5 points below it, 2x3 (+3.0); not at 25 (-7.0)."
        in said
    )
    assert "other grids: at 1 of 2 within 5 points below it, 25 (-1.0); not at 2x3 (-9.0)." in said


def test_the_page_of_unseen_counts_has_each_part_alone():
    page = format_unseen(canned_report(names=("start", *SUITES["unseen"])))
    others = section(page, "At others")
    assert "| 2:3:5, positions at the projector alone | 51.0 ± 1.0 | 51.0 ± 1.0 |" in others
    assert "| 2:3:5, positions | -7.0 | +3.0 |" in others
    assert "| trained with | 25 (to 16) | 2x3 (to 4) |" in others


def report_far_out(**accuracies: float) -> dict[str, Any]:
    """Report of the suite `extremes`: at 1 and 64 tokens 50 % where nothing is said."""
    report = canned_report(names=("start", *SUITES["extremes"]))
    report["unseen"] = ["1", "64"]
    for name, row in report["regimes"].items():
        value = accuracies.get(name.replace("-", "_"), 0.5)
        for index, accuracy in enumerate((row["accuracy"], *row["accuracy_by_kind"].values())):
            for count in report["unseen"]:
                seeds = [value - 0.1 * index + 0.02 * seed for seed in range(3)]
                accuracy[count] = spread_of(seeds)
    return report


def test_models_for_every_count_are_compared_far_from_their_counts():
    page = format_extremes(report_far_out(positions_spread_finer=0.96))
    finer = "2:3:5, positions, other grids, 10 % at 6 x 8, 8 x 6"
    head = page.split("\n## ")[0]
    accuracies, differences = head.split("Beside the trained count")
    assert "| trained with | at 4 | at 9 | at 16 | at 1 | at 64 |" in head
    assert cells(accuracies, finer)[-1] == "98.0 ± 2.0"
    assert cells(differences, finer)[-1] == "+7.0"  # to 90, 91 and 92 %
    assert "| trained with | 1 (to 4) | 64 (to 16) |" in head
    assert f"- {finer}: at 2 of 2 within 5 points" in head
    assert "or at grids that reach the encoder's" in head


def test_fewer_tokens_are_compared_with_specialists_of_theirs_and_one_of_the_small_count():
    page = format_extremes(report_far_out(fixed_fewest_positions_ready=0.7))
    part = section(page, "Fewer tokens than the small count: 1")
    assert "| trained with | asked at | mean | colour | odd | read |" in part
    # The specialist for 4 has 86, 87 and 88 %, and that for 1 70, 72 and 74 %: -16, -15, -14.
    assert cells(part, "fixed 4, positions") == [
        *("4", "87.0 ± 1.0"),
        *("87.0 ± 1.0", "87.5 ± 1.0", "67.0 ± 1.0"),
    ]
    ready = "fixed 1, positions, started from all counts"
    assert cells(part, ready) == [
        *("1", "72.0 ± 2.0"),
        *("62.0 ± 2.0", "52.0 ± 2.0", "42.0 ± 2.0"),
    ]
    assert f"- {ready}: -15.0 ± 1.0 points beside fixed 4, positions, paired by seed." in part
    assert f"({ready}) stays 15.0 points below: at this size and budget 1 does not reach" in part
    of_one = [line for line in part.splitlines() if line.startswith("| 2:3:5, positions, other g")]
    assert [line.split(" | ")[1] for line in of_one] == ["4", "1", "1", "1", "1"]


def test_the_page_says_how_near_specialists_and_models_for_every_count_come():
    report = report_far_out(fixed_fewest_positions=0.84, positions_spread_fewest=0.8)
    part = format_extremes(report)
    assert "The best specialist (fixed 1, positions) is within 5 points. The best of the" in part
    assert "(2:3:5, positions, other grids, 10 % at 1): -4.0 ± 0.0 beside it." in part


def test_a_report_that_was_not_asked_at_fewer_tokens_has_no_such_section():
    report = report_far_out()
    report["unseen"].remove("1")
    assert "Fewer tokens" not in format_extremes(report)


def test_each_lever_is_measured_against_its_own_specialists():
    report = canned_report(names=("start", *SUITES["gap"]))
    report["regimes"]["fixed-small-positions-wide"]["accuracy"]["4"] = spread_of([0.65, 0.66, 0.7])
    page = format_gap(report)
    table = page.split("## Accuracies")[0]
    assert cells(table, "as in the paper")[:3] == ["-5.0 ± 0.0", "-3.0 ± 0.0", "+0.5 ± 0.0"]
    assert cells(table, "positions, for both")[:3] == ["-3.0 ± 0.0", "-1.0 ± 0.0", "-2.0 ± 0.0"]
    wide = cells(table, "and twice as wide, for both")
    assert wide == ["+4.0 ± 1.7", "-12.0 ± 0.0", "-", "288k : 576k"]
    assert "- as in the paper: ahead at 16 (+0.5); behind at 4 (-5.0), 9 (-3.0)." in page
    # +4.0 ± 1.7 of three seeds: 4.303 * 1.73 / sqrt(3) is 4.3, so these do not tell.
    assert "- and twice as wide, for both: undecided at 4 (+4.0); behind at 9 (-12.0)." in page


def test_the_gap_has_its_figure(tmp_path):
    report = canned_report(names=("start", *SUITES["gap"]))
    write_gap_figure(report, tmp_path / "gap.png")
    assert len(Image.open(tmp_path / "gap.png").convert("L").getcolors(256)) > 20
    assert {len(gains(report, lever)) for lever in LEVERS} == {2, 3}


@pytest.mark.parametrize("sideways", [False, True])
def test_gains_are_drawn_at_their_places_with_their_bars(sideways):
    rows = [
        {"4": spread_of([0.01, 0.03]), "9": spread_of([-0.05, -0.05])},
        {"4": spread_of([0.04])},
    ]
    figure, axes = plt.subplots()
    draw_gains(axes, ["4", "9", "16"], rows, sideways=sideways)
    lines = [container.lines[0].get_xydata() for container in axes.containers]
    places, means = (1, 0) if sideways else (0, 1)
    assert [line[:, means].round(6).tolist() for line in lines] == [[2, 4], [-5], []]
    assert [line[:, places].round().tolist() for line in lines] == [[0, 1], [0], []]
    ends = axes.containers[0].lines[2][0].get_segments()
    assert [round(abs(a - b), 4) for a, b in (end[:, means] for end in ends)] == [2.8284, 0]
    plt.close(figure)


def limited_report() -> dict[str, Any]:
    """One model that is behind on unseen canvases, but for 1,200 canvases seen often."""
    report = canned_report(names=("start", *SUITES["limited"]))
    ahead = report["regimes"]["positions-1200-x4"]
    ahead["accuracy"]["9"] = spread_of([0.95, 0.96, 0.97])
    ahead["trained_accuracy"]["9"] = spread_of([0.96, 0.97, 0.98])
    return report


def test_limited_data_is_compared_budget_by_budget():
    page = format_limited(limited_report())
    table = section(page, "One model minus the specialist, with positions")
    rows = [line for line in table.splitlines() if line.startswith("| 1,200")]
    assert [row.split(" | ")[3:] for row in rows] == [
        ["-5.0 ± 0.0", "-3.0 ± 0.0", "+0.5 ± 0.0 |"],
        ["-5.0 ± 0.0", "+2.0 ± 0.0", "+0.5 ± 0.0 |"],
    ]
    assert (
        "- 1,200 canvases, 1,000 steps: ahead at 9 (+2.0), 16 (+0.5); behind at 4 (-5.0)." in page
    )
    assert "| 1,200 | 1,000 | 15 |" in table
    assert "| fresh | 1,000 | 1 |" in table


def test_one_model_with_positions_is_compared_with_specialists_without_them_too():
    report = limited_report()
    plain = report["regimes"]["fixed-middle-1200-x4"]["accuracy"]["9"]
    plain.update(spread_of([0.94, 0.95, 0.96]))
    table = section(format_limited(report), f"One model minus the specialist, {CROSSED}")
    rows = [line for line in table.splitlines() if line.startswith("| 1,200")]
    # 95, 96 and 97 % minus 94, 95 and 96 %, where specialists with positions have 93, 94 and 95 %.
    assert rows[1].split(" | ")[4] == "+1.0 ± 0.0"
    of_one_kind = {name: row for name, row in report["regimes"].items() if "positions" not in name}
    assert CROSSED not in format_limited({**report, "regimes": of_one_kind})


def test_regularisation_is_told_from_the_training_canvases():
    report = limited_report()
    rows = report["regimes"]
    # At 16 tokens it is ahead, at 4 and 9 behind on both, but for 9 tokens of 1,200-x4; and of
    # 300-x1 behind on unseen canvases alone.
    rows["positions-300-x1"]["trained_accuracy"]["4"] = spread_of([0.91, 0.92, 0.93])
    specialist = rows["fixed-middle-positions-1200-x4"]["trained_accuracy"]["9"]["values"]
    shifts = (-0.003, 0.004, 0.011)  # 0.4 points: no seed more says which way
    values = [value + shift for value, shift in zip(specialist, shifts, strict=True)]
    rows["positions-1200-x4"]["trained_accuracy"]["9"] = spread_of(values)
    page = section(format_limited(report), "Is it regularisation?")
    # The specialists' 5.0 minus 4.5 is 0.53 ± 0.23 before rounding: 0.53 ± 0.58 with confidence.
    assert "| +4.5 ± 0.2 | +5.0 ± 0.0 | +0.5 (-0.0 to +1.1) |" in page
    _, table = page.split("With positions: the one model's difference is the smaller one on 0 of 6")
    assert table.startswith(
        " budgets, the larger one on 1, and undecided on 5. Of 18 comparisons it is:"
    )
    assert cells(table, "ahead") == ["6", "1", "0"]
    assert cells(table, "undecided") == ["0", "0", "0"]
    assert cells(table, "behind") == ["1", "0", "10"]


def test_runs_that_did_not_learn_are_named():
    report = limited_report()
    assert section(format_limited(report), "Runs that did not learn").endswith("\n\nNone.\n")
    row = report["regimes"]["fixed-small-positions-300-x1"]["accuracy"]
    row["4"] = spread_of([0.85, 0.52, 0.87])
    said = section(format_limited(report), "Runs that did not learn")
    (line,) = [line for line in said.splitlines() if line.startswith("- ")]
    assert line == (
        "- fixed 4, positions, 300 canvases, 1 x the steps, seed 1: 52.0 at 4 tokens, "
        "as in the paper 86.0."
    )


def test_the_difference_on_training_canvases_has_its_sign_and_its_order():
    report = canned_report(names=("start", *SUITES["limited"]))
    for name, shift in (("stochastic", 0.02), ("fixed-small", 0.11)):
        row = report["regimes"][f"{name}-300-x1"]
        row["trained_accuracy"] = {
            count: spread_of([value + shift for value in unseen["values"]])
            for count, unseen in row["accuracy"].items()
        }
    for name in ("positions", *(f"fixed-{size}-positions" for size in ("small", "middle"))):
        row = report["regimes"][f"{name}-300-x1"]
        row["trained_accuracy"] = {
            count: spread_of([value - 0.01 for value in unseen["values"]])
            for count, unseen in row["accuracy"].items()
        }
    page = section(format_limited(report), "Is it regularisation?")
    # Of the specialists: (11 + 5 + 5) / 3 points; with positions (-1 - 1 + 5) / 3.
    paper, positions = (
        f"| {one} ± 0.0 | {specialists} ± 0.0 | {smaller} ({smaller} to {smaller}) |"
        for one, specialists, smaller in (("+2.0", "+7.0", "+5.0"), ("-1.0", "+1.0", "+2.0"))
    )
    assert f"| 300 | 1,000 {paper}{positions[1:]}" in page
    assert "As in the paper: the one model's difference is the smaller one on 1 of 6 bud" in page
    report["regimes"]["stochastic-300-x1"]["trained_accuracy"]["4"] = spread_of([1.8, 1.8, 1.8])
    page = section(format_limited(report), "Is it regularisation?")
    assert "As in the paper: the one model's difference is the smaller one on 0 of 6 bud" in page


def test_a_mean_beyond_its_standard_error_is_undecided_within_the_interval():
    report = limited_report()
    row = report["regimes"]["stochastic-300-x1"]["accuracy"]
    # Minus 85, 86 and 87 %: 3, 3 and 1 points, 2.33 ± 1.15, a standard error of 0.67.
    row["4"] = spread_of([0.88, 0.89, 0.88])
    assert "300 canvases, 1,000 steps: ahead at 16 (+0.5); undecided at 4 (+2.3)" in format_limited(
        report
    )


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([0.01, 0.02, 0.03], 0.0248),  # t of 2 degrees of freedom is 4.303, sd 0.01
        ([0.0, 0.1], 0.6353),  # 12.706 * 0.0707 / sqrt(2)
        ([0.0, 0.02] * 8, 0.0055),  # 2.131 * 0.01033 / 4
        ([0.0, 0.02] * 200, 0.00102),  # the last of the table, 2.086: wider than 1.966
    ],
)
def test_the_interval_is_students(values, half):
    assert half_width(spread_of(values)) == pytest.approx(half, rel=0.03)


def test_quantiles_are_of_students_t():
    """P(|t| < q) is 0.95, by the density of t with n degrees of freedom, summed."""
    for n, quantile in enumerate(T_QUANTILES, 1):
        steps = np.linspace(0, quantile, 20001)
        density = math.gamma((n + 1) / 2) / (math.gamma(n / 2) * math.sqrt(n * math.pi))
        inside = 2 * np.trapezoid(density * (1 + steps**2 / n) ** (-(n + 1) / 2), steps)
        assert inside == pytest.approx(0.95, abs=1e-4), n


def test_places_are_decided_by_the_interval_alone():
    gains = {
        "4": spread_of([0.01, 0.02, 0.03]),  # 2.0 ± 2.5
        "9": spread_of([0.02, 0.03, 0.04]),  # 3.0 ± 2.5
        "16": spread_of([-0.02, -0.03, -0.04]),
        "25": spread_of([0.0004] * 3),  # shown as 0
        "36": spread_of([0.5]),  # one seed
    }
    assert [place(gain) for gain in gains.values()] == [
        *("undecided", "ahead", "behind", "undecided", "undecided")
    ]
    assert places_of(gains) == (
        "ahead at 9 (+3.0); undecided at 4 (+2.0), 25 (+0.0), 36 (+50.0); behind at 16 (-3.0)"
    )


QUICK_LIMITED_NAMES = ("start", *QUICK_LIMITED.regimes)


def test_a_part_of_the_suite_on_limited_data_has_its_page_and_its_figure(tmp_path):
    report = canned_report(seeds=1, names=QUICK_LIMITED_NAMES)
    page = format_limited(report)
    assert "as in the paper" not in page
    table = section(page, "One model minus the specialist, with positions")
    assert "| 300 | 1,000 | 60 | -5.0 | - | - |" in table
    assert "| fresh | 1,000 | 1 | -5.0 | - | - |" in table
    write_limited_figure(report, tmp_path / "limited.png")


def test_quick_checks_on_limited_data_name_what_fails():
    report = canned_report(seeds=1, names=QUICK_LIMITED_NAMES)
    checks = quick_limited_checks(report)
    assert len(checks) == 4
    assert all(check.holds for check in checks)
    for name, bound in LIMITED_GAIN.items():  # each budget has a bound of its own
        budget = copy.deepcopy(report)
        row = budget["regimes"][f"positions-{name}"]["accuracy"]
        for accuracy, number in ((0.85 + bound + 0.01, 0), (0.85 + bound - 0.01, 1)):
            row["4"] = spread_of([accuracy])
            failed = [check for check in quick_limited_checks(budget) if not check.holds]
            assert len(failed) == number, name
    report["regimes"]["positions-300-x1"]["accuracy"]["4"] = spread_of([0.25])
    failed = [check for check in quick_limited_checks(report) if not check.holds]
    assert [check.claim for check in failed] == [
        "accuracy at 4 on 300 canvases, one model minus the specialist",
        "the one model at 4 on 300 canvases",
    ]


def test_limited_data_has_its_figure(tmp_path):
    write_limited_figure(limited_report(), tmp_path / "limited.png")
    assert len(Image.open(tmp_path / "limited.png").convert("L").getcolors(256)) > 20


def test_odds_and_ways_to_mix_have_their_tables():
    page = format_report(canned_report())
    assert cells(section(page, "Odds"), "stochastic 5:3:2")[3:] == ["58.5", "59.5", "59.6"]
    mixing = section(page, "Ways to mix counts")
    assert cells(mixing, "one count a step, 2:3:5")[0] == "80.0 ± 1.0"
    assert cells(mixing, "every image at all counts")[2] == "96.0 ± 1.0"


def test_cost_is_compared_with_the_largest_count():
    table = section(format_report(canned_report()), "Cost")
    assert cells(table, "fixed 4") == ["18000", "72,000 (-75%)", "61 ± 1", "2.0 B", "8.2"]
    assert cells(table, "fixed 16")[1] == "288,000"


def test_every_kind_of_question_has_its_column():
    table = section(format_report(canned_report()), "By kind of question")
    assert "| trained with | at | colour | odd | read |" in table
    assert "| fixed 4 | 16 | 56.0 ± 1.0 | 56.5 ± 1.0 | 36.0 ± 1.0 |" in table
    assert "read 39" in table


def test_one_seed_has_no_spread_and_says_so():
    page = format_report(canned_report(seeds=1))
    assert "1 seed (no spread)" in page
    assert "±" not in page


def test_two_regimes_are_enough_for_a_report(tmp_path):
    report = canned_report(seeds=1, names=("start", "fixed-large", "stochastic"))
    page = format_report(report)
    assert "## Odds" not in page
    assert "![Odds]" not in page
    write_figures(report, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["claim.png", "figure1.png", "figure3.png"]


def test_the_terminal_shows_every_count():
    lines = accuracy_table(canned_report(seeds=1)).splitlines()
    assert lines[0].split()[-5:] == ["4", "9", "16", "25", "2x3"]
    assert len({len(line) for line in lines}) == 1


def test_figures_are_drawn(tmp_path: Path):
    write_figures(canned_report(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["claim.png", "figure1.png", "figure3.png", "odds.png"]
    for name in names:
        assert len(Image.open(tmp_path / name).convert("L").getcolors(256)) > 20, name


def test_positioned_specialists_and_many_kinds_are_drawn_too(monkeypatch):
    report = canned_report(names=(*CURVES, *POSITIONED))
    report["questions"] = {f"kind {i}": 4 for i in range(20)}
    for row in report["regimes"].values():
        row["accuracy_by_kind"] = dict.fromkeys(report["questions"], row["accuracy"])
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, path: drawn.update({path.stem: figure})
    )
    write_figures(report, Path())
    (legend,) = drawn["claim"].legends
    titles = [text.get_text() for text in legend.get_texts()]
    assert titles[-4:] == [f"{name}, positions (ours)" for name in ("2:3:5", *FIXED)]
    shown = {
        bars.get_label().removesuffix(" (ours)"): bars for bars in drawn["claim"].axes[0].containers
    }
    assert len(shown) == 8
    for row in report["regimes"].values():
        if row["title"] not in shown:
            continue
        line, _, (spread,) = shown[row["title"]]
        values = [row["accuracy"][count] for count in report["counts"]]
        assert line.get_ydata() == pytest.approx([100 * value["mean"] for value in values])
        lengths = [end[1][1] - end[0][1] for end in spread.get_segments()]
        assert lengths == pytest.approx([200 * value["spread"] for value in values])
        assert line.get_linestyle() == ("--" if "positions" in row["title"] else "-")
    panels = [axes for axes in drawn["figure3"].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == list(report["questions"])
    assert len({round(axes.get_position().x0, 2) for axes in panels}) <= 5
    for figure in drawn.values():
        plt.close(figure)


def test_quick_checks_name_what_fails():
    report = canned_report(seeds=1, names=("start", "fixed-large", "stochastic"))
    assert all(check.holds for check in quick_checks(report))
    collapsed = copy.deepcopy(report)
    collapsed["regimes"]["fixed-large"]["accuracy"]["4"] = spread_of([0.7])
    (failed,) = [check for check in quick_checks(collapsed) if not check.holds]
    assert str(failed) == (
        "FAILED: accuracy at 4, stochastic minus fixed 16 must exceed 0.15, got 0.100"
    )
    unread = copy.deepcopy(report)
    unread["regimes"]["stochastic"]["accuracy_by_kind"]["read"]["16"] = spread_of([0.1])
    (failed,) = [check for check in quick_checks(unread) if not check.holds]
    assert "`read` at 16" in failed.claim
