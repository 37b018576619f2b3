"""The page of the routing study, written from its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

LADDERS = {"trained": "Counts of the training", "unseen": "With counts that were never trained"}
WEIGHTING = {"kinds": "kinds alike", "questions": "questions alike"}


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
        "the cheapest of `validation` that costs at most a point, a standard error of the cost "
        "included, because the cheapest of many costs more on other questions. The target is "
        "*met* where every checkpoint meets it by its mean over router seeds. A cascade has no "
        "seeds, and its threshold is chosen on the questions that its curves were fitted on.",
    ]
    for name, title in LADDERS.items():
        if name in report:
            lines += ["", f"## {title}: {', '.join(report[name]['counts'])}", ""]
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


def verdict(study: dict[str, Any]) -> str:
    """Return the sentence that says which rules meet the target, from the study's means."""
    target = (
        f"always-largest minus {100 * study['max_drop']:g} point at <= "
        f"{100 * study['limit']:g} % of its tokens"
    )
    parts = []
    for weighting, name in WEIGHTING.items():
        means = [row for row in study["means"] if row["weighting"] == weighting]
        met = [row["rule"] for row in means if row["met"]]
        missed = [row["rule"] for row in means if not row["met"]]
        words = [f"met by {', '.join(met)}" if met else "", f"missed by {', '.join(missed)}"]
        parts.append(
            f"{name}: {'; '.join(words if missed and met else [w for w in words if w][:1])}"
        )
    return f"Target, {target}. {'. '.join(part.capitalize() for part in parts)}."


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
                row["rule"],
                WEIGHTING[row["weighting"]],
                _spread(row, "drop", 2),
                f"{100 * max(r['drop'] for r in of_rule):.2f}",
                _spread(row, "share", 1),
                f"{100 * largest:.1f}",
                _spread(row, "tries_share", 1) if row["rule"].startswith("cascade") else "",
                "none" if None in hindsight else f"{100 * mean(hindsight):.1f}",
                f"{_yes(row['met'])} ({row['checkpoints_met']} of {row['checkpoints']})",
                _yes(row["met_with_all_tries"]) if row["rule"].startswith("cascade") else "",
            ]
        )
    yield from _table(
        [
            *("rule", "weights", "drop", "highest", "tokens, %", "highest"),
            *("all tries, %", "hindsight, %", "target met (checkpoints)", "with all tries"),
        ],
        rows,
    )


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
