"""The page of the routing study, written from its report.

``python -m experiments.routing.pages FOLDER ...`` writes the pages of reports anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.routing.study import CASCADES, TRIVIAL, summarise
from tokenflex.files import read_json, write_json, write_text

LADDERS = {"trained": "Counts of the training", "unseen": "With counts that were never trained"}
WEIGHTING = {"kinds": "kinds alike", "questions": "questions alike"}
NAMES = {"cascade, raw": "raw cascade"}
RULES = {
    True: "a standard error of the cost included, because the cheapest of many costs more on other "
    "questions",
    False: "without a standard error of the cost: these settings are of an older rule, and the "
    "cheapest of many costs more on other questions",
}
"""Rules that settings were chosen by, with a standard error or without."""


def page_of(report: dict[str, Any]) -> str:
    """Return the Markdown page of a report of :mod:`experiments.routing`."""
    trained = report["trained"]
    checkpoints = [*trained["always"]]
    lines = [
        f"# Counts chosen for you: {report['data']}",
        "",
        f"**{verdict(trained)}**",
        "",
        f"Checkpoints: {', '.join(checkpoints)}, {report['seeds']} router "
        f"seeds each. Routers, settings and calibration come from {report['questions']['fitted']} "
        f"questions of the split `validation`; the figures are of {report['questions']['test']} of "
        "`test`. *Drop* is the accuracy below always using the largest count, in points, *tokens* "
        "the share of its vision tokens, and *all tries* counts the discarded answers of a cascade "
        "too. After ±: standard deviation over router seeds / over checkpoints. *Hindsight* is the "
        "share that the best setting on the test split would take for the same drop. A setting is "
        f"the cheapest of `validation` that costs at most a point, {RULES[trained['margin'] > 0]}. "
        "The target is *met* where every checkpoint meets it by its mean over router seeds, with "
        "the tokens of all tries; *runs* are a checkpoint with a router seed each. A cascade has "
        "no seeds, and its threshold is chosen on the questions that its curves were fitted on. "
        f"The *raw cascade* has confidences without a curve.{_trivial(trained)}",
    ]
    for name, title in LADDERS.items():
        if name in report:
            lines += ["", f"## {title}: {', '.join(report[name]['counts'])}", ""]
            if name != "trained":
                lines += [verdict(report[name]), ""]
            lines += [*_ladder(report[name])]
    lines += [
        "",
        "## Calibration",
        "",
        "Expected calibration error in points: 15 bins of equal width, equation 3 of Guo et al. "
        "2017, questions alike, means over checkpoints and router seeds. *before* is the "
        "router's sigmoid and the probability of an answer's least certain token, *after* each "
        "count's curve. `cascade` has the answers that a cascade at 0.9 ends with.",
        "",
        *_calibration(trained),
        "",
        "![Reliability of the first checkpoint with seed 0](reliability.png)",
        "",
        "![Accuracy against tokens of the first checkpoint with seed 0](curve.png)",
        "",
        f"Measured at commit `{report['commit']}` on {report['machine']}"
        f"{', ' + report['note'] if report['note'] else ''}.",
        "",
    ]
    return "\n".join(lines)


def _trivial(study: dict[str, Any]) -> str:
    """Describe the rules that see no picture, if the report is not older than they are."""
    if not {row["rule"] for row in study["rows"]} & {*TRIVIAL}:
        return ""
    return (
        " *One count* is the same for all questions, and *first word* a table of one for each "
        "first word of a question: both see no picture."
    )


def verdict(study: dict[str, Any]) -> str:
    """Return the sentences that say which rules meet the target, from the study's means.

    The tokens of a cascade are those of all tries. Where its last answers alone would meet the
    target, both figures are given.
    """
    target = (
        f"always-largest minus {100 * study['max_drop']:g} point at <= "
        f"{100 * study['limit']:g} % of its tokens, discarded answers included"
    )
    parts = []
    for weighting, name in WEIGHTING.items():
        means = [row for row in study["means"] if row["weighting"] == weighting]
        if not means:
            continue
        met = [_name(row["rule"]) for row in means if row["met"]]
        missed = [_name(row["rule"]) for row in means if not row["met"]]
        words = [f"met by {', '.join(met)}" if met else "", f"missed by {', '.join(missed)}"]
        parts.append(
            f"{name}: {'; '.join(words if missed and met else [w for w in words if w][:1])}"
        )
        parts += [
            f"the last answers of the {_name(row['rule'])} alone take {100 * row['share']:.1f} % "
            f"for {100 * row['drop']:.2f} points, all tries {100 * row['tries_share']:.1f} %"
            for row in means
            if row["met_by_last_answers"] and not row["met"]
        ]
    return f"Target, {target}. {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _ladder(study: dict[str, Any]) -> Iterable[str]:
    counts = study["counts"]
    yield from _table(
        ["accuracy, always", *counts],
        [
            [f"{checkpoint}, {WEIGHTING[weighting]}", *(f"{100 * row[c]:.1f}" for c in counts)]
            for checkpoint, by_weighting in study["always"].items()
            for weighting, row in by_weighting.items()
        ],
    )
    yield ""
    rows = []
    for row in study["means"]:
        of_rule = [r for r in study["rows"] if all(r[k] == row[k] for k in ("rule", "weighting"))]
        hindsight = [r["hindsight_share"] for r in of_rule]
        largest = max(r["share"] for r in of_rule)
        rows.append(
            [
                _name(row["rule"]),
                WEIGHTING[row["weighting"]],
                _spread(row, "drop", 2),
                f"{100 * max(r['drop'] for r in of_rule):.2f}",
                _spread(row, "share", 1),
                f"{100 * largest:.1f}",
                _spread(row, "tries_share", 1) if row["rule"] in CASCADES else "",
                "none" if None in hindsight else f"{100 * mean(hindsight):.1f}",
                f"{_yes(row['met'])} ({row['checkpoints_met']} of {row['checkpoints']}; "
                f"{row['runs_met']} of {row['runs']})",
                _yes(row["met_by_last_answers"]) if row["rule"] in CASCADES else "",
            ]
        )
    yield from _table(
        [
            *("rule", "weights", "drop", "highest", "tokens, %", "highest"),
            *("all tries, %", "hindsight, %", "target met (checkpoints; runs)"),
            "by last answers",
        ],
        rows,
    )


def _name(rule: str) -> str:
    return NAMES.get(rule, rule)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _spread(row: dict[str, Any], figure: str, digits: int) -> str:
    """Return the mean in per cent with its two spreads."""
    shown = [
        "-" if value is None else f"{100 * value:.{digits}f}"
        for value in (row["of_seeds"][figure], row["of_checkpoints"][figure])
    ]
    return f"{100 * row[figure]:.{digits}f} ± {' / '.join(shown)}"


def _calibration(study: dict[str, Any]) -> Iterable[str]:
    measured = study["calibration"]
    rows = []
    for part, name in (("router", "p(right) of the router"), ("answers", "confidence")):
        for label in measured[0][part]:
            rows.append(
                [
                    f"{name}, {label}" + (" at 0.9" if label == "cascade" else ""),
                    *(
                        f"{100 * mean(entry[part][label][when] for entry in measured):.1f}"
                        for when in ("before", "after")
                    ),
                ]
            )
    yield from _table(["", "before", "after"], rows)
    yield ""
    yield from worsened(measured)
    stated = measured[0]["stated"]
    for when in ("before", "after"):
        sure = [entry["at_least"][when] for entry in measured if entry["at_least"][when]["answers"]]
        if sure:
            answers, probability, right = (
                f"{100 * mean(entry[key] for entry in sure):.1f}"
                for key in ("answers", "mean", "right")
            )
            yield (
                f"- {when} calibration, a cascade at {stated:g} ends {answers} % of its answers "
                f"with at least that confidence, {probability} % on average, and {right} % of them "
                "are right."
            )


def worsened(measured: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield a line for each count whose curve raised the error of some fit, with the worst fit."""
    for part, name in (("router", "p(right) of the router"), ("answers", "confidence")):
        for label in measured[0][part]:
            rises = {
                (entry["checkpoint"], entry["seed"]): entry[part][label]
                for entry in measured
                if entry[part][label]["after"] > entry[part][label]["before"]
            }
            if not rises:
                continue
            worst = max(rises, key=lambda fit: rises[fit]["after"] - rises[fit]["before"])
            before, after = (f"{100 * rises[worst][when]:.1f}" for when in ("before", "after"))
            yield (
                f"- {name}, {label}: worse after calibration in {len(rises)} of {len(measured)} "
                f"fits, at most from {before} to {after} ({worst[0]}, seed {worst[1]})."
            )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def renew(folder: Path) -> None:
    """Write the means and the page of a report anew, from the rows that were measured."""
    report = read_json(folder / "report.json")
    for name in LADDERS:
        if name in report:
            study = report[name]
            study["means"] = summarise(study["rows"], study["max_drop"], study["limit"])
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", page_of(report))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        renew(Path(argument))
