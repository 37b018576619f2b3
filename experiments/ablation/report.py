"""``report.md``: tables with mean and spread over seeds beside the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ablation import paper
from experiments.ablation.results import PLACES_EXPLAINED, difference, place, places_of
from experiments.ablation.suites import (
    ANY_COUNT,
    MAIN,
    MIXING,
    ODDS,
    POSITIONED,
    SPECIALISTS,
)
from experiments.ablation.tables import (
    accuracy_rows,
    asked_and_seeds,
    markdown_table,
    nearest_sentence,
    points,
    starts_of,
    task_of,
)

PAPERS = "the paper's, on its benchmarks (second-hand)"


def format_report(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""

    def known(names: Sequence[str]) -> list[str]:
        return [name for name in names if name in report["regimes"]]

    counts, main, any_count = report["counts"], known(MAIN), known(ANY_COUNT)
    sections = [_head(report)]
    if "stochastic" in main and len(main) > 1:
        sections.append(_claims(report))
    rows = [*starts_of(report), *main]
    sections.append(_accuracy(report, "Trained with, asked at", rows, counts, paper.TRAINED_WITH))
    if report["unseen"]:
        title = "Counts that no model was trained with"
        sections.append(_accuracy(report, title, [*main, *any_count], report["unseen"]))
    if report["unseen"] and any_count:
        sections.append("Beside the nearest trained count, in points:")
        sections.append("\n".join(f"- {nearest_sentence(report, name)}" for name in any_count))
    for title, names, theirs in (
        ("Odds", known(ODDS), paper.ODDS),
        ("Ways to mix counts", known(MIXING), {}),
        ("Positions", known(("stochastic", *ANY_COUNT, *POSITIONED)), {}),
    ):
        if len(names) > 1:
            sections.append(_accuracy(report, title, names, counts, theirs))
    sections += [_cost(report), _kinds(report, main), *_figures(known(ODDS))]
    return "\n\n".join(sections) + "\n"


def _head(report: Mapping[str, Any]) -> str:
    first = report["regimes"][starts_of(report)[0]]
    regime = next(row for row in report["regimes"].values() if not row["is_start"])
    return (
        f"# Ablation of the vision-token count, scale {report['scale']}\n\n"
        f"{asked_and_seeds(report)}\n\n"
        f"Each seed has one start, {report['start']['warm_up_steps']} steps of the encoder "
        f"alone and {first['steps']} at {report['counts'][-1]} tokens; every regime goes on "
        f"from it for {regime['steps']} steps of {report['batch_size']} shown {_shown(report)}, "
        "with the same order of data, the same learning rates and schedule."
    )


def _claims(report: Mapping[str, Any]) -> str:
    """Compare both halves of the paper's claim with the results."""
    table, at_own, at_other = _beside_specialists(report, "stochastic", SPECIALISTS)
    section = (
        "## The paper's claim, here\n\n"
        f"Stochastic minus the fixed model, paired by seed, in points:\n\n{table}\n\n"
        f"{_verdict(at_own, at_other)}"
    )
    if all(name in report["regimes"] for name in ("positions", *POSITIONED)):
        table, at_own, _ = _beside_specialists(report, "positions", POSITIONED)
        section += (
            f"\n\nThe same with positions for both:\n\n{table}\n\n"
            f"On a fixed model's own count the one model is {places_of(at_own)}."
        )
    return section


def _beside_specialists(
    report: Mapping[str, Any], general: str, specialists: Sequence[str]
) -> tuple[str, dict[str, dict[str, Any]], list[float]]:
    """Return the table of gains over specialists, and the gains at their own and other counts.

    Gains at a specialist's own count are bold in the table and by count; others are in points.
    ``specialists`` are those for the small, middle and large count; some may not be in the report.
    """
    counts = report["counts"]
    rows = []
    at_own: dict[str, dict[str, Any]] = {}
    at_other: list[float] = []
    for name, own in zip(specialists, counts, strict=True):
        if name not in report["regimes"]:
            continue
        cells = []
        for count in counts:
            gain = difference(report, general, name, count)
            cell = points(gain, signed=True)
            cells.append(f"**{cell}**" if count == own else cell)
            if count == own:
                at_own[count] = gain
            else:
                at_other.append(100 * gain["mean"])
        rows.append([report["regimes"][name]["title"], *cells])
    head = ["compared with", *(f"at {count}" for count in counts)]
    return markdown_table(head, rows), at_own, at_other


def _verdict(at_own: Mapping[str, Mapping[str, Any]], at_other: Sequence[float]) -> str:
    """Say whether fixed models are behind at other counts, and ahead at their own."""
    least_gain, most_gain = min(at_other), max(at_other)
    if least_gain > 0:
        first = (
            f"Off their own count, fixed models are at least {least_gain:.1f} and at most "
            f"{most_gain:.1f} points below the stochastic one."
        )
    else:
        first = (
            "Off its own count, a fixed model is not always below the stochastic one: the "
            f"difference goes from {least_gain:+.1f} to {most_gain:+.1f} points."
        )
    second = f"On a fixed model's own count (bold) the stochastic one is {places_of(at_own)}"
    if all(place(gain) == "ahead" for gain in at_own.values()):
        second += ", as in the paper."
    elif all(place(gain) != "ahead" for gain in at_own.values()):
        second += "; the paper has it ahead."
    else:
        second += "."
    return (
        f"{first} {second} {PLACES_EXPLAINED} "
        f"In the paper's table (second-hand) it is ahead by {', '.join(paper.gains())} points at "
        f"{', '.join(map(str, paper.COUNTS))} tokens; its abstract says 1.6, 1.0 and 0.4 %."
    )


def _accuracy(
    report: Mapping[str, Any],
    title: str,
    names: Sequence[str],
    counts: Sequence[str],
    theirs: Mapping[str, Sequence[float]] | None = None,
) -> str:
    head = ["trained with", *(f"at {count}" for count in counts)]
    rows = accuracy_rows(report, names, counts)
    if not theirs:
        return f"## {title}\n\n{markdown_table(head, rows)}"
    head += [f"paper at {count}" for count in paper.COUNTS]
    for name, row in zip(names, rows, strict=True):
        row += [f"{value:.1f}" for value in theirs[name]] if name in theirs else ["-"] * 3
    return f"## {title}\n\n{markdown_table(head, rows)}\n\nRight of ours: {PAPERS}."


def _shown(report: Mapping[str, Any]) -> str:
    """Return the name of what a step shows: a sample of the digits is one image of one tile."""
    return {"digits": "images", "reading": "samples"}[task_of(report)]


def _cost(report: Mapping[str, Any]) -> str:
    regimes = {name: row for name, row in report["regimes"].items() if not row["is_start"]}
    largest = regimes.get("fixed-large")
    counted = {
        "digits": "once an image that is shown",
        "reading": "for one tile a sample; tall pages and pairs have two",
    }[task_of(report)]
    head = ["trained with", f"{_shown(report)} shown", "vision tokens", "seconds"]
    head += ["paper: vision tokens", "paper: hours on 64 A100"]
    rows = []
    for name, row in regimes.items():
        tokens, seconds = row["vision_tokens"]["mean"], row["seconds"]
        less = ""
        if largest and name != "fixed-large":
            less = f" ({tokens / largest['vision_tokens']['mean'] - 1:+.0%})"
        spread = "" if seconds["spread"] is None else f" ± {seconds['spread']:.0f}"
        theirs = ["-", "-"]
        if name in paper.COST:
            theirs = [f"{paper.COST[name][0]} B", f"{paper.COST[name][1]}"]
        time = f"{seconds['mean']:.0f}{spread}"
        rows.append([row["title"], str(row["views"]), f"{tokens:,.0f}{less}", time, *theirs])
    return (
        f"## Cost\n\n{markdown_table(head, rows)}\n\nOf a regime's own stage. Vision tokens are "
        f"counted {counted}. Seconds: {report['machine']}; here the encoder, "
        "data and fixed costs of a step weigh more than at the paper's size. The paper's columns "
        "are of its stage 2, second-hand."
    )


def _kinds(report: Mapping[str, Any], main: Sequence[str]) -> str:
    questions = report["questions"]
    rows = []
    for row in (report["regimes"][name] for name in main):
        for count in report["counts"]:
            cells = [points(row["accuracy_by_kind"][kind][count]) for kind in questions]
            rows.append([row["title"], count, *cells])
    table = markdown_table(["trained with", "at", *questions], rows)
    numbers = ", ".join(f"{kind} {number}" for kind, number in questions.items())
    return f"## By kind of question\n\n{table}\n\nQuestions: {numbers}."


def _figures(odds: Sequence[str]) -> list[str]:
    paragraphs = [
        "## Figures",
        "After the paper's Figure 1: accuracy against tokens, ours and the paper's.",
        "![Accuracy against vision tokens](figure1.png)",
        "The same at the trained counts alone.",
        "![Accuracy at the trained counts](claim.png)",
        "After the paper's Figure 3, with kinds of question in place of benchmarks: the same "
        "models, at every square count that was asked.",
        "![The same by kind of question](figure3.png)",
    ]
    if len(odds) > 1:
        paragraphs += ["The odds, by kind of question.", "![Odds](odds.png)"]
    return paragraphs
