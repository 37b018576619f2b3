"""``report.md``: tables with mean and spread over seeds beside the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ablation import paper
from experiments.ablation.results import difference
from experiments.ablation.suites import ANY_COUNT, MAIN, MIXING, ODDS, SPECIALISTS
from experiments.ablation.tables import (
    accuracy_rows,
    asked_and_seeds,
    markdown_table,
    nearest_sentence,
    points,
    starts_of,
)

PAPERS = "the paper's, on its benchmarks (second-hand)"


def format_report(report: Mapping[str, Any]) -> str:
    """Format the page of a report of :func:`experiments.ablation.results.collect`."""
    have = report["regimes"]
    main = [name for name in MAIN if name in have]
    sections = [_head(report)]
    if "stochastic" in main and len(main) > 1:
        sections.append(_claims(report, main))
    sections += [
        _accuracy_section(
            report,
            "Trained with, asked at",
            [*starts_of(report), *main],
            report["counts"],
            paper.TRAINED_WITH,
        ),
    ]
    if report["unseen"]:
        title = "Counts that no model was trained with"
        mended = [name for name in ANY_COUNT if name in have]
        sections.append(_accuracy_section(report, title, [*main, *mended], report["unseen"]))
        if mended:
            sections[-1] += "\n\nBeside the nearest trained count, in points:\n\n" + "\n".join(
                f"- {nearest_sentence(report, name)}" for name in mended
            )
    for title, names, theirs in (
        ("Odds", ODDS, paper.ODDS),
        ("Ways to mix counts", MIXING, {}),
        ("Positions", ("stochastic", *ANY_COUNT), {}),
    ):
        some = [name for name in names if name in have]
        if len(some) > 1:
            sections.append(_accuracy_section(report, title, some, report["counts"], theirs))
    sections += [_cost_section(report), _kinds_section(report, main), _figures(report)]
    return "\n\n".join(sections) + "\n"


def _head(report: Mapping[str, Any]) -> str:
    first = report["regimes"][starts_of(report)[0]]
    regime = next(row for row in report["regimes"].values() if not row["is_start"])
    return "\n".join(
        [
            f"# Ablation of the vision-token count, scale {report['scale']}",
            "",
            asked_and_seeds(report),
            "",
            f"Each seed has one start, {report['start']['warm_up_steps']} steps of the encoder "
            f"alone and {first['steps']} at {report['counts'][-1]} tokens; every regime goes on "
            f"from it for {regime['steps']} steps of {report['batch_size']} shown images, with the "
            "same order of data, the same learning rates and schedule.",
        ]
    )


def _claims(report: Mapping[str, Any], main: Sequence[str]) -> str:
    """Compare both halves of the paper's claim with the results."""
    counts = report["counts"]
    lines = ["## The paper's claim, here", ""]
    lines.append("Stochastic minus the fixed model, paired by seed, in points:")
    head = ["compared with", *(f"at {count}" for count in counts)]
    rows = []
    for own, name in enumerate(SPECIALISTS):
        if name not in main:
            continue
        cells = []
        for place, count in enumerate(counts):
            cell = points(difference(report, "stochastic", name, count), signed=True)
            cells.append(f"**{cell}**" if place == own else cell)
        rows.append([report["regimes"][name]["title"], *cells])
    lines += ["", markdown_table(head, rows), ""]
    lines.append(_verdict(report, main))
    return "\n".join(lines)


def _verdict(report: Mapping[str, Any], main: Sequence[str]) -> str:
    """Say whether fixed models are behind at other counts, and ahead at their own."""
    off: list[tuple[float, str]] = []
    own: list[tuple[float, str]] = []
    for place, name in enumerate(SPECIALISTS):
        if name in main:
            for i, count in enumerate(report["counts"]):
                gain = 100 * difference(report, "stochastic", name, count)["mean"]
                (own if i == place else off).append((gain, count))
    least_gain, most_gain = min(off)[0], max(off)[0]
    ahead = [f"{count} ({gain:+.1f})" for gain, count in own if gain > 0]
    behind = [f"{count} ({gain:+.1f})" for gain, count in own if gain <= 0]
    sentences = [
        f"Off their own count, fixed models are at least {least_gain:.1f} and at most "
        f"{most_gain:.1f} points below the stochastic one."
        if least_gain > 0
        else "Off its own count, a fixed model is not always below the stochastic one: the "
        f"difference goes from {least_gain:+.1f} to {most_gain:+.1f} points."
    ]
    if behind:
        sentences.append(
            f"On a fixed model's own count (bold) the stochastic one is behind at "
            f"{', '.join(behind)}"
            + (f" and ahead at {', '.join(ahead)}." if ahead else "; the paper has it ahead.")
        )
    else:
        sentences.append(
            f"On a fixed model's own count (bold) the stochastic one is ahead at {', '.join(ahead)}"
            ", as in the paper."
        )
    sentences.append(
        f"In the paper's table (second-hand) it is ahead by {', '.join(paper.gains())} points at "
        f"{', '.join(map(str, paper.COUNTS))} tokens; its abstract says 1.6, 1.0 and 0.4 %."
    )
    return " ".join(sentences)


def _accuracy_section(
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


def _cost_section(report: Mapping[str, Any]) -> str:
    have = {name: row for name, row in report["regimes"].items() if not row["is_start"]}
    largest = have.get("fixed-large")
    head = ["trained with", "images shown", "vision tokens", "seconds"]
    head += ["paper: vision tokens", "paper: hours on 64 A100"]
    rows = []
    for name, row in have.items():
        tokens, seconds = row["vision_tokens"]["mean"], row["seconds"]
        less = ""
        if largest and name != "fixed-large":
            less = f" ({tokens / largest['vision_tokens']['mean'] - 1:+.0%})"
        spread = "" if seconds["spread"] is None else f" ± {seconds['spread']:.0f}"
        theirs = (
            [f"{paper.COST[name][0]} B", f"{paper.COST[name][1]}"] if name in paper.COST else []
        )
        rows.append(
            [
                row["title"],
                str(row["views"]),
                f"{tokens:,.0f}{less}",
                f"{seconds['mean']:.0f}{spread}",
                *(theirs or ["-", "-"]),
            ]
        )
    return (
        f"## Cost\n\n{markdown_table(head, rows)}\n\nOf a regime's own stage. Vision tokens are "
        f"counted once an image that is shown. Seconds: {report['machine']}; here the encoder, "
        "data and fixed costs of a step weigh more than at the paper's size. The paper's columns "
        "are of its stage 2, second-hand."
    )


def _kinds_section(report: Mapping[str, Any], main: Sequence[str]) -> str:
    kinds = list(report["questions"])
    head = ["trained with", "at", *kinds]
    rows = [
        [
            report["regimes"][name]["title"],
            count,
            *(points(report["regimes"][name]["accuracy_by_kind"][kind][count]) for kind in kinds),
        ]
        for name in main
        for count in report["counts"]
    ]
    asked = ", ".join(f"{kind} {number}" for kind, number in report["questions"].items())
    return f"## By kind of question\n\n{markdown_table(head, rows)}\n\nQuestions: {asked}."


def _figures(report: Mapping[str, Any]) -> str:
    lines = [
        "## Figures",
        "",
        "After the paper's Figure 1: accuracy against tokens, ours and the paper's.",
        "",
        "![Accuracy against vision tokens](figure1.png)",
        "",
        "After the paper's Figure 3, with kinds of question in place of benchmarks: the same "
        "models, at every square count that was asked.",
        "",
        "![The same by kind of question](figure3.png)",
    ]
    if sum(name in report["regimes"] for name in ODDS) > 1:
        lines += ["", "The odds, by kind of question.", "", "![Odds](odds.png)"]
    return "\n".join(lines)
